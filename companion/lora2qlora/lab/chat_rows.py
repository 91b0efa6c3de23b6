"""Chats from a file, each row checked before it trains: what is kept, what is refused, and why. Chapter 13.

A row is a list of messages, each with a role and a content. Nothing is repaired, and nothing dropped in
silence: a row that would train something else than it says is refused with its line and a reason.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROLES = ("system", "user", "assistant")
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Chats:
    """`rows` of messages in the file's order, and the `refused`: (line or index from 1, reason)."""

    rows: list[Messages]
    refused: list[tuple[int, str]]

    def reasons(self) -> dict[str, int]:
        """How many rows were refused for each kind of reason, the most frequent first."""
        kinds = [reason.partition(":")[0] for _, reason in self.refused]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds), key=lambda k: (-kinds.count(k), k))}


def read_chats(path: str | os.PathLike) -> Chats:
    """Read the chats of a .jsonl, .json, .csv or .parquet file.

    A row has `messages`, a list of {"role", "content"}, in .csv as JSON text; or `prompt` and `completion`,
    two texts, which become a user's and an assistant's turn. Refused are rows that `what_is_wrong` names,
    lines that are no JSON or not UTF-8, and a chat that stood there before.

    Raises OSError: no such file; ValueError: another kind of file, one that cannot be read at all, or one
    of which no row is left (the message has the first reasons). Chapter 13.
    """
    path = Path(path)
    readers = {".jsonl": _json_lines, ".json": _json_list, ".csv": _csv, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path.name}: chats are read from {', '.join(readers)}, got {path.suffix!r}")
    rows, refused, seen = [], [], {}
    for line, row in readers[path.suffix.lower()](path):
        messages = row if isinstance(row, str) else _messages_of(row)
        reason = messages if isinstance(messages, str) else what_is_wrong(messages)
        key = None if reason else json.dumps([(m["role"], m["content"]) for m in messages])
        if not reason and key in seen:
            reason = f"duplicate: the same chat as in {seen[key]}"
        if reason:
            refused.append((line, reason))
            continue
        seen[key] = line
        rows.append([{"role": m["role"], "content": m["content"]} for m in messages])
    if not rows:
        first = "; ".join(f"{line}: {reason}" for line, reason in refused[:3]) or "it is empty"
        raise ValueError(f"{path.name} holds no chat to train on: {first}")
    return Chats(rows, refused)


def what_is_wrong(messages: object) -> str | None:
    """Why a list of messages cannot train, "kind: details", or None; turns are counted from 0."""
    if not isinstance(messages, list) or not messages:
        return f"no messages: need a list of them, got {messages!r:.60}"
    roles = []
    for turn, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            return f"no message: turn {turn} needs a role and a content, got {message!r:.60}"
        role, content = message["role"], message["content"]
        if role not in ROLES:
            return f"unknown role: turn {turn} has {role!r:.40}, known are {', '.join(ROLES)}"
        if not isinstance(content, str):
            return f"content is no text: turn {turn} ({role}) has {content!r:.40}"
        if not content.strip():
            return f"empty content: turn {turn} ({role})"
        if other := set(message) - {"role", "content"} - {key for key in message if message[key] is None}:
            return f"unknown field: turn {turn} ({role}) has {', '.join(map(repr, sorted(other)))}"
        roles.append(role)
    return _wrong_order(roles)


def _wrong_order(roles: list[str]) -> str | None:
    """Why roles in this order are no chat: a system turn may come first, then user and assistant in turn."""
    if "assistant" not in roles:
        return "no assistant turn: nothing would train"
    turns = roles[1:] if roles[0] == "system" else roles
    first = len(roles) - len(turns)
    if "system" in turns:
        return f"system turn: it must be the first, turn {first + turns.index('system')} is one"
    if turns[0] != "user":
        return f"no question: turn {first} is the {turns[0]}'s, before any of the user"
    for k in range(1, len(turns)):
        if turns[k] == turns[k - 1]:
            return f"two turns of one role: {first + k - 1} and {first + k} are both the {turns[k]}'s"
    return None


def _messages_of(row: object) -> object:
    """The messages of a row as a file has it; a string says why there are none."""
    if isinstance(row, list):
        return row
    if not isinstance(row, dict):
        return f"no row: need an object with messages, got {row!r:.60}"
    messages = row.get("messages")
    if isinstance(messages, str):
        try:
            return json.loads(messages)
        except (ValueError, RecursionError) as error:
            return f"broken JSON: in messages, {error}"
    if messages is None and {"prompt", "completion"} <= row.keys():
        turns = zip(("user", "assistant"), (row["prompt"], row["completion"]), strict=True)
        return [{"role": role, "content": content} for role, content in turns]
    if messages is None:
        return f"no messages: the row has {', '.join(map(repr, row)) or 'nothing'}"
    return messages


def _json_lines(path: Path) -> Iterator[tuple[int, object]]:
    """Line number and row; what cannot be read is a string that says why."""
    for line, content in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield line, f"not UTF-8: byte {error.start} of the line ({error.reason})"
        except (ValueError, RecursionError) as error:
            yield line, f"broken JSON: {error}"
        else:
            yield line, row if isinstance(row, dict | list) else {}


def _json_list(path: Path) -> Iterator[tuple[int, object]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no JSON in UTF-8 ({error}); rows by line are a .jsonl") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path.name} must hold a list of rows, got {type(rows).__name__}")
    yield from enumerate(rows, 1)


def _csv(path: Path) -> Iterator[tuple[int, object]]:
    import csv

    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                yield reader.line_num, {k: v for k, v in row.items() if k is not None}
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is no CSV in UTF-8: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[int, object]]:
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path.name} is no whole parquet file: {error}") from error
    yield from enumerate(table.to_pylist(), 1)
