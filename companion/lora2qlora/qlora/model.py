"""Every linear layer of a model's base in NF4. Chapter 10."""

import torch
from torch import nn

from lora2qlora.adapters import find_targets, lora_layers, naming
from lora2qlora.qlora.layer import NF4Linear, check_linear


def quantize_base(
    model: nn.Module,
    targets: list[str] | str = "all-linear",
    double_quant: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
    block_size: int = 64,
) -> list[str]:
    """Put an NF4Linear in the place of every target of a model, one at a time; returns the names.

    `targets` means what it means to `add_lora`; embeddings, norms and the LM head stay. All weights are
    checked before the first is replaced; a layer with several names stays one layer. Quantize first, then
    adapt: QLoRA is `add_lora` on the result. Chapter 10.

    Raises ValueError: adapters on the model, no such target, or one that is quantized already, has hooks or
    numbers that are not finite; TypeError: one without a plain float weight. The model is unchanged then.
    """
    if lora_layers(model):
        raise ValueError("the model carries adapters already: quantize its base first, then add_lora")
    names = find_targets(model, targets)
    for name in names:
        naming(name, check_linear, model.get_submodule(name), block_size)
    for name in names:
        linear = model.get_submodule(name)
        layer = NF4Linear.from_linear(linear, block_size, double_quant, compute_dtype)
        for alias in [n for n, m in model.named_modules(remove_duplicate=False) if m is linear]:
            model.set_submodule(alias, layer)
    return names
