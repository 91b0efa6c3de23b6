"""What is refused before rows and tokenizers are used, in words that name the row, the column and the cause.

Functions that chapters show carry their idea alone; `guarded` puts the refusals before them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from itertools import islice


def guarded(function: Callable, check: Callable) -> Callable:
    """`function` behind `check`, which gets the same arguments by name, defaults included.

    inspect.getsource, and so a chapter's show_source, still gives `function` as it is written.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*arguments, **options):
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        check(**bound.arguments)
        return function(*arguments, **options)

    return call


def check_text(value, what: str) -> None:
    """Raise ValueError unless `value` is text and not blank: None, a number, NaN and "" are neither."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} must be text that is not blank, got {value!r}: fill it in or leave it out")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # tokenizers would complain of a type
        raise ValueError(f"{what} has half a character of UTF-16, which is no text: {error}") from error


def check_ends(tokenizer) -> None:
    """Raise ValueError where a tokenizer has no end token, with which every answer ends."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end token (eos_token is None), so a model would never learn to stop: "
            "set tokenizer.eos_token to the token that ends an answer"
        )


def check_pads(pad_token_id) -> None:
    """Raise ValueError where there is no padding token, with which short rows are filled."""
    if pad_token_id is None:
        raise ValueError(
            "the tokenizer has no padding token (pad_token is None): "
            "set tokenizer.pad_token, to tokenizer.eos_token if there is no other"
        )


def checked_rows(task, split: str, limit: int | None = None) -> Iterator[tuple[str, str]]:
    """(input, target) of each row of a split, or of its first `limit` rows.

    Raises ValueError naming the split that is not there, or the row and the column without text.
    """
    rows = getattr(task, split, None)
    if rows is None:
        raise ValueError(f"{task.name} has no {split} split")
    for index, row in enumerate(islice(rows, None if limit is None else max(limit, 0))):
        for column in ("input", "target"):
            where = f"row {index} of {task.name}'s {split} split: its column {column!r}"
            if column not in row:
                raise ValueError(f"{where} is missing, there are {sorted(row)}")
            check_text(row[column], where)
        yield row["input"], row["target"]
