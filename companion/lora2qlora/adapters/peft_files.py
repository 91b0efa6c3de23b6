"""An adapter's two files as PEFT has them, a config and a safetensors file, written and read. Chapter 04."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lora2qlora.adapters.folder import locked, replacing
from lora2qlora.adapters.model import put_adapters
from lora2qlora.adapters.names import bare_name, naming
from lora2qlora.adapters.peft_config import CONFIG, read_config, read_settings, write_config
from lora2qlora.adapters.targets import lora_layers
from lora2qlora.lora import FLOATS, LoRALinear, is_plain_lora

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"


def save_adapter(model: nn.Module, directory: str | os.PathLike) -> None:
    """Write a model's adapters to a directory, in PEFT's format; other files there stay as they are.

    Names are those of the bare model, whatever wraps it. Two who write wait for one another. All is written
    under another name first. The last steps are renames, during which the directory holds no config and hence
    no adapter: a reader finds the old one, the new one or none, never a mix.

    Raises ValueError: the model carries no adapters, they are offloaded or sharded, or they differ in
    dropout, of which the format holds one; OSError: a full disk, with the old adapter still there. The real
    libraries also write a README.md, and the path of a base that has no name on the Hub. Chapter 04.
    """
    layers = {bare_name(model, name): layer for name, layer in lora_layers(model).items()}
    if not layers:
        raise ValueError("the model carries no adapters to save: add_lora or load_adapter first")
    config = json.dumps(write_config(model, layers), indent=2, sort_keys=True)
    tensors = {}
    for name, layer in layers.items():
        naming(name, check_whole, layer)
        for key, weight in zip(adapter_keys(name), (layer.lora_A, layer.lora_B), strict=True):
            tensors[key] = weight.detach().cpu().contiguous()
    with replacing(Path(directory), (CONFIG, WEIGHTS)) as partial:
        Path(partial, WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
        Path(partial, CONFIG).write_text(config, encoding="utf-8")


def load_adapter(
    model: nn.Module, directory: str | os.PathLike, dtype: torch.dtype = torch.float32
) -> list[str]:
    """Put the adapter that `save_adapter` or PEFT saved over a model, in place, ready to train further.

    Follows PEFT's targets, per-module ranks and alphas, and rsLoRA's scaling, which becomes α √r over r.
    Returns the names replaced. On any error the model is as it was before.

    Raises FileNotFoundError: no adapter there; ValueError: options that change what LoRA computes, such as
    DoRA (named), entries of a wrong type, a pickle, a damaged file, numbers that are not finite, adapters on
    the model already, or a model that add_lora refuses; KeyError: missing, extra or mis-shaped keys, as an
    adapter for another model has. Chapter 04.
    """
    if lora_layers(model):
        raise ValueError("the model carries adapters already: remove_lora, or merge_lora, first")
    config, weights = read_files(Path(directory))
    settings = read_settings(model, config)
    keys = {name: adapter_keys(bare_name(model, name)) for name in settings}
    expected = {}
    for name, (rank, _) in settings.items():
        base = model.get_submodule(name)
        expected |= zip(keys[name], ((rank, base.in_features), (base.out_features, rank)), strict=True)
    check_keys(Path(directory, WEIGHTS), weights, expected, dtype)
    tensors = {name: (weights[A], weights[B]) for name, (A, B) in keys.items()}
    put_adapters(model, settings, config.get("lora_dropout") or 0.0, dtype, tensors)
    return list(settings)


def adapter_keys(name: str) -> tuple[str, str]:
    """PEFT's keys for the A and the B of one module."""
    return f"base_model.model.{name}.lora_A.weight", f"base_model.model.{name}.lora_B.weight"


def check_whole(layer: LoRALinear) -> None:
    """ValueError unless A and B are all that the layer trains, and their numbers are here."""
    if not is_plain_lora(layer):
        raise ValueError(
            f"a {type(layer).__name__} trains more than A and B, which these files do not hold: merge it, or "
            "save the tensors that train with safetensors"
        )
    for weight, shape in (
        (layer.lora_A, (layer.rank, layer.in_features)),
        (layer.lora_B, (layer.out_features, layer.rank)),
    ):
        if weight.is_meta or hasattr(weight, "device_mesh") or tuple(weight.shape) != shape:
            raise ValueError(
                f"its adapter is offloaded or sharded, {list(weight.shape)} of {list(shape)} on "
                f"{weight.device}: gather it first (accelerate's hooks go by remove_hook_from_submodules)"
            )


def read_files(directory: Path) -> tuple[dict, dict[str, Tensor]]:
    """Config and weights, of one and the same save."""
    if not directory.is_dir():
        return read_config(directory), {}  # says that it is not there
    with locked(directory, alone=False):
        return read_config(directory), _read_weights(directory)


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
    except OSError:
        raise
    except Exception as error:  # a header may name what torch has not, or sizes that no memory has
        said = f"{type(error).__name__}: {error!s:.200}"
        raise ValueError(f"{path} is truncated or not a safetensors file ({said}): get it again") from error


def check_keys(
    path: Path, tensors: dict[str, Tensor], expected: dict[str, tuple[int, int]], dtype: torch.dtype
) -> None:
    """KeyError unless the file holds exactly the expected keys, with the expected shapes, as floats.

    ValueError where one of the numbers is not finite as a `dtype`.
    """
    both = sorted(expected.keys() & tensors.keys())
    wrong = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "extra": sorted(tensors.keys() - expected.keys()),
        "mis-shaped": [
            f"{key} {tensors[key].dtype} {list(tensors[key].shape)}, here float {list(expected[key])}"
            for key in both
            if tuple(tensors[key].shape) != expected[key] or tensors[key].dtype not in FLOATS
        ],
    }
    found = [f"{len(keys)} {what}: {'; '.join(keys[:4])}" for what, keys in wrong.items() if keys]
    if found:
        raise KeyError(f"{path} does not fit this model, it may be for another. " + ". ".join(found))
    for key in both if dtype in FLOATS else ():
        if not tensors[key].to(dtype).isfinite().all():
            raise ValueError(
                f"{path}: {key} holds numbers that are not finite as {dtype}: get another adapter"
            )
