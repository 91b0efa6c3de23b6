"""What the kernels read, and whether they may: they do not look at sizes themselves. Chapter 14."""

import math

import torch
from torch import Tensor, nn

from lora2qlora.blockwise import FLOATS
from lora2qlora.double_quantization import DYNAMIC_VALUES, QuantizedAbsmax
from lora2qlora.nf4 import NF4_VALUES, NF4Weight

# On the CPU, made now: whatever modes are on when they are read, their pointers are those of numbers.
NF4_TABLE = torch.tensor(NF4_VALUES, dtype=torch.float32, device="cpu")
DYNAMIC_TABLE = torch.tensor(DYNAMIC_VALUES, dtype=torch.float32, device="cpu")


def has_memory(tensor: object) -> bool:
    """Whether it is a tensor whose numbers lie in memory as they are.

    Not a subclass (fake ones are), not sparse, no view that negates, nor what torch.func wraps. A tracer can
    be asked for the first alone; of views `is_as_stored` asks when the graph runs.
    """
    plain = type(tensor) in (Tensor, nn.Parameter)
    if torch.compiler.is_compiling():
        return plain
    plain = plain and tensor.layout == torch.strided and is_as_stored(tensor)
    return plain and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_as_stored(*tensors: Tensor | None) -> bool:
    """Whether none is a view that negates what lies in memory."""
    return not any(tensor is not None and tensor.is_neg() for tensor in tensors)


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
    # Lists, not generators: the tracer of torch 2.14.1 stumbles over a generator when a graph ends.
    right = all([has_memory(t) and t.is_contiguous() and t.device == q.packed.device for t in tensors])
    right = right and all([t.dtype == kind and t.numel() >= size for t, kind, size in need])
    if out is not None:
        right = right and out.shape == q.shape and out.dtype == dtype and not out.requires_grad
    kinds = (torch.float32, torch.bfloat16) if q.packed.is_cpu else FLOATS
    return right and count > 0 and q.block_size % 2 == 0 and dtype in kinds
