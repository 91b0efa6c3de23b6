"""LoRA over a whole model: add, remove, count, merge. Chapters 04 and 15."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora2qlora.adapters.checks import check_model, independent_copy
from lora2qlora.adapters.names import above, all_names, naming, unwrapped
from lora2qlora.adapters.targets import find_targets, lora_layers
from lora2qlora.lora import LoRALinear, check_adapter, check_here, is_linear, merge


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
    "all-linear". A candidate is any module with in_features and out_features, quantized ones included, but
    never the LM head, which often shares its weight with the embedding. "all-linear" spares every other head
    too, as it is new and trains whole: name it to adapt it, or let its weight require gradients afterwards.
    A layer under several names stays one layer. A second call may adapt more.

    Returns the names replaced. Raises ValueError: a target that no candidate is named (the message lists
    them), a weight that the model multiplies with itself, an offloaded or sharded model, or what LoRALinear
    refuses; the model is unchanged then. LoRA, section 4.2. Chapter 04.
    """
    names = find_targets(model, targets)
    put_adapters(model, {name: (rank, alpha) for name in names}, dropout, dtype)
    return names


def remove_lora(model: nn.Module) -> list[str]:
    """Put the bases back in the place of their LoRALinears; returns the names. All stay frozen.

    Raises ValueError: a base that is offloaded.
    """
    layers = lora_layers(model)
    for name, layer in layers.items():
        naming(name, check_here, layer.base, *above(model, name))
    replace(model, {name: layer.base for name, layer in layers.items()})
    return list(layers)


def merge_lora(model: nn.Module) -> nn.Module:
    """A copy of the model in which `merge` has turned each LoRALinear into a plain nn.Linear, frozen.

    What wraps the whole model, such as torch.compile or DDP, is left out. Raises ValueError: the model
    carries no adapters, or a part whose copy would go on using the model; TypeError: an adapted base is
    quantized, for which the message of `merge` says what to call instead. Chapters 04 and 15.
    """
    model = unwrapped(model)
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model carries no adapters to merge: add_lora or load_adapter first")
    merged = {id(layer): naming(name, merge, layer) for name, layer in layers.items()}
    return independent_copy(model, merged)


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count a model's parameters, each once however often it is used, and those that train.

    A linear layer's weight counts in_features x out_features, however it is stored: packed 4-bit weights
    hold two in a byte. Works on models without data, made under torch.device("meta"). Raises ValueError: an
    offloaded model, in which weights that are one look like two. Chapters 04, 11.
    """
    check_here(model)
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
    tensors: dict[str, tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Check all, build all, fill A and B from `tensors`, freeze all but adapters, replace, in order."""
    bases = {name: model.get_submodule(name) for name in settings}
    for name, (rank, alpha) in settings.items():
        naming(name, check_adapter, bases[name], rank, alpha, dropout, dtype)
    check_model(model, bases)
    adapters = {id(p) for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)}
    training = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        layers = {name: LoRALinear(bases[name], *settings[name], dropout, dtype) for name in settings}
        for name, (A, B) in (tensors or {}).items():
            layers[name].lora_A.data.copy_(A)
            layers[name].lora_B.data.copy_(B)
        for parameter in training:
            parameter.requires_grad_(id(parameter) in adapters)
        replace(model, layers)
    except BaseException:  # out of memory, say, or interrupted: all as it was
        replace(model, bases)
        for parameter in training:
            parameter.requires_grad_(True)
        raise


def replace(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Put modules in the places that have these names, and wherever what stood there has other names too."""
    names = all_names(model)
    for name, layer in layers.items():
        for alias in names[id(model.get_submodule(name))]:
            model.set_submodule(alias, layer)
