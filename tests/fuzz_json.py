"""JSON as it may come from anywhere: values of other types, hostile patterns, and texts that are no JSON."""

import json
import math
from random import Random

NUMBERS = (0, 1, 2, 3, 8, 9, -1, 255, 2**31, 2**63, 2**64, 10**400, -(10**400), True, False)
NUMBERS += (
    0.5,
    1.0,
    2.0,
    -0.0,
    0.999999999,
    5e-324,
    1e-45,
    1e38,
    3.5e38,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
)
WORDS = (
    "q_proj",
    "v_proj",
    "up_proj",
    "lm_head",
    "embed",
    "norm",
    "layers.0.q_proj",
    "layers.1",
    "layers",
    "",
)
WORDS += (
    "all-linear",
    "LORA",
    "lora",
    "none",
    "all",
    "gaussian",
    "eva",
    "pissa",
    "None",
    "nan",
    "1",
    "-1",
    "F32",
)
WORDS += (
    " ",
    "\x00",
    "\ud800",
    "é",
    "\u202e",
    "💥",
    "a" * 3000,
    "../../x",
    "/etc/passwd",
    "%s%n",
    "{0}",
    "\\",
    "\n",
)
# Patterns that are none, that double their work with every letter, or that are legal and odd.
BROKEN = (
    "(",
    ")",
    "[",
    "*",
    "+a",
    "a**",
    "(?P<a>x)(?P<a>y)",
    "(?<=a*)b",
    "\\",
    "(?z)",
    "a{2,1}",
    r"\8",
    "(?P=b)",
)
ENDLESS = (
    "((a|b|[a-z_.0-9])*)*Q",
    "(.*)*X",
    "(.+)+X",
    "(([a-z._0-9]+)+)+Q",
    "(a|a|.)*(a|.|b)*(.|.)*Q",
    "(.*.*.*)*Q",
)
ENDLESS += (
    r"(\w|\.|[a-z])*(?:\w|\.|o)+Q",
    "(?:.*?.*?.*?.*?.*?.*?.*?)+Q",
    "(?=(.*)*X)",
    "(?:(?:l|.)(?:.|_)?)+Q",
)
ODD = (
    "(?i)Q_PROJ",
    "q_proj(?i)",
    "[[a]",
    "[a--b]",
    "a{99999}",
    "(?:a{999}){999}",
    "(?:(?:a{99}){99}){99}",
    "^$",
    "|",
)
ODD += (
    ".*",
    "(.*\\.)?q_proj$",
    ".*layers\\.[01]\\.(q|v)_proj",
    "(q_proj)(?(1)|x)",
    r"(.)\1",
    "(?x) q_proj # c",
    "\\Z",
)


def json_leaf(rng: Random, old):
    """Another JSON value: of another type, at the edge of its range, hostile, or just a neighbour."""
    if type(old) in (int, float) and rng.random() < 0.3 and abs(old) < 1e300:
        return rng.choice((old + 1, old - 1, -old, old * 2, old / 2, float(old), str(old), [old]))
    if isinstance(old, str) and rng.random() < 0.3:
        return rng.choice(
            (f"{old}x", old[:-1], f".*{old}", [old], {old: 1}, list(old), f"{old}|{pattern(rng)}")
        )
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 5:
        return rng.choice(WORDS)
    if kind < 6:
        return pattern(rng)
    if kind < 7:
        return rng.choice(
            (None, [], {}, [None], {"": 1}, [[]], [0, "a"], {"a": {"b": [1]}}, {"q_proj": None})
        )
    return {pattern(rng): rng.choice(NUMBERS), rng.choice(WORDS): rng.choice(NUMBERS)}


def pattern(rng: Random, depth: int = 3) -> str:
    """A regular expression: a known hostile one, or one that grows at random from parts of names."""
    if depth == 3 and rng.random() < 0.5:
        return rng.choice(rng.choice((BROKEN, ENDLESS, ODD)))
    if not depth or rng.random() < 0.2:
        return rng.choice(
            ("q_proj", "layers", "proj", ".", r"\.", r"\d", r"\w", "[a-z_]", "[^.]", "0", "_", "a")
        )
    one, two = pattern(rng, depth - 1), pattern(rng, depth - 1)
    grown = (f"({one})", f"(?:{one}|{two})", f"{one}{two}", f"({one}){rng.choice('*+?')}", f"{one}{{1,9}}")
    grown += (f"(?={one}){two}", f"(?!{one}){two}", f"^{one}$", f"({one})*?{two}", f"{one}.*{two}")
    return rng.choice(grown)


def json_text(rng: Random, value, damage: float = 0.08) -> bytes:
    """The value as a file's bytes; sometimes damaged: cut, of another encoding, too deep, with keys twice."""
    good = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() >= damage:
        return good
    at = rng.randrange(len(good) + 1)
    numerals = (
        b"1e999",
        b"-1e-999",
        b"1" * 5000,
        b"01",
        b"1_0",
        b"0x10",
        b"NaN",
        b"-Infinity",
        b"\xff",
        b"\x00",
    )
    return rng.choice(
        (
            good[:at],
            good[:at] + bytes([rng.randrange(256)]) + good[at + 1 :],
            good[:at] + rng.choice(numerals) + good[at:],
            b"",
            b"null",
            b"\xef\xbb\xbf" + good,
            good.decode("utf-8", "replace").encode("utf-16"),
            good + good,
            good.replace(b"{", b'{"r": 3, "r": ', 1),
            b"[" * 100_000,
            b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
            b"\x80\x04K\x01.",  # a pickle
            good[:-1] + b"," + good[1:],  # every key twice
        )
    )
