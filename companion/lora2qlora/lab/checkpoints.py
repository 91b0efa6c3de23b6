"""The newest checkpoint of transformers' Trainer that was written to its end. Chapter 13.

A process that is ended while it saves leaves a folder checkpoint-N that looks like the others, and Trainer,
told to go on from the last one, takes it. Trainer writes the weights first, then the optimizer, the scheduler
and the states of the random numbers, and trainer_state.json last: with all of them whole, so is the folder.

Lengths and ends of files are looked at, not each byte: what a disk lost later is not seen. One folder is for
one run: a second run from the start would write over a checkpoint of the first and could leave a mixture.
"""

from __future__ import annotations

import json
import os
import re
import warnings
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open


def newest_whole_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The checkpoint to resume from: `trainer.train(resume_from_checkpoint=newest_whole_checkpoint(folder))`.

    None where there is none, and so a fresh start. The half-written ones that are newer are named in one
    UserWarning, each with what is wrong; they stay where they are, and the resumed run writes them anew.
    """
    skipped, found = [], None
    for _, path in sorted(_checkpoints(Path(folder)), reverse=True):
        if not (reason := what_is_missing(path)):
            found = path
            break
        skipped.append(f"{path.name} ({reason})")
    if skipped:
        instead = f"going on from {found.name}" if found else "no other is there"
        message = f"not whole, and so not used: {', '.join(skipped)}; {instead}"
        warnings.warn(message, UserWarning, stacklevel=2)
    return found


def what_is_missing(checkpoint: Path) -> str | None:
    """Why a checkpoint-N cannot be resumed from, in words, or None where it is whole."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_bytes().decode("utf-8"))
        step = state["global_step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "trainer_state.json, which is written last, is missing or cut"
    if f"checkpoint-{step}" != checkpoint.name:
        return f"trainer_state.json is that of step {step}"
    if reason := _wrong_weights(checkpoint):
        return reason
    needed = [checkpoint / name for name in ("optimizer.pt", "scheduler.pt")]
    needed += sorted(checkpoint.glob("rng_state*.pth")) or [checkpoint / "rng_state.pth"]
    if (scaler := checkpoint / "scaler.pt").exists():  # in float16 only
        needed.append(scaler)
    for path in needed:
        if not path.is_file():
            return f"{path.name} is missing"
        if not zipfile.is_zipfile(path):  # torch.save writes a zip, whose table of contents is its end
            return f"{path.name} is cut"
    return None


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Step and path of each folder called checkpoint-N."""
    paths = folder.iterdir() if folder.is_dir() else ()
    found = [(re.fullmatch(r"checkpoint-([0-9]+)", path.name), path) for path in paths if path.is_dir()]
    return [(int(match[1]), path) for match, path in found if match]


def _wrong_weights(checkpoint: Path) -> str | None:
    """What is wrong with the weights, of a model or of one adapter or several; None where nothing is."""
    files = sorted(checkpoint.rglob("*.safetensors"))
    for path in files:
        try:
            with safe_open(path, "pt"):  # holds the header against the file's length
                pass
        except (SafetensorError, OSError):
            return f"{path.relative_to(checkpoint).as_posix()} is cut"
    index = checkpoint / "model.safetensors.index.json"
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values()) if index.is_file() else set()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{index.name} is cut"
    if lost := sorted(shards - {path.name for path in files}):
        return f"{lost[0]} is missing"
    return None if files else "no .safetensors file with weights"
