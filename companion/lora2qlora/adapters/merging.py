"""Merging adapters whose base is quantized, and what a merge costs. Chapter 15."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora2qlora.adapters.checks import independent_copy
from lora2qlora.adapters.names import naming, unwrapped
from lora2qlora.adapters.targets import lora_layers
from lora2qlora.lora import FLOATS, LoRALinear, check_here, check_merge, is_linear, is_plain_lora, own_hooks


@dataclass(frozen=True)
class MergeCost:
    """What a merge did to the update ΔW, over all adapted weights together.

    `kept` [1]: the share of ΔW that the merged weights moved by, ⟨W' - Ŵ, ΔW⟩ / ‖ΔW‖²; 1 is all of it.
    `error` [1]: ‖W' - (Ŵ + ΔW)‖ / ‖ΔW‖, the distance to what was trained, in lengths of the update.
    `unchanged` [1]: the share of the weights in W' that are those of Ŵ rounded alike, without any update.
    """

    kept: float
    error: float
    unchanged: float


@torch.no_grad()
def merge_quantized(model: nn.Module, into: torch.dtype = torch.float16) -> nn.Module:
    """A copy of the model with plain linears: each is Ŵ + (α / r) · B A, with Ŵ what the base dequantizes to.

    The sum is taken in float32 and rounded once to `into`. Adapted layers may have a quantized base or an
    nn.Linear; quantized layers without an adapter are dequantized. All other parameters are cast to `into`,
    so that the copy runs; buffers keep their dtype. Names stay, new layers are frozen, the given model stays
    as it is. What wraps the whole of it, such as torch.compile or DDP, is left out. Layers are taken one
    after the other, so that one of them is dense in float32 at a time.

    Raises ValueError: nothing to merge or to dequantize, a layer with hooks, offloaded or without numbers, a
    number beyond the range of `into`, a part whose copy would go on using the model; TypeError: `into` is no
    float dtype of torch, or a weight is stored as another library does. LoRA, section 4.1. Chapter 15.
    """
    if into not in FLOATS:
        raise TypeError(f"into must be a float dtype of torch, got {into!r}: one of {FLOATS}")
    model = unwrapped(model)
    layers = linears_to_make(model)
    made = {id(layer): naming(name, plain_linear, layer, into) for name, layer in layers.items()}
    copied = independent_copy(model, made)
    for name, parameter in copied.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != into:
            parameter.data = naming(name, rounded, parameter, into)  # a weight with two names stays one
    return copied


@torch.no_grad()
def merge_cost(model: nn.Module, merged: nn.Module) -> MergeCost:
    """What a merge of an adapted model cost: how much of ΔW its weights W' hold, and how far they are off.

    `merged` has linear layers, plain or quantized, under the names of the adapted ones, as `merge_lora`,
    `merge_quantized` and `quantize_base` after it give. Where the adapter was merged into the weights W
    that were quantized, `error` is ‖Ŵ - W‖ / ‖ΔW‖. All in float32, summed in float64. Chapter 15.

    Raises ValueError: no adapters, an update of zeros, weights of another shape; KeyError: a layer that is
    missing; TypeError: one whose weight cannot be read.
    """
    layers = lora_layers(unwrapped(model))
    if not layers:
        raise ValueError("the model carries no adapters: pass the one that was merged, before the merge")
    merged, sums, count = unwrapped(merged), torch.zeros(4, dtype=torch.float64), 0
    places = dict(merged.named_modules())
    for name, layer in layers.items():
        if name not in places:
            raise KeyError(f"the merged model has no layer {name!r}: pass a merge of this very model")
        sums += naming(name, _compare, layer, places[name])
        count += layer.in_features * layer.out_features
    size, along, off, same = sums.tolist()
    if size == 0:
        raise ValueError("the update is zero in every layer, as before training: there is nothing to keep")
    return MergeCost(kept=along / size, error=math.sqrt(off / size), unchanged=same / count)


def linears_to_make(model: nn.Module) -> dict[str, nn.Module]:
    """The adapted layers and the quantized ones without an adapter, by name; raises as `merge_quantized`."""
    layers = lora_layers(model)
    bases = {id(layer.base) for layer in layers.values()}
    for name, module in model.named_modules():
        if is_linear(module) and not isinstance(module, LoRALinear):
            naming(name, check_stored, module)
            if is_quantized(module) and id(module) not in bases:
                layers[name] = module
    if not layers:
        raise ValueError("the model has no adapters and no quantized layers: there is nothing to merge")
    for name, layer in layers.items():
        naming(name, check_layer, layer)
    return layers


def is_quantized(module: nn.Module) -> bool:
    """Whether a linear layer stores its weight packed and says itself how to make it dense, as NF4Linear."""
    is_packed = not isinstance(getattr(module, "weight", None), Tensor | None)
    return is_packed and callable(getattr(module, "dequantize", None))


def check_stored(module: nn.Module) -> None:
    """TypeError where a linear layer's weight is stored in integers, which only its library can read."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and not weight.is_floating_point():
        raise TypeError(
            f"the weight of this {type(module).__name__} is stored in {weight.dtype}, as another library "
            "packs it: make it dense first (a transformers model by model.dequantize()), then merge_lora"
        )


def check_layer(layer: nn.Module) -> None:
    """Raise what `merge_quantized` says it raises of one layer."""
    base = layer.base if isinstance(layer, LoRALinear) else layer
    if not is_quantized(base):
        check_merge(layer)
        return
    check_here(base)
    on_meta = {tensor.is_meta for tensors in (layer.parameters(), layer.buffers()) for tensor in tensors}
    if len(on_meta) > 1:
        raise ValueError("a part of the layer is on the meta device, without numbers: load it, then merge")
    if hooks := list(dict.fromkeys(own_hooks(base) + own_hooks(layer))):
        raise ValueError(
            f"the layer carries {', '.join(hooks)}, which a merged one would lose: remove them first"
        )


def plain_linear(layer: nn.Module, into: torch.dtype) -> nn.Linear:
    """A new frozen nn.Linear with an adapted or a quantized layer's weight and bias, each rounded once."""
    base = layer.base if isinstance(layer, LoRALinear) else layer
    total = dense_weight(base)
    if isinstance(layer, LoRALinear):
        total = total + update_of(layer)
    has_bias = base.bias is not None
    made = nn.Linear(base.in_features, base.out_features, has_bias, device="meta", dtype=into)
    made.weight = nn.Parameter(rounded(total, into), requires_grad=False)
    if has_bias:
        made.bias = nn.Parameter(rounded(base.bias, into), requires_grad=False)
    return made.train(layer.training)


def dense_weight(base: nn.Module) -> Float[Tensor, "out in"]:
    """The weight that a base computes with, in float32: dequantized, or as it is."""
    if is_quantized(base):
        return base.dequantize(base.weight, torch.float32)  # maybe a buffer that the next layer writes into
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"cannot read the weight of this {type(base).__name__}: dequantize it first")
    return weight.float()


def update_of(layer: LoRALinear) -> Float[Tensor, "out in"]:
    """ΔW = (α / r) · B A in float32, whatever the adapters' dtype; a variant says itself what its ΔW is."""
    if not is_plain_lora(layer):
        return layer.delta_weight().float()
    return layer.scaling * (layer.lora_B.float() @ layer.lora_A.float())


def rounded(x: Tensor, into: torch.dtype) -> Tensor:
    """A copy in another dtype; ValueError where a finite number would become infinite."""
    copied = x.detach().to(into, copy=True)
    if not x.is_meta and copied.isinf().any() and not x.isinf().any():
        raise ValueError(
            f"its largest number, {x.abs().max().item():.4g}, is beyond the range of {into}: "
            "merge into torch.bfloat16 or torch.float32"
        )
    return copied


def _compare(layer: LoRALinear, made: nn.Module) -> Float[Tensor, "4"]:
    """‖ΔW‖², ⟨W' - Ŵ, ΔW⟩, ‖W' - Ŵ - ΔW‖², and how many weights of W' are those of Ŵ rounded alike."""
    merged = dense_weight(made).clone()  # before the same buffer may hold the base's
    base, delta = dense_weight(layer.base), update_of(layer)
    if merged.shape != base.shape:
        raise ValueError(f"the merged weight is {list(merged.shape)}, the adapted one {list(base.shape)}")
    dtype = torch.float32 if is_quantized(made) else made.weight.dtype
    same = (base.to(dtype).float() == merged).sum()
    moved = merged - base
    parts = (delta * delta, moved * delta, (moved - delta).square())
    return torch.stack([*(part.sum(dtype=torch.float64) for part in parts), same.double()]).cpu()
