"""What can be quantized, and what quantizing a model would leave as it is. Chapter 10."""

import re
from collections import defaultdict

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake

from lora2qlora.adapters import naming
from lora2qlora.adapters.names import REGISTERING
from lora2qlora.blockwise import check_input, has_numbers
from lora2qlora.double_quantization import double_quantize
from lora2qlora.lora import is_linear
from lora2qlora.nf4 import NF4Weight, quantize_nf4

LARGE = 1e38  # an absmax from which on its code may stand for inf


def check_linear(linear: nn.Module, block_size: int = 64, double_quant: bool = False) -> None:
    """Raise what `NF4Linear.from_linear` says it raises, and change nothing."""
    weight = getattr(linear, "weight", None)
    if isinstance(weight, NF4Weight) or hasattr(weight, "quant_state"):
        raise ValueError(f"the weight of this {type(linear).__name__} is quantized already")
    plain = isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward
    if not plain or not _is_parameter(weight):
        raise TypeError(f"can quantize an nn.Linear with a plain float weight, got {type(linear).__name__}")
    hooks = [name for name, value in vars(linear).items() if name.endswith("_hooks") and value]
    if getattr(linear.forward, "__func__", None) is not nn.Linear.forward:
        hooks.append("a forward of its own")  # so do accelerate's hooks
    if hooks:
        raise ValueError(
            f"this {type(linear).__name__} carries {', '.join(hooks)}, which an NF4Linear would lose: remove "
            "them (accelerate's by remove_hook_from_module), quantize, and put hooks on the NF4Linear"
        )
    weight = weight.detach()
    check_input(weight.new_empty(0, device="cpu") if weight.is_meta else weight, block_size)
    if double_quant and has_numbers(weight) and weight.numel() and weight.abs().max() > LARGE:
        double_quantize(quantize_nf4(weight, block_size))  # which says what would come back as inf
    if linear.bias is not None and not linear.bias.is_meta:
        naming("its bias", check_input, linear.bias.detach(), block_size)


def _is_parameter(weight: object) -> bool:
    """Whether it is a plain one; a fake tensor is a subclass even as a parameter."""
    return type(weight) is nn.Parameter or (isinstance(weight, nn.Parameter) and is_fake(weight))


def check_place(model: nn.Module, name: str) -> None:
    """ValueError where a layer's weight is elsewhere, or someone holds on to it: offloaded, DDP, FSDP."""
    parts = name.split(".")
    for above in [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]:
        kind = next((k.__name__ for k in type(above).__mro__ if k.__name__ in REGISTERING), None)
        if kind:
            raise ValueError(
                f"the model is wrapped in {kind}, which takes note of parameters once, when it wraps: "
                "quantize the bare model, then wrap that"
            )
        hook = getattr(above, "_hf_hook", None)
        if any(getattr(one, "offload", False) for one in (hook, *getattr(hook, "hooks", ()))):
            raise ValueError(
                f"{name} is offloaded: a hook of accelerate on {type(above).__name__} brings its weight and "
                "takes it away. Load the model without offloading (or remove_hook_from_submodules), quantize"
            )
    weight = getattr(model.get_submodule(name), "weight", None)
    if isinstance(weight, torch.Tensor) and hasattr(weight, "device_mesh"):
        raise ValueError(f"{name} is sharded: quantize the whole model, then shard it")


def left_dense(model: nn.Module, names: list[str]) -> dict[str, float]:
    """Names of parameters that would stay at full size, with their share of the model's bytes, above 1 %.

    Those of all layers together, a number in a name being *: matrices and stacks of them that are neither in
    linear layers nor embeddings, convolutions or biases. So experts are stored in most mixtures of experts.
    """
    targets = {id(model.get_submodule(name)) for name in names}
    sizes, seen, total = defaultdict(int), set(), 0
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(prefix=name, recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            total += parameter.nbytes
            spared = isinstance(module, nn.Embedding | nn.EmbeddingBag | nn.modules.conv._ConvNd)
            spared = spared or is_linear(module) or id(module) in targets or parameter.ndim < 2
            if not spared and not re.search("embed|bias", own):
                sizes[re.sub(r"\b\d+\b", "*", own)] += parameter.nbytes
    return {name: size / total for name, size in sizes.items() if size > 0.01 * total}
