"""One step of 8-bit AdamW in one pass of C++. Chapters 12, 14."""

import ctypes
import math
from functools import cache

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lora2qlora import optimizers
from lora2qlora.blockwise import BlockwiseQuantized
from lora2qlora.fast.inputs import has_memory, is_as_stored
from lora2qlora.fast.library import load_library
from lora2qlora.fast.operators import nothing, operator


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
    tensors = (x, grad, m.indices, m.absmax, v.indices, v.absmax, *codebooks)
    taken = all([has_memory(t) and t.is_cpu and t.is_contiguous() for t in tensors])  # no generator: inputs
    taken = taken and x.dtype == grad.dtype == torch.float32 and len(x) > 0
    taken = taken and all([len(codebook) == 256 for codebook in codebooks])  # no code is beyond them
    if not taken:
        return optimizers.adam_step_8bit(x, grad, m, v, step, group, codebooks)
    options = [float(o) for o in (group["lr"], *group["betas"], group["eps"], group["weight_decay"])]
    step_in_place(*tensors, options, step, m.block_size)


def _step(x, grad, m_codes, m_absmax, v_codes, v_absmax, m_codebook, v_codebook, options, step, size):
    lr, beta1, beta2, eps, decay = options
    codes, scales, codebooks = (m_codes, v_codes), (m_absmax, v_absmax), (m_codebook, v_codebook)
    if not is_as_stored(x, grad, *codes, *scales, *codebooks) or (compiled := load_library()) is None:
        moments = [
            BlockwiseQuantized(*pair, x.shape, x.dtype, size) for pair in zip(codes, scales, strict=True)
        ]
        group = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": decay}
        return optimizers.adam_step_8bit(x, grad, *moments, step, group, codebooks)
    root, rate = math.sqrt(1 - beta2**step), -lr / (1 - beta1**step)
    numbers = (ctypes.c_float * 8)(beta1, 1 - beta1, beta2, 1 - beta2, root, eps, 1 - lr * decay, rate)
    states, kept = [], []
    for one, absmax, codebook in zip(codes, scales, codebooks, strict=True):
        middle, start = _search_tables(tuple(codebook.tolist()))
        kept += [middle, start]
        states.append(_State(*[t.data_ptr() for t in (one, absmax, codebook, middle, start)]))
    torch.autograd.graph.increment_version((x, *codes, *scales))
    compiled.adam(
        x.data_ptr(),
        grad.data_ptr(),
        *[ctypes.addressof(state) for state in states],
        ctypes.addressof(numbers),
        len(x),
        size,
        torch.get_num_threads(),
    )


step_in_place = operator(
    "adam_step_8bit(Tensor(a!) x, Tensor grad, Tensor(b!) m_codes, Tensor(c!) m_absmax, "
    "Tensor(d!) v_codes, Tensor(e!) v_absmax, Tensor m_codebook, Tensor v_codebook, float[] options, "
    "int step, int block_size) -> ()",
    _step,
    nothing,
)


@cache
def _search_tables(codebook: tuple[float, ...]) -> tuple[Float[Tensor, " codes"], UInt8[Tensor, "65536"]]:
    """The midpoints of a codebook, infinity last, and for the upper 16 bits of a float the least code."""
    values = torch.tensor(codebook, dtype=torch.float32, device="cpu")
    middle = (values[:-1] + values[1:]) / 2
    upper = torch.arange(2**16, dtype=torch.int32, device="cpu") << 16
    least = torch.where(upper < 0, upper | 0xFFFF, upper).view(torch.float32)
    start = torch.bucketize(least.nan_to_num(0.0), middle).to(torch.uint8)
    return torch.cat([middle, middle.new_tensor([math.inf])]), start
