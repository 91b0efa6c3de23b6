"""An adapter's two files as PEFT has them, a config and a safetensors file, written and read. Chapter 04."""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lora2qlora.adapters.model import adapter_keys, put_adapters
from lora2qlora.adapters.peft_config import CONFIG, read_config, read_settings, write_config
from lora2qlora.adapters.targets import lora_layers

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"


def save_adapter(model: nn.Module, directory: str | os.PathLike) -> None:
    """Write a model's adapters to a directory, in PEFT's format; other files there stay as they are.

    All is written under another name first. The last three steps are renames, during which the directory
    holds no config and hence no adapter: a reader finds the old one, the new one or none, never a mix.

    Raises ValueError: the model carries no adapters, or they differ in dropout, of which the format
    holds one. The real libraries also write a README.md, and the path of a base that has no name on the
    Hub. Chapter 04.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped; its names are the file's
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model carries no adapters to save: add_lora or load_adapter first")
    config = json.dumps(write_config(model, layers), indent=2, sort_keys=True)
    tensors = {}
    for name, layer in layers.items():
        for key, weight in zip(adapter_keys(name), (layer.lora_A, layer.lora_B), strict=True):
            tensors[key] = weight.detach().cpu().contiguous()
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".writing-", dir=directory) as partial:
        Path(partial, WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
        Path(partial, CONFIG).write_text(config, encoding="utf-8")
        Path(directory, CONFIG).unlink(missing_ok=True)
        os.replace(Path(partial, WEIGHTS), directory / WEIGHTS)
        os.replace(Path(partial, CONFIG), directory / CONFIG)


def load_adapter(
    model: nn.Module, directory: str | os.PathLike, dtype: torch.dtype = torch.float32
) -> list[str]:
    """Put the adapter that `save_adapter` or PEFT saved over a model, in place, ready to train further.

    Follows PEFT's targets, per-module ranks and alphas, and rsLoRA's scaling, which becomes α √r over r.
    Returns the names replaced. On any error the model is as it was before.

    Raises FileNotFoundError: no adapter there; ValueError: options that change what LoRA computes, such as
    DoRA (named), a pickle, a damaged file, or adapters on the model already; KeyError: missing, extra or
    mis-shaped keys, as an adapter for another model has. Chapter 04.
    """
    if lora_layers(model):
        raise ValueError("the model carries adapters already: remove_lora, or merge_lora, first")
    directory = Path(directory)
    config = read_config(directory)
    settings = read_settings(model, config)
    tensors = _read_weights(directory)
    expected = {}
    for name, (rank, _) in settings.items():
        base = model.get_submodule(name)
        expected |= zip(
            adapter_keys(name), ((rank, base.in_features), (base.out_features, rank)), strict=True
        )
    _check_keys(directory / WEIGHTS, tensors, expected)
    put_adapters(model, settings, config.get("lora_dropout") or 0.0, dtype, tensors)
    return list(settings)


def _read_weights(directory: Path) -> dict[str, Tensor]:
    """The tensors of adapter_model.safetensors on the CPU; never a pickle."""
    path = directory / WEIGHTS
    if not path.is_file() and (directory / PICKLE).is_file():
        raise ValueError(
            f"{directory} holds {PICKLE}, a pickle, which can run code when it is read: "
            f"load it with PEFT if you trust it, and save it again as {WEIGHTS}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no {WEIGHTS} in {directory}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}): get it again") from error


def _check_keys(path: Path, tensors: dict[str, Tensor], expected: dict[str, tuple[int, int]]) -> None:
    """KeyError unless the file holds exactly the expected keys, with the expected shapes, as floats."""
    both = sorted(expected.keys() & tensors.keys())
    wrong = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "extra": sorted(tensors.keys() - expected.keys()),
        "mis-shaped": [
            f"{key} {tensors[key].dtype} {list(tensors[key].shape)}, here float {list(expected[key])}"
            for key in both
            if tuple(tensors[key].shape) != expected[key] or not tensors[key].is_floating_point()
        ],
    }
    found = [f"{len(keys)} {what}: {'; '.join(keys[:4])}" for what, keys in wrong.items() if keys]
    if found:
        raise KeyError(f"{path} does not fit this model, it may be for another. " + ". ".join(found))
