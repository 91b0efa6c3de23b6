"""Double quantization: the absmax of each block, 32 bits, stored in 8. Chapter 08.

The absmax values less their mean are quantized in groups with a second codebook, the dynamic map of
8 bits. QLoRA, section 3; the map is from Dettmers (2015, arXiv 1511.04561), as bitsandbytes has it.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from lora2qlora.blockwise import (
    BlockwiseQuantized,
    check_size,
    dequantize_blockwise,
    has_numbers,
    quantize_blockwise,
    table,
)
from lora2qlora.nf4 import NF4Weight


@dataclass(frozen=True, eq=False)
class QuantizedAbsmax:
    """Absmax values in 8 bits: `codes`, a `scale` a group, and the mean `offset` of them all."""

    codes: UInt8[Tensor, " blocks"]
    scales: Float32[Tensor, " groups"]
    offset: Float32[Tensor, ""]
    group_size: int

    @property
    def nbytes(self) -> int:
        """[bytes] of codes, scales and offset."""
        return self.codes.nbytes + self.scales.nbytes + self.offset.nbytes

    def dequantize(self) -> Float32[Tensor, " blocks"]:
        """The absmax values again."""
        return dequantize_absmax(self)

    def to(self, device) -> "QuantizedAbsmax":
        """The same values on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("codes", "scales", "offset")}
        return replace(self, **moved)


def dynamic_codebook() -> Float32[Tensor, "256"]:
    """The dynamic 8-bit map: seven decades, each with twice as many values as the one below it.

    Decade i = 0 … 6 is (0.1, 1] · 10^(i - 6), cut into 2^i equal parts, whose middles are the values; both
    signs, and 0, and 1 (but not -1): 256 values. Fine near zero in proportion, fine near one in steps.
    Equal bit for bit to bitsandbytes' `create_dynamic_map`. Dettmers (2015), section 2. Chapter 08.
    """
    positive = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        positive.append(10 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2)
    positive = torch.cat(positive)
    return torch.cat([-positive, positive.new_tensor([0.0, 1.0]), positive]).sort().values


with torch.device("cpu"):
    DYNAMIC_VALUES = tuple(dynamic_codebook().tolist())  # now, whatever modes are on when they are needed


def quantize_absmax(absmax: Float32[Tensor, " blocks"], group_size: int = 256) -> QuantizedAbsmax:
    """The absmax values less their mean, quantized in groups of `group_size` [blocks] with the dynamic map.

    The nearest code is taken. bitsandbytes' CPU kernel first rounds to one of 65,536 numbers evenly spaced
    from -1 to 1, so one code in some hundreds differs, where a value lies within 2^-16 of halfway between:
    by one step, or by a few next to 0. One block alone comes back exactly: it is the mean.

    Raises ValueError: not finite, negative, not a vector, so near float32's largest that it would come back
    as inf, group_size < 1; TypeError: not float32. QLoRA, section 3. Chapter 08.
    """
    if torch.compiler.is_compiling():
        return QuantizedAbsmax(*_quantize_whole(absmax.detach(), group_size), group_size)
    check_absmax(absmax, group_size)
    absmax = absmax.detach()
    offset = mean(absmax)
    q = quantize_blockwise(absmax - offset, table(DYNAMIC_VALUES, absmax), group_size)
    q = QuantizedAbsmax(q.indices, q.absmax, offset, group_size)
    check_comes_back(q, absmax)
    return q


def dequantize_absmax(q: QuantizedAbsmax) -> Float32[Tensor, " blocks"]:
    """s ≈ scale of its group · c[code] + offset, as float32. QLoRA, section 3. Chapter 08."""
    if torch.compiler.is_compiling():
        return _dequantize_whole(q.codes, q.scales, q.offset, q.group_size)
    groups = BlockwiseQuantized(q.codes, q.scales, q.codes.shape, torch.float32, q.group_size)
    return dequantize_blockwise(groups, table(DYNAMIC_VALUES, q.codes)) + q.offset


def double_quantize(q: NF4Weight, group_size: int = 256) -> NF4Weight:
    """The same weight, codes untouched, with its absmax quantized; ValueError if it is already."""
    if not isinstance(q.absmax, Tensor):
        raise ValueError("the absmax of this weight is quantized already")
    return replace(q, absmax=quantize_absmax(q.absmax, group_size))


def bits_per_parameter(block_size: int = 64, group_size: int | None = 256) -> float:
    """[bits] of NF4 storage for a parameter: 4 + 8 / b + 32 / (b g); without double quantization 4 + 32 / b.

    4.126953125 for b = 64, g = 256, and 4.5 where `group_size` is None. The tensor's one offset, 32 bits,
    is left out. QLoRA, section 3. Chapter 08.
    """
    check_size("block_size", block_size)
    if group_size is None:
        return 4 + 32 / block_size
    check_size("group_size", group_size)
    return 4 + 8 / block_size + 32 / (block_size * group_size)


def mean(absmax: Float32[Tensor, " blocks"]) -> Float32[Tensor, ""]:
    """The mean of absmax values in float32, of none 0; in float64 where their sum overflows."""
    if not len(absmax):
        return absmax.new_zeros(())
    narrow = absmax.mean()
    return torch.where(narrow.isfinite(), narrow, absmax.mean(dtype=torch.float64).float())


def check_absmax(absmax: Tensor, group_size: int) -> None:
    """Raise what `quantize_absmax` says it raises of its arguments."""
    if not isinstance(absmax, Tensor) or absmax.dtype != torch.float32:
        got = absmax.dtype if isinstance(absmax, Tensor) else type(absmax).__name__
        raise TypeError(f"absmax values are a float32 tensor, got {got}")
    check_size("group_size", group_size)
    possible = not has_numbers(absmax) or bool((absmax >= 0).all() and not absmax.isinf().any())
    if absmax.ndim != 1 or not possible:
        raise ValueError(
            f"absmax values are finite, not negative and a vector; got shape {list(absmax.shape)}"
        )


def check_comes_back(q: QuantizedAbsmax, absmax: Tensor) -> None:
    """ValueError where the codes of finite values stand for inf: a step up from near float32's largest."""
    if has_numbers(absmax) and not q.dequantize().isfinite().all():
        raise ValueError(
            f"absmax values up to {absmax.max().item()} would come back as inf from 8 bits: scale the "
            "weight down, or keep its absmax in 32 bits (double_quant=False)"
        )


# What torch.compile and torch.export record in the place of both functions.


@torch.library.custom_op("lora2qlora::quantize_absmax", mutates_args=())
def _quantize_whole(absmax: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    q = quantize_absmax(absmax, group_size)
    return q.codes, q.scales, q.offset


@_quantize_whole.register_fake
def _(absmax, group_size):
    check_size("group_size", group_size)
    scales = absmax.new_empty(-(-len(absmax) // group_size))
    return torch.empty_like(absmax, dtype=torch.uint8), scales, absmax.new_empty(())


@torch.library.custom_op("lora2qlora::dequantize_absmax", mutates_args=())
def _dequantize_whole(codes: Tensor, scales: Tensor, offset: Tensor, group_size: int) -> Tensor:
    return dequantize_absmax(QuantizedAbsmax(codes, scales, offset, group_size))


@_dequantize_whole.register_fake
def _(codes, scales, offset, group_size):
    return torch.empty_like(codes, dtype=torch.float32)
