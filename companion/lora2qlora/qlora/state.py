"""The tensors that an NF4Linear stores, and whether others may take their place. Chapter 10."""

from functools import partial

import torch
from torch import Tensor, nn

from lora2qlora.blockwise import check_size, has_numbers
from lora2qlora.double_quantization import QuantizedAbsmax
from lora2qlora.lora import FLOATS
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
        elif tensor.layout != torch.strided:
            wrong.append(f"{expected}, got {tensor.layout}: pass its .to_dense()")
        elif tensor.is_floating_point() and has_numbers(tensor) and not tensor.isfinite().all():
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


def loading_misfits(layer: nn.Module, state_dict: dict, prefix: str, assign: bool = False) -> list[str]:
    """What is wrong with a state dict that has tensors of an NF4Linear; nothing where it has none at all."""
    own = {**{name: getattr(layer, name) for name in layer.names}, "bias": layer.bias}  # buffers, or sharded
    known = [*own, "_extra_state"]
    given = {name: state_dict[prefix + name] for name in known if prefix + name in state_dict}
    if not given:
        return []
    needed = [name for name in known if name != "bias" or layer.bias is not None]
    stray = sorted({key[len(prefix) :] for key in state_dict if key.startswith(prefix)} - set(needed))
    wrong = misfits({name: given[name] for name in layer.names if name in given}, own, prefix)
    wrong += form_misfits(layer, given.get("_extra_state"), prefix)
    if "bias" in given and layer.bias is not None:
        wrong += bias_misfits(given["bias"], layer.bias, assign, f"{prefix}bias")
    if lacking := [name for name in needed if name not in given and name != "_extra_state"]:
        wrong.append(f"{prefix or 'the layer'} comes whole or not at all: Missing key(s) {lacking}")
    if stray:
        wrong.append(f"{prefix or 'the layer'} has no such tensors: Unexpected key(s) {stray}")
    devices = {t.device for name, t in given.items() if isinstance(t, Tensor) and name != "_extra_state"}
    if not assign and torch.device("meta") in devices and not layer.packed.is_meta:
        wrong.append(f"{prefix or 'the layer'} cannot take tensors of the meta device, which have no numbers")
    if assign and len(devices) > 1:
        wrong.append(
            f"{prefix or 'the layer'} cannot be assigned tensors of {sorted(map(str, devices))}: move them"
        )
    return wrong


def form_misfits(layer: nn.Module, form, prefix: str) -> list[str]:
    """What is wrong with a state's form, [out, in, block size, group size or 0]."""
    mine = layer.get_extra_state().tolist()
    dense = isinstance(form, Tensor) and has_numbers(form) and form.layout == torch.strided
    got = form.tolist() if dense and list(form.shape) == [4] else form
    if dense and got == mine:
        return []
    return [
        f"{prefix}_extra_state must be {mine}, [out, in, block size, group size or 0], got {got!s:.80}: "
        "load the whole state dict of a layer of this form"
    ]


def bias_misfits(got: object, own: Tensor, assign: bool, name: str) -> list[str]:
    """What is wrong with a bias; it may be of another float dtype, as that of any layer."""
    expected = f"{name} must be floats {list(own.shape)}"
    if not isinstance(got, Tensor):
        return [f"{expected}, got {type(got).__name__}"]
    if got.shape != own.shape or got.dtype not in FLOATS or got.layout != torch.strided:
        return [f"size mismatch for {expected}, got {got.dtype} {list(got.shape)} {got.layout}"]
    stored = got.detach() if assign else got.detach().to(own.dtype)
    if has_numbers(stored) and not stored.isfinite().all():
        return [f"{expected}, all finite in {stored.dtype}, got {got[~stored.isfinite()][0].item()}"]
    return []
