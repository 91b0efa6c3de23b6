"""NF4, the 4-bit NormalFloat: its sixteen values derived, two codes packed in a byte. Chapter 07."""

from lora2qlora.nf4.codebook import (
    NF4_VALUES,
    OFFSET,
    ZERO,
    absmax_scaled_density,
    fitted_codebook,
    nf4_codebook,
)
from lora2qlora.nf4.weight import PIECE, NF4Weight, dequantize_nf4, pack, quantize_nf4, unpack

__all__ = [  # noqa: RUF022 (in the order in which one meets them)
    "OFFSET", "ZERO", "NF4_VALUES", "nf4_codebook",
    "PIECE", "NF4Weight", "pack", "unpack", "quantize_nf4", "dequantize_nf4",
    "absmax_scaled_density", "fitted_codebook",
]  # fmt: skip
