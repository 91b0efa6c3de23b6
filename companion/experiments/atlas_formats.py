"""quantization_atlas.py, the formats: how each rounds a weight, and the bits it takes."""

from functools import cache, partial

import torch
from lora2qlora.blockwise import (
    dequantize_blockwise,
    float_codebook,
    fp4_codebook,
    int_codebook,
    quantize_blockwise,
)
from lora2qlora.double_quantization import bits_per_parameter, double_quantize
from lora2qlora.nf4 import dequantize_nf4, fitted_codebook, nf4_codebook, quantize_nf4

BLOCK_SIZES = (32, 64, 128, 256, 1024, 4096)
CODEBOOKS = {  # bits of a code, and the codebook for a block size
    "int8": (8, lambda block_size: int_codebook(8)),
    "int4": (4, lambda block_size: int_codebook(4)),
    "int3": (3, lambda block_size: int_codebook(3)),
    "int2": (2, lambda block_size: int_codebook(2)),
    "fp4": (4, lambda block_size: fp4_codebook()),
    "fp4-e3m0": (4, lambda block_size: float_codebook(3, 0)),
    "nf4": (4, lambda block_size: nf4_codebook()),
    "l1-fit": (4, cache(partial(fitted_codebook, power=1))),  # AF4's aim, for each block size
    "l2-fit": (4, cache(partial(fitted_codebook, power=2))),
}
SWEPT = ("nf4", "int4", "fp4", "nf4+dq", "l1-fit")  # formats that get every block size
AT_64 = ("bf16", "int8", "nf4+dq", "int3", "int2", "fp4-e3m0", "l2-fit")


def rounded(weight: torch.Tensor, form: str, block_size: int, shift: int = 0) -> torch.Tensor:
    """A weight [out, in] after quantization and dequantization, in its own dtype.

    With a shift the blocks begin `shift` [elements] later, and one of them holds both ends of the matrix.
    """
    if shift:
        turned = weight.flatten().roll(-shift).view_as(weight)
        return rounded(turned, form, block_size).flatten().roll(shift).view_as(weight)
    if form == "fp32":
        return weight
    if form == "bf16":
        return weight.bfloat16().to(weight.dtype)
    if form == "nf4+dq":
        return dequantize_nf4(double_quantize(quantize_nf4(weight, block_size)))
    if form == "affine-int4":
        return affine_int4(weight, block_size)
    codebook = CODEBOOKS[form][1](block_size)
    return dequantize_blockwise(quantize_blockwise(weight, codebook, block_size), codebook)


def affine_int4(weight: torch.Tensor, block_size: int) -> torch.Tensor:
    """Sixteen evenly spaced values from each block's least to its largest: two constants a block."""
    blocks = weight.reshape(-1, block_size)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    step = ((high - low) / 15).clamp(min=1e-30)
    return (((blocks - low) / step).round() * step + low).view_as(weight)


def bits(form: str, block_size: int) -> float:
    """[bits] of storage for a parameter, constants in 32 bits included (16 each for affine-int4's two)."""
    if form in ("fp32", "bf16"):
        return {"fp32": 32.0, "bf16": 16.0}[form]
    if form == "nf4+dq":
        return bits_per_parameter(block_size)
    if form == "affine-int4":
        return 4 + 2 * 16 / block_size
    return CODEBOOKS[form][0] + 32 / block_size


def settings() -> list[tuple[str, int]]:
    """Every format with every block size that it is measured at, in order of worth."""
    at_64 = [(form, 64) for form in ("fp32", *AT_64, *SWEPT)]
    swept = [(form, size) for form in SWEPT for size in BLOCK_SIZES]
    return list(dict.fromkeys([*at_64, *swept]))
