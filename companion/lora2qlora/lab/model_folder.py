"""Where a base model lies: what `from_pretrained` takes, for a short name, a Hub name or a folder."""

from __future__ import annotations

import os
from pathlib import Path

from .conversion import find_package_model
from .sources import model_source


def model_folder(name: str | os.PathLike) -> str:
    """What `AutoModelForCausalLM.from_pretrained` takes: the folder of a model, or its name on the Hub.

    `name` is a key of MODELS, of which the book's own is converted here if it was not yet; a folder with a
    model; or a Hub name owner/model. A folder of that name wins over the Hub, as it does in transformers.

    Raises KeyError for a name of another kind; FileNotFoundError for a path without a folder; OSError for
    a folder without config.json or weights, and where the book's model cannot be converted. Chapter 00.
    """
    if is_folder(name):
        return str(_whole(Path(name).expanduser()))
    source = model_source(name)
    return str(find_package_model(source) or source.hub)


def is_folder(name: str | os.PathLike) -> bool:
    """Whether a name is meant as a folder: a path by its form, or with a slash and there."""
    if isinstance(name, os.PathLike):
        return True
    if not isinstance(name, str) or not any(mark in name for mark in ("/", os.sep)):
        return False
    return name.startswith((".", "~")) or Path(name).is_absolute() or Path(name).is_dir()


def _whole(folder: Path) -> Path:
    """The folder, where it has what a model needs to load; OSError says what is missing."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: give one with a model's config.json and .safetensors")
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise OSError(f"{folder} holds an adapter and no model: load its base model, then the adapter")
        raise OSError(f"{folder} has no config.json: a model's folder has one, written by save_pretrained")
    if not any(file.is_file() for file in folder.glob("*.safetensors")):
        raise OSError(
            f"{folder} has a config.json and no .safetensors file: save the model there with save_pretrained "
            "(weights in a .bin file are a pickle, which can run code, and are not loaded)"
        )
    return folder
