"""A weight in NF4: two codes packed in a byte, an absmax a block. Chapter 07.

Weights are quantized in blocks by `blockwise`, piece by piece, so that the work needs little memory
beside its input and its output. Codes, bytes and results are bitsandbytes', bit for bit.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lora2qlora.blockwise import check_input, check_size, has_numbers, quantize_blockwise, scale_blocks, table
from lora2qlora.nf4.codebook import NF4_VALUES, ZERO, nf4_codebook

PIECE = 2**18  # elements worked on at a time


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A weight in NF4: `packed` [two codes a byte, the first in the high half] and an absmax a block.

    `absmax` is float32[ceil(N / block_size)], or anything that gives it by `.dequantize()`, as
    `double_quantization` makes. `shape` and `dtype` are the weight's before.
    """

    packed: UInt8[Tensor, " bytes"]
    absmax: Tensor
    shape: torch.Size
    dtype: torch.dtype
    block_size: int

    @property
    def nbytes(self) -> int:
        """[bytes] of the codes and of all constants kept for them."""
        return self.packed.nbytes + self.absmax.nbytes

    # What models ask of a layer's weight without its numbers.
    requires_grad, layout = False, torch.strided

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def to(self, *arguments, **options) -> "NF4Weight":
        """The same weight on another device, as `Tensor.to`; the packed bytes never change their dtype."""
        device = torch.empty(0, device=self.packed.device).to(*arguments, **options).device
        return replace(self, packed=self.packed.to(device), absmax=self.absmax.to(device))


def pack(indices: UInt8[Tensor, " N"]) -> UInt8[Tensor, " bytes"]:
    """Two 4-bit codes a byte, the first in the high half; an odd count ends with the code of zero."""
    if len(indices) % 2:
        indices = torch.cat([indices, indices.new_tensor([ZERO])])
    return (indices[::2] << 4) | indices[1::2]


def unpack(packed: UInt8[Tensor, " bytes"], count: int) -> UInt8[Tensor, " N"]:
    """The first `count` codes of packed bytes."""
    return torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:count]


def quantize_nf4(w: Float[Tensor, "..."], block_size: int = 64) -> NF4Weight:
    """A weight of any shape in NF4, by the rule of `quantize_blockwise`, two codes packed in a byte.

    `packed` uint8[ceil(N / 2)] and `absmax` float32[ceil(N / block_size)] equal those of bitsandbytes 0.50
    on a CPU at all its block sizes; ours may be any other too. One exception: for a *partial* last block
    whose absmax is below 1e-38, bitsandbytes stores 1e-38. At bitsandbytes' block sizes a contiguous weight
    takes at most 4 MB of memory beside input and output; any other is copied first.

    Raises ValueError: numbers that are not finite (how many, and where the first), block_size < 1;
    TypeError: not a tensor of float32, bfloat16 or float16. QLoRA, section 3. Chapter 07.
    """
    if torch.compiler.is_compiling():
        return NF4Weight(*_quantize_whole(w.detach(), block_size), w.shape, w.dtype, block_size)
    check_input(w, block_size)
    flat, codebook = w.detach().reshape(-1), nf4_codebook()
    packed = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-flat.numel() // block_size), dtype=torch.float32, device=w.device)
    step = _piece(block_size)
    for start in _starts(flat, step):
        q = quantize_blockwise(flat[start : start + step], codebook, block_size)
        packed[start // 2 : (start + step) // 2] = pack(q.indices)
        absmax[start // block_size : (start + step) // block_size] = q.absmax
    return NF4Weight(packed, absmax, w.shape, w.dtype, block_size)


def dequantize_nf4(
    q: NF4Weight, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Float[Tensor, "..."]:
    """ŵᵢ = sⱼ · c[qᵢ] in the weight's shape, multiplied in float32 and rounded once to `dtype`.

    `dtype` is the weight's own unless given. `out` is a contiguous buffer of this shape to write into
    and return, and then gives the dtype. bitsandbytes 0.50 on AVX-512 CPUs is wrong where there are several
    rows, of a length that is a multiple of 16 but not of the block size, if that is below 2048; this is not.

    Raises ValueError: `out` does not fit; TypeError: `dtype` is not a float. Chapter 07.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.packed.device)
    fits = out.shape == q.shape and out.is_contiguous() and out.device == q.packed.device
    if not fits or dtype not in (None, out.dtype):
        raise ValueError(
            f"out must be contiguous, of shape {list(q.shape)}, dtype {dtype or out.dtype} and on "
            f"{q.packed.device}; got {list(out.shape)}, strides {out.stride()}, {out.dtype}, {out.device}"
        )
    if not out.is_floating_point():
        raise TypeError(f"NF4 dequantizes to a float dtype, got {out.dtype}")
    absmax = q.absmax if isinstance(q.absmax, Tensor) else q.absmax.dequantize()
    if torch.compiler.is_compiling():
        _dequantize_whole(q.packed, absmax, q.block_size, out)
        return out
    flat, codebook = out.view(-1), table(NF4_VALUES, out)
    step = _piece(q.block_size)
    for start in _starts(flat, step):
        piece = flat[start : start + step]
        codes = unpack(q.packed[start // 2 : (start + step) // 2], len(piece))
        values = codebook[codes.int()]
        piece.copy_(scale_blocks(values, absmax[start // q.block_size :], q.block_size))
    return out


# What torch.compile and torch.export record in the place of the loops, which they would unroll.


@torch.library.custom_op("lora2qlora::quantize_nf4", mutates_args=())
def _quantize_whole(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    q = quantize_nf4(w, block_size)
    return q.packed, q.absmax


@_quantize_whole.register_fake
def _(w, block_size):
    check_size("block_size", block_size)
    packed = w.new_empty(-(-w.numel() // 2), dtype=torch.uint8)
    return packed, w.new_empty(-(-w.numel() // block_size), dtype=torch.float32)


@torch.library.custom_op("lora2qlora::dequantize_nf4", mutates_args={"out"})
def _dequantize_whole(packed: Tensor, absmax: Tensor, block_size: int, out: Tensor) -> None:
    dequantize_nf4(NF4Weight(packed, absmax, out.shape, out.dtype, block_size), out=out)


def _starts(flat: Tensor, step: int) -> range:
    """Where pieces begin. Without numbers two will do: shapes, and the most memory, are known then."""
    return range(0, flat.numel() if has_numbers(flat) else min(flat.numel(), 2 * step), step)


def _piece(block_size: int) -> int:
    """About PIECE elements: a number of whole blocks, and even, so that pieces end on whole bytes."""
    return max(1, PIECE // (2 * block_size)) * 2 * block_size
