"""`quantize_nf4` and `dequantize_nf4` by the kernels, and what hands them to a model. Chapter 14."""

import math
import threading

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora2qlora import nf4
from lora2qlora.double_quantization import QuantizedAbsmax
from lora2qlora.fast.inputs import DYNAMIC_TABLE, NF4_TABLE, constants_of, fits, has_memory, is_as_stored
from lora2qlora.fast.library import load_library
from lora2qlora.fast.operators import nothing, operator
from lora2qlora.fast.triton_kernels import WEIGHT, dequantize_triton, triton
from lora2qlora.nf4 import NF4Weight
from lora2qlora.qlora import NF4Linear


def quantize_nf4(w: Float[Tensor, "..."], block_size: int = 64) -> NF4Weight:
    """`nf4.quantize_nf4`, the same bytes, in C++ for float32 and bfloat16 on a CPU; one pass over the weight.

    A block size that is odd, other dtypes and devices, and an empty weight take the plain path. It raises
    what the plain one raises. QLoRA, section 3. Chapter 14.
    """
    taken = has_memory(w) and w.is_cpu and w.numel() > 0
    taken = taken and w.dtype in (torch.float32, torch.bfloat16)
    taken = taken and isinstance(block_size, int) and block_size > 0 and block_size % 2 == 0
    if not taken:
        return nf4.quantize_nf4(w, block_size)
    packed, absmax = quantize(w.detach(), block_size)
    return NF4Weight(packed, absmax, w.shape, w.dtype, block_size)


def dequantize_nf4(
    q: NF4Weight, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Float[Tensor, "..."]:
    """`nf4.dequantize_nf4`, the same bits, in C++ on a CPU and in Triton on a GPU; quantized absmax included.

    A quantized absmax is read block by block inside the kernel, without a tensor in between. On a CPU it
    takes float32 and bfloat16; the rest takes the plain path. It raises what the plain one raises.
    Chapter 14.
    """
    wanted = out.dtype if out is not None and dtype is None else dtype or q.dtype
    constants = constants_of(q)
    device = q.packed.device
    if not fits(q, constants, wanted, out):
        return nf4.dequantize_nf4(q, dtype, out)
    if out is None:
        out = torch.empty(q.shape, dtype=wanted, device=device)
    if device.type == "cuda" and triton is not None:
        return dequantize_triton(q, out)
    dequantize(q.packed, *constants, q.block_size, out)
    return out


def is_ready(device: torch.device) -> bool:
    """Whether there is a kernel for this device."""
    if device.type == "cpu":
        return load_library() is not None
    return device.type == "cuda" and triton is not None


def _quantize(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The packed bytes and the absmax of a weight."""
    flat = w.reshape(-1).contiguous().resolve_neg()
    packed = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8, device="cpu")
    absmax = torch.empty(-(-flat.numel() // block_size), dtype=torch.float32, device="cpu")
    compiled = load_library()
    wrong = compiled is None or compiled.quantize_nf4(
        flat.data_ptr(),
        flat.dtype == torch.bfloat16,
        NF4_TABLE.data_ptr(),
        packed.data_ptr(),
        absmax.data_ptr(),
        flat.numel(),
        block_size,
        torch.get_num_threads(),
    )
    if wrong:
        q = nf4.quantize_nf4(w, block_size)  # which says what is wrong, and where
        packed, absmax = q.packed, q.absmax
    return packed, absmax


def _dequantize(
    packed: Tensor,
    values: Tensor,
    codes: Tensor | None,
    offset: Tensor | None,
    group: int,
    block_size: int,
    out: Tensor,
) -> None:
    """The weight written into `out`, from the constants as `constants_of` gives them."""
    as_stored = packed.is_cpu and is_as_stored(packed, values, codes, offset, out)
    compiled = load_library() if as_stored else None
    if compiled is None:
        absmax = QuantizedAbsmax(codes, values, offset, group) if group else values
        nf4.dequantize_nf4(NF4Weight(packed, absmax, out.shape, out.dtype, block_size), out=out)
        return
    torch.autograd.graph.increment_version(out)  # for autograd, should it need what was there before
    nested = (codes.data_ptr(), DYNAMIC_TABLE.data_ptr(), offset.data_ptr()) if group else (None,) * 3
    compiled.dequantize_nf4(
        packed.data_ptr(),
        values.data_ptr(),
        *nested,
        group,
        NF4_TABLE.data_ptr(),
        out.data_ptr(),
        out.dtype == torch.bfloat16,
        out.numel(),
        block_size,
        torch.get_num_threads(),
    )


quantize = operator(
    "fast_quantize_nf4(Tensor w, int block_size) -> (Tensor, Tensor)",
    _quantize,
    lambda w, block_size: (
        w.new_empty(-(-w.numel() // 2), dtype=torch.uint8),
        w.new_empty(-(-w.numel() // block_size), dtype=torch.float32),
    ),
)
dequantize = operator(f"fast_dequantize_nf4({WEIGHT}, Tensor(a!) out) -> ()", _dequantize, nothing)


class _Scratch(threading.local):
    """Memory of a thread, as large as the largest weight it was asked for."""

    memory = torch.empty(0, dtype=torch.uint8)


_scratch = _Scratch()


def dequantize_to_scratch(q: NF4Weight, dtype: torch.dtype) -> Float[Tensor, "..."]:
    """`dequantize_nf4` into memory that the next call in this thread overwrites; copy what you keep.

    One piece of memory serves all shapes and dtypes. On a GPU the allocator hands out warm memory anyway, so
    there every call has its own; so has every call in a graph of torch.compile. Chapter 14.
    """
    if not _may_share(q) or not dtype.is_floating_point:
        return dequantize_nf4(q, dtype)
    size, memory = math.prod(q.shape) * dtype.itemsize, _scratch.memory
    if memory.nbytes < size:
        with torch.inference_mode(False):  # else a later training step could not use it
            memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        if has_memory(memory):  # under a mode it may be a tensor of that mode
            _scratch.memory = memory
    return dequantize_nf4(q, dtype, memory[:size].view(dtype).view(q.shape))


def _may_share(q: NF4Weight) -> bool:
    """Whether the scratch serves: not in a graph, where memory that is used again is no tensor's own."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not traced and has_memory(q.packed) and q.packed.is_cpu


def use_fast(model: nn.Module) -> None:
    """Hand `dequantize_to_scratch` to every NF4Linear of a model, as its `dequantize`.

    Results keep their bits. Where there is no kernel for a layer's device the plain path stays; for a CPU a
    warning says so, once a process. Raises ValueError: the model has no NF4Linear. Chapter 14.
    """
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no NF4Linear to make fast: quantize_base first")
    for layer in layers:
        if is_ready(layer.packed.device):
            layer.dequantize = dequantize_to_scratch
