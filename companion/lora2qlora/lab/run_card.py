"""A run card: what a training run was, in one small file of plain JSON that can be given away.

It has the settings, the seeds, the versions, the data by their checksum, the date, the device and what came
out, so that someone else can do the run again; and no path and no name of the machine it was done on.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import platform
import tempfile
from importlib import metadata
from pathlib import Path

from .chat_rows import read_chats
from .measured import MACHINE_PATH, provenance

FILE = "run_card.json"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "lora2qlora")
FIELDS = ("settings", "seeds", "versions", "data", "date", "device", "figures")


def run_card(settings: dict, data: str | os.PathLike | None, figures: dict) -> dict:
    """The card of a run that was done now and here: a dict with the keys FIELDS.

    `settings`: what was asked, a seed among it (any key with "seed" in it). `data`: the file of chats, or
    None; the card has its name, SHA-256, bytes, rows, and the rows that `read_chats` refuses, by reason.
    `figures`: what came out.

    Raises ValueError naming the key of what is not plain JSON, not finite or a path of this machine, and
    where there is no seed; what `read_chats` raises for the file. Chapter 13.
    """
    seeds = {key: value for key, value in settings.items() if "seed" in str(key).lower()}
    if not any(isinstance(seed, int) for seed in seeds.values()):
        raise ValueError(f"settings have no seed, so nobody could repeat the run; they have {list(settings)}")
    card = {
        "settings": settings,
        "seeds": seeds,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "data": None if data is None else _data(Path(data)),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": provenance()["device"],
        "figures": figures,
    }
    return _checked(card)


def save_run_card(folder: str | os.PathLike, card: dict) -> Path:
    """Write a card to run_card.json in a folder, whole or not at all; its path.

    Raises ValueError where it is no card, as `run_card` does; OSError where it cannot be written.
    """
    text = json.dumps(_checked(card), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{FILE}.") as partial:
        Path(partial, FILE).write_text(text, encoding="utf-8", newline="\n")
        os.replace(Path(partial, FILE), path)
    return path


def load_run_card(folder: str | os.PathLike) -> dict:
    """The card in a folder. Raises FileNotFoundError; ValueError where it is damaged or no card."""
    path = Path(folder) / FILE
    try:
        return _checked(json.loads(path.read_bytes().decode("utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no run card: {error}") from error


def _checked(card: object) -> dict:
    """A copy of a card, where it has the keys of one and holds what anyone may read; ValueError otherwise."""
    if not isinstance(card, dict) or set(card) != set(FIELDS):
        found = ", ".join(map(str, card)) if isinstance(card, dict) else repr(card)[:40]
        raise ValueError(f"a run card has {', '.join(FIELDS)}, got {found}")
    try:
        return {field: _plain(card[field], field) for field in FIELDS}
    except RecursionError as error:
        raise ValueError("a run card is nested too deeply, or holds itself") from error


def _plain(value: object, key: str) -> object:
    """A copy of plain JSON; ValueError with the key, such as figures.loss, of what is none or is private."""
    if isinstance(value, dict):
        for name in value:
            if not isinstance(name, str):
                raise ValueError(f"{key} has the key {name!r}, a {type(name).__name__}: keys are texts")
            _plain(name, key)
        return {name: _plain(part, f"{key}.{name}") for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, f"{key}[{number}]") for number, part in enumerate(value)]
    if isinstance(value, str) and (found := _private(value)):
        raise ValueError(f"{key} names {found!r}, a path of this machine: give the last part alone")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} is {value}, no finite number: leave it out, or write why as a text")
    if value is None or type(value) in (str, bool, int, float):
        return value
    raise ValueError(f"{key} is a {type(value).__name__}, not plain JSON: use .item(), .tolist() or str(...)")


def _private(text: str) -> str | None:
    """What in a text is a path of this machine, which mostly has its user's name, or None."""
    if os.path.isabs(text) and len(text) > 1:
        return text
    found = MACHINE_PATH.search(text)
    home = str(Path.home())
    return found[0] if found else home if len(home) > 1 and home in text else None


def _data(path: Path) -> dict:
    chats = read_chats(path)
    content = path.read_bytes()
    sizes = {"bytes": len(content), "rows": len(chats.rows), "refused": chats.reasons()}
    return {"name": path.name, "sha256": hashlib.sha256(content).hexdigest()} | sizes


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
