"""What the entries of an adapter_config.json may be, and the file read strictly. Chapter 04."""

import json
import math
from pathlib import Path

LARGEST = 4 * 2**20  # bytes; a config that names ten thousand layers has a fifth of it
MOST = 5_000  # patterns in one entry


def is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def is_number(value) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def is_positive(value) -> bool:
    return is_number(value) and value > 0


def is_names(value) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(name, str) for name in value)
    )


def is_pattern_of(is_value):
    """A check for a dict from expressions to values."""

    def check(value) -> bool:
        return isinstance(value, dict) and len(value) <= MOST and all(map(is_value, value.values()))

    return check


# Each entry that load_adapter follows: the check, and in words what passes it. None stands for a default.
TYPES = {
    "r": (is_count, "an integer from 1 on"),
    "lora_alpha": (is_positive, "a positive number"),
    "target_modules": (lambda value: is_names(value) and value, "names, or one regular expression"),
    "exclude_modules": (is_names, "names, or one regular expression"),
    "lora_dropout": (lambda value: is_number(value) and 0 <= value < 1, "a number in [0, 1)"),
    "rank_pattern": (is_pattern_of(is_count), f"integers from 1 on by expression, {MOST} at most"),
    "alpha_pattern": (is_pattern_of(is_positive), f"positive numbers by expression, {MOST} at most"),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
}


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError unless it is that: no other value, no key twice, no NaN."""
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} has more than {LARGEST} bytes: it is no config of an adapter")
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged, it is not JSON ({error!s:.200}): save or download it again"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object, but {value!r:.40}: save or download it again")
    return value


def check_types(path: Path, config: dict) -> None:
    """ValueError naming the first entry that `load_adapter` follows and that is of a wrong type or range."""
    for key, (is_right, expected) in TYPES.items():
        value = config.get(key)
        if value is not None and not is_right(value):
            raise ValueError(f"{path}: {key} must be {expected}, got {value!r:.80}")


def _once(pairs: list[tuple[str, object]]) -> dict:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key stands there twice")
    return values


def _no_number(word: str):
    raise ValueError(f"{word} is no number of JSON")
