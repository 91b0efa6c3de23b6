"""Adapters: LoRA over a whole model, and files in PEFT's format. Chapters 04 and 15.

A directory holds `adapter_config.json` and `adapter_model.safetensors`; PEFT writes and reads the same.
"""

import copy
import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lora2qlora.lora import LoRALinear, check_adapter, is_linear, merge

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# The options of PEFT's adapter_config.json that load_adapter follows, and those that do not change what
# an adapter computes. Any other that is set is refused by name.
FOLLOWED = """peft_type r lora_alpha lora_dropout target_modules exclude_modules rank_pattern alpha_pattern
    use_rslora bias init_lora_weights""".split()
NEUTRAL = """task_type base_model_name_or_path revision inference_mode auto_mapping peft_version eva_config
    layers_pattern megatron_core qalora_group_size runtime_config ensure_weight_tying""".split()
# The initializations of A and B that leave the base weights as they were.
PLAIN_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters a model has and how many of them train; logical ones, not packed elements."""

    total: int
    trainable: int


def add_lora(
    model: nn.Module,
    targets: list[str] | str,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> list[str]:
    """Put a LoRALinear over every target of a model, in place, and freeze all but the adapters.

    `targets` are suffixes of names, such as ["q_proj", "v_proj"] or ["layers.0.mlp.up_proj"], or
    "all-linear". A candidate is any module with in_features and out_features, quantized ones included,
    but never the LM head, which often shares its weight with the embedding. A second call may adapt more.

    Returns the names replaced. Raises ValueError: a target that no candidate is named (the message lists
    the candidates), or what LoRALinear refuses; the model is unchanged then. LoRA, section 4.2. Chapter 04.
    """
    candidates = _candidates(model)
    if isinstance(targets, str) and targets != "all-linear":
        raise ValueError(f'targets must be a list of suffixes or "all-linear"; for one suffix pass ["{targets}"]')
    wanted = [".*"] if targets == "all-linear" else list(targets)
    names = [n for n in candidates if targets == "all-linear" or _is_named(n, wanted)]
    unmatched = [t for t in wanted if targets != "all-linear" and not any(_is_named(n, [t]) for n in names)]
    if unmatched or not names:
        endings = sorted({n if n.split(".")[-1].isdigit() else n.split(".")[-1] for n in candidates})
        raise ValueError(f"no linear layer to adapt is named {unmatched or targets}; candidates: {endings}")
    _put(model, {name: (rank, alpha) for name in names}, dropout, dtype)
    return names


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def remove_lora(model: nn.Module) -> list[str]:
    """Put the bases back in the place of their LoRALinears; returns the names. All stay frozen."""
    layers = lora_layers(model)
    for name, layer in layers.items():
        _replace(model, name, layer.base)
    return list(layers)


def merge_lora(model: nn.Module) -> nn.Module:
    """A copy of the model in which `merge` has turned each LoRALinear into a plain nn.Linear, frozen.

    Raises ValueError: the model carries no adapters; TypeError: an adapted base is quantized, for which
    the message of `merge` says what to call instead. Chapters 04 and 15.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model carries no adapters to merge: add_lora or load_adapter first")
    with _naming(layers) as at:
        merged = {id(layer): merge(layer) for name, layer in layers.items() if at(name)}
    return copy.deepcopy(model, merged)  # deepcopy takes what it finds in its memo, and copies the rest
