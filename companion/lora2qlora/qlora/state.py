"""The tensors that an NF4Linear stores, and whether others may take their place. Chapter 10."""

from functools import partial

import torch
from torch import Tensor

from lora2qlora.blockwise import check_size
from lora2qlora.double_quantization import QuantizedAbsmax
from lora2qlora.nf4 import NF4Weight


def check_weight(weight: NF4Weight, bias: Tensor | None, compute_dtype: torch.dtype) -> None:
    """Raise what `NF4Linear` says it raises of these arguments."""
    if not isinstance(weight, NF4Weight) or not isinstance(weight.absmax, Tensor | QuantizedAbsmax):
        raise TypeError(f"NF4Linear takes what quantize_nf4 or double_quantize returns, got {weight!r:.80}")
    if not isinstance(compute_dtype, torch.dtype) or not compute_dtype.is_floating_point:
        raise TypeError(f"compute_dtype must be a float dtype of torch, got {compute_dtype!r}")
    if len(weight.shape) != 2:
        raise ValueError(f"the weight of a linear layer is [out, in], got shape {list(weight.shape)}")
    check_size("block_size", weight.block_size)
    group_size = getattr(weight.absmax, "group_size", None)
    if isinstance(weight.absmax, QuantizedAbsmax):
        check_size("group_size", group_size)
    fitting = shapes_alone(weight, weight.block_size, group_size)
    if wrong := misfits(stored_tensors(weight), stored_tensors(fitting)):
        raise ValueError("; ".join(wrong))
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"the bias must have shape [{weight.shape[0]}], got {list(bias.shape)}")


def stored_tensors(weight: NF4Weight) -> dict[str, Tensor]:
    """The tensors of a weight, by the names that they have as buffers of a layer."""
    absmax = weight.absmax
    constants = {"absmax": absmax}
    if isinstance(absmax, QuantizedAbsmax):
        constants = {name: getattr(absmax, name) for name in ("codes", "scales", "offset")}
    return {"packed": weight.packed, **constants}


def misfits(got: dict[str, Tensor], own: dict[str, Tensor], prefix: str = "") -> list[str]:
    """What is wrong with tensors that are to be stored in the place of `own`, by name."""
    wrong = []
    for name, tensor in got.items():
        expected = f"{prefix}{name} must be {own[name].dtype} {list(own[name].shape)}"
        if not isinstance(tensor, Tensor):
            wrong.append(f"{expected}, got {type(tensor).__name__}")
        elif (tensor.dtype, tensor.shape) != (own[name].dtype, own[name].shape):
            got_form = f"{tensor.dtype} {list(tensor.shape)}"
            wrong.append(f"{expected}, got {got_form}: quantized bytes and constants are never cast")
        elif tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
            wrong.append(f"{expected}, all finite, got {tensor[~tensor.isfinite()][0].item()}")
    return wrong


def shapes_alone(weight: Tensor | NF4Weight, block_size: int, group_size: int | None) -> NF4Weight:
    """What quantizing a weight [out, in] gives, without its numbers: all on the meta device."""
    empty, count = partial(torch.empty, dtype=torch.float32, device="meta"), weight.shape.numel()
    blocks = -(-count // block_size)
    absmax = empty(blocks)
    if group_size is not None:
        codes, scales = empty(blocks, dtype=torch.uint8), empty(-(-blocks // group_size))
        absmax = QuantizedAbsmax(codes, scales, empty(()), group_size)
    packed = empty(-(-count // 2), dtype=torch.uint8)
    return NF4Weight(packed, absmax, weight.shape, weight.dtype, block_size)
