"""Block-wise quantization: one scale for each block of numbers, and any codebook. Chapter 06.

A block is divided by its absmax, which brings it into [-1, 1], and each number is replaced by the index
of the nearest value of a codebook. A codebook is a float32 tensor, ascending, within [-1, 1].

Left out: packing several indices into a byte (`nf4` does it) and speed (`fast`).
"""

import itertools
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TINY = 1e-38  # the least that a block is divided by, bitsandbytes' too; float32's smallest normal is 1.18e-38


@dataclass(frozen=True, eq=False)
class BlockwiseQuantized:
    """`indices` into a codebook and the `absmax` of each block, with what is needed to undo it."""

    indices: UInt8[Tensor, " N"]
    absmax: Float32[Tensor, " blocks"]
    shape: torch.Size
    dtype: torch.dtype
    block_size: int


def quantize_blockwise(
    x: Float[Tensor, "..."], codebook: Float32[Tensor, " codes"], block_size: int = 64
) -> BlockwiseQuantized:
    """qᵢ = the index of the codebook's value nearest to wᵢ / sⱼ, with sⱼ = max |w| over block j.

    Blocks are `block_size` [elements] in a row of the flattened tensor; the last may be partial. The rule,
    bit for bit that of bitsandbytes' 4-bit routine on a CPU: in float32, multiply a whole block by
    1 / max(sⱼ, 1e-38), divide a partial one by the same; on the midpoint of two values, rounded to float32,
    take the lower. So a block of zeros is all code of 0, -0.0 becomes 0, and where sⱼ < 1e-38 it is coarse.

    Returns `indices` uint8[N] and `absmax` float32[ceil(N / block_size)] of any shape, empty ones too.
    Raises ValueError: a number that is not finite (how many, and where the first), a bad block size or
    codebook; TypeError: not a tensor of float32, bfloat16 or float16. QLoRA, section 2. Chapter 06.
    """
    check_input(x, block_size)
    check_codebook(codebook)
    flat = x.detach().reshape(-1)
    boundaries = (codebook[:-1] + codebook[1:]).to(flat.device) / 2
    whole = flat.numel() // block_size * block_size
    blocks, rest = flat[:whole].view(-1, block_size).float(), flat[whole:].float()
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1 / absmax.clamp(min=TINY))[:, None]).view(-1)
    if len(rest):
        last = rest.abs().max()
        absmax, scaled = torch.cat([absmax, last[None]]), torch.cat([scaled, rest / last.clamp(min=TINY)])
    indices = torch.bucketize(scaled, boundaries, out_int32=True).to(torch.uint8)
    return BlockwiseQuantized(indices, absmax, x.shape, x.dtype, block_size)


def dequantize_blockwise(q: BlockwiseQuantized, codebook: Float32[Tensor, " codes"]) -> Float[Tensor, "..."]:
    """ŵᵢ = sⱼ · c[qᵢ]: each index looked up, times its block's absmax, in float32, rounded once to q.dtype.

    Raises ValueError: an index beyond the codebook. QLoRA, section 2. Chapter 06.
    """
    check_codebook(codebook)
    check_indices(q.indices, codebook)
    values = codebook.to(q.indices.device)[q.indices.int()]
    return scale_blocks(values, q.absmax, q.block_size).to(q.dtype).view(q.shape)


def scale_blocks(
    values: Float32[Tensor, " N"], absmax: Float32[Tensor, " blocks"], block_size: int
) -> Float32[Tensor, " N"]:
    """Multiply each block of values by its absmax, in place; the last block may be shorter."""
    whole = len(values) // block_size * block_size
    values[:whole].view(-1, block_size).mul_(absmax[: whole // block_size, None])
    if whole < len(values):
        values[whole:].mul_(absmax[-1])
    return values


def int_codebook(bits: int) -> Float32[Tensor, " codes"]:
    """Evenly spaced values from -1 to 1 with 0 among them: k / K for k = -K … K, K = 2^(bits-1) - 1.

    These are the 2^bits - 1 integers that are symmetric about 0, as bitsandbytes' int4 and int8 have
    them: one of the codes is not used. `bits` in 2..8. Chapter 06.
    """
    if bits not in range(2, 9):
        raise ValueError(f"bits must be in 2..8, got {bits!r}")
    largest = 2 ** (bits - 1) - 1
    return torch.arange(-largest, largest + 1, dtype=torch.float32) / largest


def fp4_codebook() -> Float32[Tensor, " codes"]:
    """The values of a 4-bit float with 2 exponent bits and 1 mantissa bit (E2M1), divided by the largest.

    0, 1/12, 1/6, 1/4, 1/3, 1/2, 2/3, 1 and their negatives: 15, as there are two zeros. bitsandbytes' FP4
    has 1/192 where E2M1 has 1/12. QLoRA, appendix B and table 2. Chapter 06.
    """
    return float_codebook(exponent_bits=2, mantissa_bits=1)


def float_codebook(exponent_bits: int, mantissa_bits: int) -> Float32[Tensor, " codes"]:
    """Every value of a small float with a sign bit, divided by the largest; ascending, zero once.

    Exponent code 0 means subnormal: m · 2^-M; e > 0 means (1 + m · 2^-M) · 2^(e-1), for a mantissa code m
    of M bits. No code is kept for infinity or NaN. At most 8 bits in all. Chapters 06 and 08.
    """
    if exponent_bits < 1 or mantissa_bits < 0 or 1 + exponent_bits + mantissa_bits > 8:
        raise ValueError(
            f"need exponent_bits >= 1, mantissa_bits >= 0 and at most 7 together, "
            f"got {exponent_bits!r} and {mantissa_bits!r}"
        )
    fractions = [m / 2**mantissa_bits for m in range(2**mantissa_bits)]
    exponents = range(2**exponent_bits)
    positive = [m if e == 0 else (1 + m) * 2.0 ** (e - 1) for e, m in itertools.product(exponents, fractions)]
    values = torch.tensor(sorted({sign * v for v in positive for sign in (-1, 1)}), dtype=torch.float64)
    return (values / values.max()).float() + 0.0  # and -0.0 becomes 0.0


def check_input(x: Tensor, block_size: int) -> None:
    """Raise what `quantize_blockwise` says it raises of a tensor and a block size."""
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"can quantize tensors of float32, bfloat16 and float16, got {got}: cast it first")
    check_size("block_size", block_size)
    # The least and the largest say whether all are finite, without a mask as large as the tensor.
    if has_numbers(x) and x.numel() and not all(bound.isfinite() for bound in x.aminmax()):
        wrong = (~x.isfinite()).nonzero()
        first = tuple(wrong[0].tolist())
        raise ValueError(
            f"{len(wrong)} of {x.numel()} numbers are not finite, the first is {x[first].item()} "
            f"at {list(first)}; only finite numbers can be quantized"
        )


def check_size(name: str, size: int) -> None:
    """ValueError unless the size of a block or of a group is an int of at least 1."""
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {size!r}")


def check_codebook(codebook: Tensor) -> None:
    """ValueError unless a codebook is float32, of 2..256 values, strictly ascending and within [-1, 1]."""
    fits = isinstance(codebook, Tensor) and codebook.ndim == 1 and codebook.dtype == torch.float32
    if not fits or not 2 <= len(codebook) <= 256:
        got = f"{codebook.dtype} {list(codebook.shape)}" if isinstance(codebook, Tensor) else codebook
        raise ValueError(f"a codebook is a float32 tensor of 2 to 256 values, got {got}")
    if not (has_numbers(codebook) and codebook.is_cpu):  # a GPU would have to be waited for to look
        return
    if not (codebook.diff() > 0).all() or codebook[0] < -1 or codebook[-1] > 1:
        raise ValueError(f"a codebook ascends within [-1, 1], got {codebook.tolist()[:16]}")


def check_indices(indices: Tensor, codebook: Tensor) -> None:
    """ValueError if an index is beyond a codebook. A GPU, which would be waited for, says so by itself."""
    if not (has_numbers(indices) and indices.is_cpu):
        return
    if len(codebook) < 256 and len(indices) and indices.max().item() >= len(codebook):
        raise ValueError(f"index {indices.max().item()} is beyond a codebook of {len(codebook)} values")


def has_numbers(tensor: Tensor) -> bool:
    """Whether there are numbers to look at: none on the meta device, and none in a fake tensor."""
    return not tensor.is_meta and not is_fake(tensor)


def table(values: tuple[float, ...], beside: Tensor) -> Float32[Tensor, " codes"]:
    """A codebook's values on the device of a tensor. A GPU keeps its own: a copy would make it wait."""
    if beside.is_cuda and has_numbers(beside):
        return _kept(values, beside.device)
    return torch.tensor(values, dtype=torch.float32, device="cpu").to(beside.device)


@cache
def _kept(values: tuple[float, ...], device: torch.device) -> Float32[Tensor, " codes"]:
    with torch.inference_mode(False):  # else a later training step could not use it
        return torch.tensor(values, dtype=torch.float32, device=device)
