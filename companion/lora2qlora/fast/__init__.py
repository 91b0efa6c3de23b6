"""The same bytes sooner: NF4 in C++ on a CPU, in Triton on a GPU, and 8-bit Adam in C++. Chapter 14.

Each function has the signature of the plain one and gives the same results, and hands over to the plain one
whatever it does not take itself. The C++ is compiled when it is first needed, once a process, in a second or
two; where that fails, one warning says so and the plain path stays. Without the package `triton` the plain
path stays on a GPU.
"""

from lora2qlora.fast.adam import adam_step_8bit
from lora2qlora.fast.library import CPP
from lora2qlora.fast.triton_kernels import (
    dequantize_kernel,
    dequantize_triton,
    matmul_kernel,
    matmul_triton,
)
from lora2qlora.fast.weights import dequantize_nf4, dequantize_to_scratch, quantize_nf4, use_fast

__all__ = [
    "CPP",
    "adam_step_8bit",
    "dequantize_kernel",
    "dequantize_nf4",
    "dequantize_to_scratch",
    "dequantize_triton",
    "matmul_kernel",
    "matmul_triton",
    "quantize_nf4",
    "use_fast",
]
