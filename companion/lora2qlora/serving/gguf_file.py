"""A GGUF file, written whole or not at all. Chapter 16."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFWriter

from lora2qlora.adapters.folder import replacing

Shapes = Mapping[str, tuple[tuple[int, ...], GGMLQuantizationType]]


def write_gguf(
    path: Path,
    architecture: str,
    add_keys: Callable[[GGUFWriter], None],
    shapes: Shapes,
    tensors: Iterable[np.ndarray],
) -> None:
    """Write keys, then what tensors there are, then their bytes, which may be made one by one.

    `shapes` are in numpy's order, each with its kind, and `tensors` come in the order of `shapes`. The bytes
    are written here, as the package's writer uses `ndarray.tofile`, which passes over a full disk in silence
    where a tensor is small. Raises OSError; IsADirectoryError: the path is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, need the name of a file")
    with replacing(path.parent, (path.name,)) as partial:
        writer = GGUFWriter(partial / path.name, architecture)
        try:
            add_keys(writer)
            for name, (shape, kind) in shapes.items():
                writer.add_tensor_info(name, tuple(shape), np.dtype("f4"), _nbytes(shape, kind), kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        with open(partial / path.name, "ab") as file:
            file.write(_padding(file.tell()))
            for tensor in tensors:
                file.write(np.ascontiguousarray(tensor).data)
                file.write(_padding(file.tell()))


def _nbytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """The bytes of a tensor."""
    numbers, nbytes = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // numbers * nbytes


def _padding(place: int) -> bytes:
    """What is missing from a place to the next one where a tensor may begin."""
    return bytes(-place % GGUF_DEFAULT_ALIGNMENT)
