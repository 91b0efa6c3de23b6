"""Chats held out for a test, so that no question that trains is asked in it. Chapter 13.

A random choice of rows puts two chats that begin with the same question on both sides, and then a test asks
what was learned by heart. Here the first question alone says where its chats go. What this does not see: one
question in other words, and an answer that several questions share.
"""

from __future__ import annotations

import hashlib
import unicodedata

from .chat_rows import Messages

SEED = "lora2qlora"  # another seed holds other questions out


def split_chats(rows: list[Messages], held_out: float = 0.1) -> tuple[list[Messages], list[Messages]]:
    """(train, held out), each in the order of `rows`; about the share `held_out` of the first questions.

    A row's side depends on its own first question and nothing else: not on the other rows nor on their
    order, nor on case, punctuation and white space. With a larger share, what was held out stays so.

    Raises ValueError for a share that is not between 0 and 1, a row without a user's turn, and where one
    side would be empty. Chapter 13.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is a share between 0 and 1, say 0.1 for a tenth, got {held_out!r}")
    sides = ([], [])
    questions = [first_question(messages, row) for row, messages in enumerate(rows)]
    for messages, question in zip(rows, questions, strict=True):
        sides[_position(question) < held_out].append(messages)
    for name, side, other in (("train on", sides[0], "smaller"), ("hold out", sides[1], "larger")):
        if not side:
            raise ValueError(
                f"held_out={held_out} leaves no chat to {name}: there are {len(rows)} chats with "
                f"{len(set(questions))} different first questions. Take a {other} held_out or more chats"
            )
    return sides


def first_question(messages: Messages, row: int = 0) -> str:
    """The first user's turn, its letters and digits alone and in small letters; ValueError names the row."""
    for message in messages:
        if message["role"] == "user":
            text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", message["content"]).casefold())
            return "".join(filter(str.isalnum, text))
    raise ValueError(f"row {row} has no turn of the user, so no question: read_chats refuses such rows")


def _position(question: str) -> float:
    """Where a question lies between 0 and 1, as if by chance and always at the same place."""
    digest = hashlib.sha256(f"{SEED} {question}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6]) / 2**48  # 48 bits: exact in a float, and below 1
