"""One step of AdamW, in 32 bits and on states in 8 bits, and the codebook of the second moment."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from lora2qlora.blockwise import BlockwiseQuantized, dequantize_blockwise, quantize_blockwise

PIECE = 2**16  # elements worked on at a time: their states in 32 bits stay in a processor's cache


def unsigned_dynamic_codebook() -> Float32[Tensor, "256"]:
    """The dynamic map without signs, for the second moment: seven decades, and 0, and 1.

    Decade i = 0 … 6 is (0.1, 1] · 10^(i - 6), cut into 2^(i + 1) equal parts, whose middles are the values:
    twice as many in each as `dynamic_codebook` has on one side. Equal bit for bit to bitsandbytes'
    `create_dynamic_map(signed=False)`. Dettmers et al. (2021, arXiv 2110.02861), section 2. Chapter 12.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32)]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + 1) + 1, dtype=torch.float32)
        values.append(10 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2)
    return torch.cat(values).sort().values


def adam_step(
    x: Float32[Tensor, " n"],
    grad: Float32[Tensor, " n"],
    m: Float32[Tensor, " n"],
    v: Float32[Tensor, " n"],
    step: int,
    group: dict,
) -> None:
    """One step of AdamW in place, of x, m and v, all in 32 bits; `step` t counts from 1.

    m ← β₁ m + (1 - β₁) g and v ← β₂ v + (1 - β₂) g², then x ← (1 - η λ) x and
    x ← x - η / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε)

    `group` holds lr η, betas, eps ε, weight_decay λ, as torch's optimizers keep them. Chapter 12.
    """
    lr, (beta1, beta2) = group["lr"], group["betas"]
    m.mul_(beta1).add_(grad, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    if group["weight_decay"]:
        x.mul_(1 - lr * group["weight_decay"])
    denominator = (v.sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
    x.addcdiv_(m, denominator, value=-lr / (1 - beta1**step))


def adam_step_8bit(
    x: Float[Tensor, " n"],
    grad: Float[Tensor, " n"],
    m: BlockwiseQuantized,
    v: BlockwiseQuantized,
    step: int,
    group: dict,
    codebooks: tuple[Tensor, Tensor],
    quantize: Callable[..., BlockwiseQuantized] = quantize_blockwise,
) -> None:
    """`adam_step` on states in 8 bits, in place: read them back, step, round them again, piece by piece.

    x is used before the states are rounded, so the rounding shows from the next step on. `quantize` has the
    signature of `quantize_blockwise`. Besides x and the states it needs a few pieces of memory. Chapter 12.
    """
    size = m.block_size
    length = max(1, PIECE // size) * size  # of a piece: whole blocks
    for start in range(0, len(x), length):
        piece, blocks = slice(start, start + length), slice(start // size, (start + length) // size)
        parts = [
            BlockwiseQuantized(q.indices[piece], q.absmax[blocks], x[piece].shape, torch.float32, size)
            for q in (m, v)
        ]
        moments = [dequantize_blockwise(q, code) for q, code in zip(parts, codebooks, strict=True)]
        values = x[piece].float()  # x itself where it is float32
        adam_step(values, grad[piece].float(), *moments, step, group)
        x[piece] = values
        for part, moment, codebook in zip(parts, moments, codebooks, strict=True):
            q = quantize(moment, codebook, size)
            part.indices.copy_(q.indices)
            part.absmax.copy_(q.absmax)
