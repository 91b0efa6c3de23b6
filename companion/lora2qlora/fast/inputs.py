"""What the kernels read, and whether they may: they do not look at sizes themselves. Chapter 14."""

import math
from functools import cache

import torch
from torch import Tensor, nn

from lora2qlora.blockwise import FLOATS
from lora2qlora.double_quantization import QuantizedAbsmax, dynamic_codebook
from lora2qlora.nf4 import NF4Weight, nf4_codebook


@cache
def nf4_table() -> Tensor:
    """float32 [16] on the CPU."""
    return nf4_codebook()


@cache
def dynamic_table() -> Tensor:
    """float32 [256] on the CPU."""
    return dynamic_codebook()


def has_memory(tensor: object) -> bool:
    """Whether it is a tensor whose numbers lie in memory as they are: no subclass, no view that negates."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return plain and not tensor.is_neg()


def constants_of(q: NF4Weight) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    """An absmax as the kernels read it: values, and where it is quantized its codes, offset, group size."""
    if isinstance(q.absmax, QuantizedAbsmax):
        return q.absmax.scales, q.absmax.codes, q.absmax.offset, q.absmax.group_size
    return (q.absmax if isinstance(q.absmax, Tensor) else q.absmax.dequantize()), None, None, 0


def fits(q: NF4Weight, constants: tuple, dtype: torch.dtype, out: Tensor | None) -> bool:
    """Whether a kernel may read and write here."""
    values, codes, offset, group = constants
    count = math.prod(q.shape)
    blocks = -(-count // q.block_size)
    need = [(q.packed, torch.uint8, -(-count // 2)), (values, torch.float32, blocks)]
    if group:
        groups = -(-blocks // group)
        need = [need[0], (values, torch.float32, groups), (codes, torch.uint8, blocks)]
        need.append((offset, torch.float32, 1))
    tensors = [t for t, _, _ in need] + ([] if out is None else [out])
    right = all(has_memory(t) and t.is_contiguous() and t.device == q.packed.device for t in tensors)
    right = right and all(t.dtype == kind and t.numel() >= size for t, kind, size in need)
    if out is not None:
        right = right and out.shape == q.shape and out.dtype == dtype and not out.requires_grad
    kinds = (torch.float32, torch.bfloat16) if q.packed.is_cpu else FLOATS
    return right and count > 0 and q.block_size % 2 == 0 and dtype in kinds
