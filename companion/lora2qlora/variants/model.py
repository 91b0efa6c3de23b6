"""A whole model adapted by any of the variants. Chapter 18."""

from collections.abc import Callable

from torch import nn

from lora2qlora.adapters import find_targets, lora_layers, naming
from lora2qlora.adapters.checks import check_model
from lora2qlora.adapters.model import replace
from lora2qlora.lora import LoRALinear


def adapt(
    model: nn.Module, targets: list[str] | str, make: Callable[[nn.Module], LoRALinear]
) -> dict[str, LoRALinear]:
    """Put make(layer) in the place of every target of a model, and freeze all but what these layers train.

    `targets` means what it means to `add_lora`; `make` is one of the variants with its settings, such as
    `lambda linear: pissa(linear, rank=8, alpha=16)`. All layers are made before the first is replaced.
    Returns them by name.

    Raises ValueError: adapters on the model already, no such target, a model that `add_lora` refuses, and
    what `make` raises, with the layer's name; the model is unchanged then.
    """
    if lora_layers(model):
        raise ValueError("the model carries adapters already: remove_lora, or merge_lora, first")
    bases = {name: model.get_submodule(name) for name in find_targets(model, targets)}
    check_model(model, bases)
    training = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        layers = {name: naming(name, make, base) for name, base in bases.items()}
        for parameter in training:
            parameter.requires_grad_(False)
        replace(model, layers)
    except BaseException:  # a layer that is refused, or interrupted: all as it was
        replace(model, bases)
        for parameter in training:
            parameter.requires_grad_(True)
        raise
    return layers
