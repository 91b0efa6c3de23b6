"""The chat files that come with the package, by name. Chapter 13.

    support-desk    English conversations of chatterbot-corpus, as raw as a reader's own file: with
                    duplicates, and with a row that trains nothing

`companion/experiments/build_data.py` makes them, and `read_chats` reads them.
"""

from __future__ import annotations

from pathlib import Path

from .cache import cache_directory
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


def find_chats(data: str | Path) -> Path:
    """The file of one's chats: a path, the name of a built-in file, or a Hub dataset `owner/name`.

    A dataset's `train` split is written once, as .jsonl, to the cache's folder, where it can be looked at.
    Raises KeyError: no such file, no such name; OSError: the dataset cannot be had. Chapter 13.
    """
    if Path(data).is_file():
        return Path(data)
    name = str(data)
    if name.count("/") == 1 and not Path(name).suffix and not Path(name).parent.exists():
        return _from_hub(name)
    if name not in CHAT_FILES:
        raise KeyError(
            f"no file {name!r} here, and no built-in chats of that name: give the path of a .jsonl, .json, "
            f".csv or .parquet file, a Hub dataset owner/name, or one of {', '.join(CHAT_FILES)}"
        )
    return chat_file(name)


def _from_hub(name: str) -> Path:
    """The train split of a Hub dataset as a .jsonl file in the cache."""
    path = cache_directory() / "chats" / f"{name.replace('/', '--')}.jsonl"
    if path.is_file():
        return path
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split="train")
    except Exception as error:  # datasets raises many kinds of errors
        raise OSError(f"cannot load {name!r} from the Hub ({type(error).__name__}: {error})") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    rows.to_json(partial, force_ascii=False)
    partial.replace(path)
    return path
