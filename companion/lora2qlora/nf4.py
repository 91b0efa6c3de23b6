"""NF4, the 4-bit NormalFloat: its sixteen values derived, two codes packed in a byte. Chapter 07.

Weights are quantized in blocks by `blockwise`, piece by piece, so that the work needs little memory
beside its input and its output. Codes, bytes and results are bitsandbytes', bit for bit.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
from jaxtyping import Float, Float32, Float64, UInt8
from torch import Tensor

from lora2qlora.blockwise import check_input, quantize_blockwise, scale_blocks

OFFSET = 0.9677083  # the largest quantile taken: 1 - (1/32 + 1/30) / 2, to seven digits
ZERO = 7  # the code of 0
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

    def to(self, *arguments, **options) -> "NF4Weight":
        """The same weight on another device, as `Tensor.to`; the packed bytes never change their dtype."""
        device = torch.empty(0, device=self.packed.device).to(*arguments, **options).device
        return replace(self, packed=self.packed.to(device), absmax=self.absmax.to(device))


@cache
def _nf4_values() -> tuple[float, ...]:
    """The sixteen values: quantiles of N(0, 1) at 8 points for the positive half and 7 for the negative."""

    def quantiles(count):
        # float32 points, as in bitsandbytes: the last bits of the table hang on it
        points = torch.linspace(OFFSET, 0.5, count + 1, dtype=torch.float32)[:-1]
        return torch.special.ndtri(points.double())

    values = torch.cat([-quantiles(7), torch.zeros(1, dtype=torch.float64), quantiles(8).flip(0)]).float()
    return tuple((values / values.max()).tolist())


def nf4_codebook() -> Float32[Tensor, "16"]:
    """The sixteen values of NF4, ascending from -1 to 1: 7 negative, zero, 8 positive.

    Each half is made of quantiles of N(0, 1), Φ⁻¹ at evenly spaced points between ½ and the offset
    0.9677083, divided by the largest. Equal bit for bit to bitsandbytes'. The paper's equation 4 gives
    −∞ when taken literally. QLoRA, section 3 and appendix E. Chapter 07.
    """
    return torch.tensor(_nf4_values(), dtype=torch.float32)


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
    check_input(w, block_size)
    flat, codebook = w.detach().reshape(-1), nf4_codebook()
    packed = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-flat.numel() // block_size), dtype=torch.float32, device=w.device)
    step = _piece(block_size)
    for start in range(0, flat.numel(), step):
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
    flat, codebook = out.view(-1), nf4_codebook().to(out.device)
    step = _piece(q.block_size)
    for start in range(0, flat.numel(), step):
        piece = flat[start : start + step]
        codes = unpack(q.packed[start // 2 : (start + step) // 2], len(piece))
        values = codebook[codes.int()]
        piece.copy_(scale_blocks(values, absmax[start // q.block_size :], q.block_size))
    return out


def _piece(block_size: int) -> int:
    """About PIECE elements: a number of whole blocks, and even, so that pieces end on whole bytes."""
    return max(1, PIECE // (2 * block_size)) * 2 * block_size


def absmax_scaled_density(points: Float64[Tensor, " n"], block_size: int) -> Float64[Tensor, " n"]:
    """Density of w / s inside (-1, 1), for a block of `block_size` [elements] normal weights w, s = max |w|.

    The one element that is the absmax sits at -1 or 1 and is left out: what is left has the mass
    1 - 1 / block_size. Given s the others are normal, cut at ±s; s itself has the density of the largest
    of `block_size` absolute values, and the two are integrated over s. Yoshida (2023), section 3. Chapter 07.
    """
    normal = torch.distributions.Normal(0.0, 1.0)
    s = torch.linspace(0, 8, 801, dtype=torch.float64)[1:]
    inside = torch.special.erf(s / 2**0.5)  # P(|w| < s)
    density = block_size * inside ** (block_size - 1) * 2 * normal.log_prob(s).exp()  # of s
    cut = s * normal.log_prob(points[:, None] * s).exp() / inside  # of w / s, given s
    return (1 - 1 / block_size) * torch.trapezoid(density * cut, s, dim=1)


def fitted_codebook(block_size: int, power: int = 1) -> Float32[Tensor, "16"]:
    """Sixteen values that minimize the mean |error|^power of w / s, for normal weights in blocks of one size.

    -1, 0 and 1 stay among them, as in NF4. power=1 is the aim of AF4 (Yoshida 2023, arXiv 2306.06965),
    power=2 the least squares of Lloyd and Max. Found by Lloyd's iteration on `absmax_scaled_density`:
    each free value moves to the median (or mean) of its cell, and cells end halfway between values.

    Raises ValueError: another power, or a block size below 2. Chapter 07.
    """
    if power not in (1, 2):
        raise ValueError(f"power must be 1 (absolute error) or 2 (squared error), got {power!r}")
    if block_size < 2:
        raise ValueError(f"a block needs elements beside its absmax: block_size >= 2, got {block_size!r}")
    x = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    density = absmax_scaled_density(x, block_size)
    mass_below = torch.cat([x[:1] * 0, torch.cumulative_trapezoid(density, x)])
    moment_below = torch.cat([x[:1] * 0, torch.cumulative_trapezoid(density * x, x)])
    values = nf4_codebook().double()
    free = torch.tensor([i for i in range(1, 15) if i != ZERO])
    for _ in range(2000):
        edges = (values[:-1] + values[1:]) / 2
        mass = _interpolate(edges, x, mass_below)
        if power == 1:
            inner = _interpolate((mass[:-1] + mass[1:]) / 2, mass_below, x)
        else:
            inner = _interpolate(edges, x, moment_below).diff() / mass.diff()
        new = values.clone()
        new[free] = inner[free - 1]  # the cell of value i is the inner cell i - 1
        moved, values = (new - values).abs().max(), new
        if moved < 1e-9:
            break
    return values.float()


def _interpolate(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """y where x is `at`, on straight lines between the points of an ascending x."""
    right = torch.searchsorted(x, at).clamp(1, len(x) - 1)
    left = right - 1
    return torch.lerp(y[left], y[right], (at - x[left]) / (x[right] - x[left]))
