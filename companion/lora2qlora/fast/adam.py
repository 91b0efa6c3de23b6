"""One step of 8-bit AdamW in one pass of C++. Chapters 12, 14."""

import ctypes
import math
from functools import cache

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lora2qlora import optimizers
from lora2qlora.blockwise import BlockwiseQuantized
from lora2qlora.fast.library import load_library


class _State(ctypes.Structure):
    """Pointers to one of Adam's states and to its tables, as the C++ has them."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("codes", "absmax", "codebook", "middle", "start")]


def adam_step_8bit(
    x: Float[Tensor, " n"],
    grad: Float[Tensor, " n"],
    m: BlockwiseQuantized,
    v: BlockwiseQuantized,
    step: int,
    group: dict,
    codebooks: tuple[Tensor, Tensor],
) -> None:
    """`optimizers.adam_step_8bit` in one pass of C++, for float32 x and gradient on a CPU.

    Set it as an `AdamW8bit`'s `update`. A last bit of x, m or v may differ from the plain path's, which fuses
    multiplication and addition on some processors, and so may a code beside a midpoint. Chapter 14.
    """
    tensors = (m.indices, m.absmax, v.indices, v.absmax)
    taken = all(t.is_cpu and t.is_contiguous() for t in (x, grad, *tensors, *codebooks))
    taken = taken and x.dtype == grad.dtype == torch.float32 and len(x) > 0
    taken = taken and all(len(codebook) == 256 for codebook in codebooks)  # no code is beyond them
    if not taken or (compiled := load_library()) is None:
        return optimizers.adam_step_8bit(x, grad, m, v, step, group, codebooks)
    lr, (beta1, beta2) = group["lr"], group["betas"]
    root, rate = math.sqrt(1 - beta2**step), -lr / (1 - beta1**step)
    keep = 1 - lr * group["weight_decay"]
    numbers = [beta1, 1 - beta1, beta2, 1 - beta2, root, group["eps"], keep, rate]
    options = torch.tensor(numbers, dtype=torch.float32)
    states, tables = [], []
    for q, codebook in zip((m, v), codebooks, strict=True):
        middle, start = _search_tables(tuple(codebook.tolist()))
        tables += [middle, start]
        pointers = [t.data_ptr() for t in (q.indices, q.absmax, codebook, middle, start)]
        states.append(_State(*pointers))
    compiled.adam(
        x.data_ptr(),
        grad.data_ptr(),
        *[ctypes.addressof(state) for state in states],
        options.data_ptr(),
        len(x),
        m.block_size,
        torch.get_num_threads(),
    )


@cache
def _search_tables(codebook: tuple[float, ...]) -> tuple[Float[Tensor, " codes"], UInt8[Tensor, "65536"]]:
    """The midpoints of a codebook, infinity last, and for the upper 16 bits of a float the least code."""
    values = torch.tensor(codebook, dtype=torch.float32)
    middle = (values[:-1] + values[1:]) / 2
    upper = torch.arange(2**16, dtype=torch.int32) << 16
    least = torch.where(upper < 0, upper | 0xFFFF, upper).view(torch.float32)
    start = torch.bucketize(least.nan_to_num(0.0), middle).to(torch.uint8)
    return torch.cat([middle, middle.new_tensor([math.inf])]), start
