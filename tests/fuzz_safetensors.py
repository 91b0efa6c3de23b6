"""safetensors files with one thing wrong: lengths, header, dtypes, offsets, shapes, names, numbers, bytes."""

import json
from random import Random

from fuzz_json import json_leaf, json_text
from fuzz_trees import mutate

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
WIDTHS |= {
    "U16": 2,
    "U32": 4,
    "U64": 8,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "C64": 8,
    "F32X": 4,
    "f32": 4,
}
LENGTHS = (0, 1, 2, 7, 8, 100, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 100_000_001)


def read(data: bytes) -> tuple[dict, bytes]:
    """The header and the body of a good file."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write(header, body: bytes, rng: Random | None = None) -> bytes:
    """A file of this header and body; with `rng`, the header's text may be damaged too."""
    text = json_text(rng, header, 0.02) if rng else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def mutate_file(rng: Random, data: bytes) -> bytes:
    """Other tensors, well written; or a header that does not fit; or bytes that no writer makes."""
    kind = rng.random()
    if kind < 0.6:
        for edit in rng.choices((_retype, _renamed, _numbers), k=rng.choice((1, 1, 2))):
            data = edit(rng, data) if _names(read(data)[0]) else data
    elif kind < 0.8:
        data = _header(rng, data)
    return _bytes(rng, data) if kind >= 0.8 or rng.random() < 0.05 else data


def _names(header: dict) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def _slice(header: dict, body: bytes, name: str) -> bytes:
    start, stop = header[name]["data_offsets"]
    return body[start:stop]


def _pack(header: dict, tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """A well-written file of these tensors, one after the other, with the metadata of the header."""
    packed = {"__metadata__": header["__metadata__"]} if "__metadata__" in header else {}
    body = b""
    for name, (dtype, shape, data) in tensors.items():
        stop = len(body) + len(data)
        packed[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), stop]}
        body += data
    return write(packed, body)


def _tensors(data: bytes) -> tuple[dict, dict]:
    header, body = read(data)
    named = {n: (header[n]["dtype"], header[n]["shape"], _slice(header, body, n)) for n in _names(header)}
    return header, named


def _retype(rng: Random, data: bytes) -> bytes:
    """One tensor of another dtype or shape, with as many bytes as it then needs."""
    header, tensors = _tensors(data)
    name = rng.choice(list(tensors))
    dtype, shape, raw = tensors[name]
    if rng.random() < 0.5:
        dtype = rng.choice(list(WIDTHS))
    else:
        total = len(raw) // WIDTHS.get(dtype, 1)
        shapes = (
            shape[::-1],
            [total],
            [1, *shape],
            [*shape, 1],
            [],
            [0, *shape[1:]],
            [*shape, 2],
            shape[:-1],
        )
        shape = rng.choice((*shapes, [n + 1 for n in shape]))
    count = WIDTHS.get(dtype, 1)
    for n in shape:
        count *= n
    tensors[name] = (dtype, shape, (raw * (count // max(1, len(raw)) + 1))[:count])
    return _pack(header, tensors)


def _renamed(rng: Random, data: bytes) -> bytes:
    """Tensors dropped, renamed or added."""
    header, tensors = _tensors(data)
    return _pack(
        header, _only_tensors(mutate(rng, tensors, lambda rng, old: rng.choice(list(tensors.values()))))
    )


def _only_tensors(tensors) -> dict:
    tensors = tensors if isinstance(tensors, dict) else {}
    return {str(name): tensor for name, tensor in tensors.items() if isinstance(tensor, tuple)}


def _numbers(rng: Random, data: bytes) -> bytes:
    """Bits of one number all set: not a number in any float; or its top ones: huge; or one bit."""
    body = read(data)[1]
    if not body:
        return data
    at, word = rng.randrange(len(body)), rng.choice((b"\xff" * 4, b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f"))
    if rng.random() < 0.3:
        word = bytes([body[at] ^ (1 << rng.randrange(8))])
    at -= at % len(word)
    return data[: len(data) - len(body)] + (body[:at] + word + body[at + len(word) :])[: len(body)]


def _header(rng: Random, data: bytes) -> bytes:
    """One edit anywhere in the header's JSON, its metadata included; the body stays."""
    header, body = read(data)
    return write(mutate(rng, header, _header_leaf), body, rng)


def _header_leaf(rng: Random, old):
    if isinstance(old, str) and rng.random() < 0.6:
        return rng.choice(list(WIDTHS))
    if isinstance(old, int) and rng.random() < 0.6:
        return max(0, old + rng.choice((-8, -4, -1, 1, 4, 8)))
    return json_leaf(rng, old)


def _bytes(rng: Random, data: bytes) -> bytes:
    """What no writer makes: cut, longer, another length of the header, a bit turned, or noise."""
    at = rng.randrange(len(data))
    return rng.choice(
        (
            data[:at],
            data + rng.randbytes(rng.choice((1, 8, 1000))),
            rng.choice(LENGTHS).to_bytes(8, "little") + data[8:],
            ((int.from_bytes(data[:8], "little") + rng.choice((-8, -1, 1, 8))) % 2**64).to_bytes(8, "little")
            + data[8:],
            data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :],
            data[:at] + rng.randbytes(8) + data[at + 8 :],
            rng.randbytes(at),
            data[8:],
            data[:8],
            data + data,
        )
    )
