"""LoftQ: the adapter starts as the best correction of what quantizing took away. Chapter 18."""

import torch
from torch import nn

from lora2qlora.lora import LoRALinear
from lora2qlora.low_rank import truncated_svd
from lora2qlora.qlora import NF4Linear
from lora2qlora.qlora.checks import check_linear
from lora2qlora.variants.pissa import linear_with


@torch.no_grad()
def loftq(linear: nn.Linear, rank: int, alpha: float, iterations: int = 1, **options) -> LoRALinear:
    """A LoRALinear over NF4 whose sum s B A + Ŵ is near W; the given layer stays as it is.

    Starting from B A = 0, each iteration quantizes W - s B A and sets s B A to the best rank-r part of the
    error left in W. `options` are those of NF4Linear.from_linear. W has to be the weight before any rounding:
    if it already lies on NF4's grid, nothing is missing in the first iteration, and B A stays zero.

    Raises ValueError: iterations below 1, and as `pissa`; TypeError: not a plain nn.Linear. Li and others
    2023 (arXiv 2310.08659), algorithm 1. PEFT's version needs a GPU.
    """
    check_linear(linear)
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations!r:.40}")
    W, update = linear.weight.float(), 0.0
    for _ in range(iterations):
        remainder = linear_with(linear, (W - update).to(linear.weight.dtype))
        base = NF4Linear.from_linear(remainder, **options)
        layer = LoRALinear(base, rank, alpha)
        B, A = truncated_svd((W - base.dequantize(base.weight, torch.float32)) / layer.scaling, rank)
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)
        update = layer.delta_weight()
    return layer
