"""The chat files that come with the package, by name. Chapter 13.

    support-desk    English conversations of chatterbot-corpus, as raw as a reader's own file: with
                    duplicates, and with a row that trains nothing

`companion/experiments/build_data.py` makes them, and `read_chats` reads them.
"""

from __future__ import annotations

from pathlib import Path

from .sources import read_sums, verify_file

DATA = Path(__file__).parent / "data"
CHAT_FILES = {"support-desk": "support_desk.jsonl"}


def chat_file(name: str) -> Path:
    """The path of a built-in chat file, once its bytes are what SHA256SUMS says.

    Raises KeyError, listing the names, for another name; OSError where the file is missing or altered.
    """
    if not isinstance(name, str) or name not in CHAT_FILES:
        raise KeyError(f"unknown chat file {name!r}: use one of {', '.join(CHAT_FILES)}, or a path of yours")
    file = CHAT_FILES[name]
    try:
        sums = read_sums(DATA / "SHA256SUMS")
        if file not in sums:
            raise ValueError(f"{DATA / 'SHA256SUMS'} has no line for {file}.")
        verify_file(DATA / file, sums[file])
    except (OSError, ValueError) as error:
        raise OSError(f"the chat file {name!r} is not whole: {error} Reinstall lora2qlora.") from error
    return DATA / file
