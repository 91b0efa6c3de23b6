"""The cache of converted models: where it is, whether a model in it is whole and what made it."""

from __future__ import annotations

import errno
import json
import os
from importlib import metadata
from pathlib import Path

from packaging.version import Version

CONVERTER = 2  # raise it when what a conversion writes changes: caches made by another are made again
RIGHT_SINCE = "5.18"  # of transformers: older ones take SmolLM2's first token for its last, and more
UPGRADE = (
    f"Known to be right are transformers {RIGHT_SINCE} to 5.24. Run: "
    "pip install --upgrade 'transformers>=5.23,<6' 'gguf>=0.17.1'"
)


class ConversionError(OSError):
    """A conversion that failed, or that gave another model than the one meant; nothing of it was kept."""


def cache_directory() -> Path:
    """Where converted models are kept: LORA2QLORA_CACHE, else lora2qlora under the user's cache."""
    if asked := os.environ.get("LORA2QLORA_CACHE"):
        return Path(asked).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora2qlora"


def versions() -> dict[str, str]:
    """The installed versions of the libraries that convert; "none" where one is missing."""
    found = {}
    for package in ("transformers", "tokenizers", "gguf"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def converted_by() -> str:
    """The same in words, for messages: "transformers 5.23.0, tokenizers 0.23.3, gguf 0.19.0"."""
    return ", ".join(f"{package} {version}" for package, version in versions().items())


def is_right(transformers: str) -> bool:
    """Whether this version of transformers is one that converts rightly."""
    return Version(transformers) >= Version(RIGHT_SINCE)


def mark_complete(directory: Path) -> None:
    """Say, last of all, that a model is whole: `complete.json` has what made it and the files' sizes."""
    sizes = {file.name: file.stat().st_size for file in sorted(directory.iterdir())}
    made = {"converter": CONVERTER, "versions": versions(), "sizes": sizes}
    (directory / "complete.json").write_text(json.dumps(made, indent=1), encoding="utf-8")


def is_complete(directory: Path) -> bool:
    """Whether this converter, under a right transformers, ended here, and all files have their sizes."""
    try:
        made = json.loads((directory / "complete.json").read_text(encoding="utf-8"))
        if made["converter"] != CONVERTER or not is_right(made["versions"]["transformers"]):
            return False
        sizes = made["sizes"]
        return len(sizes) > 0 and all((directory / n).stat().st_size == size for n, size in sizes.items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def explain_cache_error(error: Exception, cache: Path) -> Exception:
    """The same failure in words that say what would do: a cache that cannot be written, or a conversion.

    What has words of its own comes back as it is: another OSError, or a MemoryError.
    """
    if isinstance(error, ConversionError | MemoryError):
        return error
    number = getattr(error, "errno", None)
    text = str(error).lower()
    full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "no space" in text or "too large" in text
    unwritable = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
    if full:
        why = "is full: a converted SmolLM2-135M takes 0.6 GB"
    elif number in unwritable or "permission denied" in text or "read-only" in text:
        why = "cannot be written"
    elif isinstance(error, OSError):
        return error
    else:
        return ConversionError(f"{converted_by()} failed: {type(error).__name__}: {error}. {UPGRADE}")
    return OSError(
        number,
        f"the model cache {cache} {why} ({error}). Free it, or set LORA2QLORA_CACHE to another directory.",
    )
