"""LoRA over a whole model: add, remove, count, merge. Chapters 04 and 15."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora2qlora.adapters.targets import find_targets, lora_layers
from lora2qlora.lora import LoRALinear, check_adapter, is_linear, merge


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
    names = find_targets(model, targets)
    put_adapters(model, {name: (rank, alpha) for name in names}, dropout, dtype)
    return names


def remove_lora(model: nn.Module) -> list[str]:
    """Put the bases back in the place of their LoRALinears; returns the names. All stay frozen."""
    layers = lora_layers(model)
    for name, layer in layers.items():
        model.set_submodule(name, layer.base)
    return list(layers)


def merge_lora(model: nn.Module) -> nn.Module:
    """A copy of the model in which `merge` has turned each LoRALinear into a plain nn.Linear, frozen.

    Raises ValueError: the model carries no adapters; TypeError: an adapted base is quantized, for which
    the message of `merge` says what to call instead. Chapters 04 and 15.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model carries no adapters to merge: add_lora or load_adapter first")
    merged = {id(layer): naming(name, merge, layer) for name, layer in layers.items()}
    return copy.deepcopy(model, merged)  # deepcopy takes what stands in its memo, and copies the rest


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count a model's parameters, each once however often it is used, and those that train.

    A linear layer's weight counts in_features x out_features, however it is stored: packed 4-bit weights
    hold two in a byte. Works on models without data, made under torch.device("meta"). Chapters 04, 11.
    """
    total = trainable = 0
    seen = set()
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        is_plain_linear = is_linear(module) and not isinstance(module, LoRALinear)
        logical = module.in_features * module.out_features if is_plain_linear else 0
        if is_plain_linear and not isinstance(getattr(module, "weight", None), Tensor):
            total += logical  # packed in buffers, or an object of its own
        for name, parameter in own.items():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            size = logical if is_plain_linear and name == "weight" else parameter.numel()
            total += size
            trainable += size * parameter.requires_grad
    return ParameterCount(total, trainable)


def put_adapters(
    model: nn.Module,
    settings: dict[str, tuple[int, float]],
    dropout: float,
    dtype: torch.dtype,
    tensors: dict[str, Tensor] | None = None,
) -> None:
    """Check all, build all, fill A and B from `tensors`, freeze all but adapters, replace, in order."""
    bases = {name: model.get_submodule(name) for name in settings}
    for name, (rank, alpha) in settings.items():
        naming(name, check_adapter, bases[name], rank, alpha, dropout, dtype)
    layers = {name: LoRALinear(bases[name], *settings[name], dropout, dtype) for name in settings}
    if tensors is not None:
        for name, layer in layers.items():
            for key, weight in zip(adapter_keys(name), (layer.lora_A, layer.lora_B), strict=True):
                weight.data.copy_(tensors[key])
    adapters = {id(p) for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in adapters)
    for name, layer in layers.items():
        model.set_submodule(name, layer)


def naming(name: str, function, *arguments):
    """Call the function; what it raises names the module that it was about."""
    try:
        return function(*arguments)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def adapter_keys(name: str) -> tuple[str, str]:
    """PEFT's keys for the A and the B of one module."""
    return f"base_model.model.{name}.lora_A.weight", f"base_model.model.{name}.lora_B.weight"
