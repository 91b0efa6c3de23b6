"""build_data.py, the support desk: the English conversations of chatterbot-corpus as chats, one row a line.

Nothing is mended and nothing dropped: chapter 13 reads these rows as it would a reader's own file, and finds
in them what such files hold. A conversation's turns are the user's and the assistant's by turns. One that is
a text instead of a list (trivia has one: a question and its answer in one line) is a single turn.
"""

import json
import re

import yaml

ENGLISH = re.compile(r"chatterbot_corpus/data/english/(\w+)\.yml")


def chat_rows(files: dict[str, bytes]) -> list[dict]:
    """{"messages", "source"} of each conversation, by file and then in the file's order.

    Raises ValueError, naming the file, for a turn that is no text.
    """
    rows = []
    for path in sorted(filter(ENGLISH.fullmatch, files)):
        source = ENGLISH.fullmatch(path)[1]
        for conversation in yaml.safe_load(files[path])["conversations"]:
            turns = [conversation] if isinstance(conversation, str) else conversation
            if odd := [turn for turn in turns if not isinstance(turn, str)]:
                raise ValueError(f"{path} has a turn that is no text: {odd[0]!r}")
            rows.append({"messages": messages(turns), "source": source})
    return rows


def messages(turns: list[str]) -> list[dict[str, str]]:
    """The turns of the user and of the assistant by turns, the user first."""
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]


def json_lines(rows: list[dict]) -> bytes:
    """One row a line, in UTF-8 and without spaces between the fields."""
    lines = (json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows)
    return "".join(f"{line}\n" for line in lines).encode("utf-8")
