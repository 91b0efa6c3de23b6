"""LoRA+: a higher learning rate for B than for A. Chapter 18."""

from torch import nn

from lora2qlora.adapters import lora_layers


def lora_plus_groups(model: nn.Module, learning_rate: float, ratio: float = 16.0) -> list[dict]:
    """Two groups of parameters for an optimizer: the As at `learning_rate`, the Bs at `ratio` times it.

    What trains beside them, such as a head or DoRA's magnitudes, goes with A if it is a matrix and with B if
    it is a vector, as in PEFT. Nothing else about LoRA changes.

    Raises ValueError: a model without adapters, nothing that trains, a rate or a ratio that is not positive.
    Hayou and others 2024 (arXiv 2402.12354), section 4; 16 is their choice.
    """
    layers = lora_layers(model).values()
    training = [p for p in model.parameters() if p.requires_grad]
    if not layers or not training:
        raise ValueError(f"need adapters that train, got {len(layers)} and {len(training)} parameters")
    if not learning_rate > 0 or not ratio > 0:
        raise ValueError(f"need a rate and a ratio above 0, got {learning_rate!r:.40} and {ratio!r:.40}")
    second = {id(layer.lora_B) for layer in layers} | {id(p) for p in training if p.ndim == 1}
    return [
        {"params": [p for p in training if id(p) not in second], "lr": learning_rate},
        {"params": [p for p in training if id(p) in second], "lr": learning_rate * ratio},
    ]
