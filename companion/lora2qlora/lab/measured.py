"""Measured results and where they came from: one JSON-lines file an experiment, in `records/`.

An experiment too long for a chapter appends a record a run. The chapter loads the records, plots them,
and holds a small live run against them.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from filelock import FileLock

RECORDS = Path(__file__).parent / "records"
VERSIONS_OF = ("torch", "transformers", "peft", "bitsandbytes")
# Two names after a slash that begins a word, or a drive of Windows: records are published.
MACHINE_PATH = re.compile(r"(?<![\w.:/~}$-])/[\w.@+-]+/[\w.@+-]+|\b[A-Za-z]:[\\/]\w|file:/")


@dataclass(frozen=True)
class Record:
    """One run: what was asked (`configuration`, `seed`), what came out (`figures`), and its `provenance`."""

    configuration: dict
    seed: int
    figures: dict
    provenance: dict


def load(name: str, directory: Path | None = None) -> list[Record]:
    """All records of an experiment, oldest first.

    Raises FileNotFoundError naming the experiments that have records, ValueError naming a damaged line.
    """
    path = _path(name, directory)
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.jsonl"))) or "none yet"
        raise FileNotFoundError(f"no records of {name!r} in {path.parent}; there are: {known}")
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            records.append(_parse(line))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not a record: {error}") from error
    return records


def _parse(line: bytes) -> Record:
    """A record of one line of JSON; ValueError or TypeError where it is none, or no record."""

    def refuse(number):
        raise ValueError(f"{number} is no finite number")

    found = Record(**json.loads(line.decode("utf-8"), parse_constant=refuse))
    for field, kind in (("configuration", dict), ("seed", int), ("figures", dict), ("provenance", dict)):
        value = getattr(found, field)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{field} must be {kind.__name__}, got {value!r:.80}")
    return found


def matching(name: str, directory: Path | None = None, **wanted) -> list[Record]:
    """Records of an experiment whose configuration has all these values, oldest first; maybe none.

    Raises FileNotFoundError and ValueError as `load` does.
    """
    return [r for r in load(name, directory) if r.configuration.items() >= wanted.items()]


def on_gpu(part: str, job: str = "", directory: Path | None = None) -> list[Record]:
    """Records of a part of companion/experiments/gpu.py at full size whose job's name begins with `job`.

    Oldest first; an empty list where nothing has been measured on a GPU yet.
    """
    try:
        records = load("gpu", directory)
    except FileNotFoundError:
        return []
    wanted = [r for r in records if r.configuration.items() >= {"part": part, "size": "full"}.items()]
    return [r for r in wanted if str(r.configuration.get("job", "")).startswith(job)]


def record(name: str, configuration: dict, figures: dict, seed: int, directory: Path | None = None) -> Record:
    """Append one run, atomically; a second process waits its turn.

    Raises ValueError where something is not plain JSON (a tensor, NaN or infinity), names a path of this
    machine, or a line before is damaged; OSError where the file cannot be written. Then it is as it was.
    """
    path = _path(name, directory)
    new = Record(dict(configuration), seed, dict(figures), provenance())
    try:
        line = json.dumps(asdict(new), allow_nan=False, sort_keys=True).encode()
        _parse(line)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"a record of {name!r} must be plain, finite JSON: {error}") from error
    for text in _texts(json.loads(line)):
        if found := MACHINE_PATH.search(text):
            raise ValueError(f"a record of {name!r} is published, but names {found[0]!r} of this machine")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{name}.lock")):
        if path.exists():
            load(name, directory)  # what follows a line that was cut would be lost with it
        _append(path, line)
    return new


def _texts(value) -> Iterator[str]:
    """Every text in plain JSON, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _texts(part)


def _append(path: Path, line: bytes) -> None:
    """Add a line to a file: written beside it, then renamed, so that all of it is there or nothing."""
    partial = path.with_name(f".{path.stem}.partial")  # hidden, so no part of a wheel if it is left behind
    try:
        before = path.read_bytes() if path.exists() else b""
        if before and not before.endswith(b"\n"):
            before += b"\n"
        partial.write_bytes(before + line + b"\n")
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, f"cannot add a record to {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)  # there is none after the rename


def is_recorded(name: str, configuration: dict, seed: int, directory: Path | None = None) -> bool:
    """Whether this very run has a record already: what lets a long experiment resume where it was cut."""
    if not _path(name, directory).exists():
        return False
    wanted = json.loads(json.dumps(configuration))
    return any(r.configuration == wanted and r.seed == seed for r in load(name, directory))


def provenance() -> dict[str, str]:
    """Date, device, versions and commit of a run made now and here."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(0) if cuda else f"CPU ({platform.machine()})",
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in VERSIONS_OF},
        "commit": _commit(),
    }


@functools.cache
def _commit() -> str:
    """The commit of the checkout the package lies in, "+" where it had changes, else "unknown".

    Read once a process: code that was loaded does not change when the checkout moves on.
    """

    def git(*words):
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ":/companion", ":!*.jsonl")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _path(name: str, directory: Path | None) -> Path:
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise ValueError(f"an experiment's name is lower-case letters, digits and _, got {name!r}")
    return (directory or RECORDS) / f"{name}.jsonl"
