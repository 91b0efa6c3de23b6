"""Which linear layers of a model are adapted: PEFT's rules for names. Chapter 04."""

import re

from torch import nn

from lora2qlora.lora import LoRALinear, is_linear


def find_targets(model: nn.Module, targets: list[str] | str) -> list[str]:
    """The names of the linear layers that `targets` means, by the rule of `add_lora`; ValueError as there."""
    candidates = adaptable(model)
    if targets == "all-linear":
        targets = list(candidates)
    elif isinstance(targets, str):
        raise ValueError(f'targets must be a list of suffixes or "all-linear"; pass ["{targets}"] for one')
    unmatched = [target for target in targets if not any(is_target(name, [target]) for name in candidates)]
    if unmatched or not targets:
        raise ValueError(no_target(unmatched, candidates))
    return [name for name in candidates if is_target(name, targets)]


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers that can be adapted, by name: not the LM head, nor what is adapted already."""
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise ValueError("the model carries PEFT's own adapters: pass the base model that PEFT was given")
    get_heads = [getattr(module, "get_output_embeddings", lambda: None) for module in model.modules()]
    heads = {id(get_head()) for get_head in get_heads}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name: module
        for name, module in modules(model).items()
        if is_linear(module)
        and not isinstance(module, LoRALinear)
        and id(module) not in heads
        and id(getattr(module, "weight", None)) not in embeddings
    }


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules below the model by name, as if it carried no adapters: without the insides of those."""
    inside = tuple(f"{name}." for name in lora_layers(model))
    return {name: m for name, m in model.named_modules() if name and not name.startswith(inside)}


def is_target(name: str, targets: list[str] | str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name, a list holds names or suffixes."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def no_target(wanted: list[str] | str, candidates: dict[str, nn.Module]) -> str:
    """What to say when nothing is named as wanted: the candidates, by the last part of their names."""
    last = {name if name.split(".")[-1].isdigit() else name.split(".")[-1] for name in candidates}
    return f"no linear layer to adapt is named {wanted}; the candidates are {sorted(last)}"
