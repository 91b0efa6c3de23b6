"""PiSSA: training starts in the strongest directions of the weight, the rest is frozen. Chapter 18."""

import torch
from torch import nn

from lora2qlora.lora import LoRALinear
from lora2qlora.low_rank import truncated_svd
from lora2qlora.qlora.checks import check_linear


@torch.no_grad()
def pissa(linear: nn.Linear, rank: int, alpha: float) -> LoRALinear:
    """A LoRALinear that starts with s B A = the best rank-r part of W, over a new base that holds the rest.

    Up to one rounding to W's dtype it starts out equal to the given layer, which is left unchanged. Quantize
    the new base, and only the rest is rounded: that is QPiSSA. The adapter makes no sense over W: before
    you save it for use with the published model, turn it into a plain adapter with `as_plain_lora`.

    Raises ValueError: as LoRALinear, a weight that is quantized already or not finite; TypeError: not a plain
    nn.Linear. Meng, Wang and Zhang 2024 (arXiv 2404.02948), equations 2 to 4.
    """
    check_linear(linear)
    layer = LoRALinear(linear_with(linear, linear.weight.clone()), rank, alpha)
    B, A = truncated_svd(linear.weight / layer.scaling, rank)
    layer.lora_A.copy_(A)
    layer.lora_B.copy_(B)
    layer.base.weight.sub_(layer.delta_weight())
    return layer


@torch.no_grad()
def as_plain_lora(layer: LoRALinear, start: LoRALinear, linear: nn.Linear) -> LoRALinear:
    """The same update as a plain adapter of rank 2 r over the layer that `pissa` was given.

    `start` is a copy of the layer from before training. s B A - s B' A' is s [B, -B'] [A; A'], so twice the
    rank says it without a loss, unless the base was quantized in between. PiSSA, section 3 and appendix C.

    Raises ValueError: two layers of different shape, rank or alpha.
    """
    if (layer.lora_A.shape, layer.lora_B.shape, layer.alpha) != (
        start.lora_A.shape,
        start.lora_B.shape,
        start.alpha,
    ):
        raise ValueError(f"the layer is {layer}, its start was {start}: pass a copy from before training")
    made = LoRALinear(linear, 2 * layer.rank, 2 * layer.alpha, dtype=layer.lora_A.dtype)
    made.lora_A.copy_(torch.cat([layer.lora_A, start.lora_A]))
    made.lora_B.copy_(torch.cat([layer.lora_B, -start.lora_B], dim=1))
    return made


def linear_with(linear: nn.Linear, weight: torch.Tensor) -> nn.Linear:
    """A frozen nn.Linear with another weight and the given layer's bias and mode."""
    made = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    return made.train(linear.training)
