"""The numbers of an adapter's folder, checked against the model that it is for. Chapter 16."""

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from lora2qlora.adapters.names import bare_name
from lora2qlora.adapters.peft_config import read_settings
from lora2qlora.adapters.peft_files import WEIGHTS, adapter_keys, check_keys, read_files


def read_adapter(
    model: nn.Module, directory: str | os.PathLike
) -> dict[str, tuple[int, float, Tensor, Tensor]]:
    """Rank, alpha (r times the scaling, for rsLoRA too), A and B in float32, by module of the model.

    The model may be on the meta device: its names and shapes are asked alone. Raises ValueError: what
    `load_adapter` refuses, an adapter for another model among it; FileNotFoundError: no adapter there.
    """
    config, weights = read_files(Path(directory))
    settings = read_settings(model, config)
    keys, expected = {name: adapter_keys(bare_name(model, name)) for name in settings}, {}
    for name, (rank, _) in settings.items():
        layer = model.get_submodule(name)
        shapes = (rank, layer.in_features), (layer.out_features, rank)
        expected |= zip(keys[name], shapes, strict=True)
    try:
        check_keys(Path(directory, WEIGHTS), weights, expected, torch.float32)
    except KeyError as error:
        raise ValueError(error.args[0]) from error
    return {
        name: (rank, alpha, *(weights[key].float() for key in keys[name]))
        for name, (rank, alpha) in settings.items()
    }
