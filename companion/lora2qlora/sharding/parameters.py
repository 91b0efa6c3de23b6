"""An NF4Linear's bytes as parameters, which is what engines divide among processes, and back. Chapter 17."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lora2qlora.qlora import NF4Linear


def make_shardable(model: nn.Module) -> list[str]:
    """Turn the bytes of every NF4Linear into frozen parameters, in place; returns the layers' names.

    These are `packed` and, after double quantization, the `codes` of its absmax: 4.125 of 4.127 bits a
    parameter. Float constants stay buffers, whole on every card, as mixed precision would cast them: scales
    and offset, 0.002 bits, or 0.5 bits of plain absmax. Values, names and results stay the same, bit for bit.
    For engines that divide parameters by themselves, such as accelerate's FSDP2; `shard` calls it.

    Raises ValueError: no NF4Linear, or one made shardable already. Chapter 17.
    """
    layers = nf4_layers(model)
    if not layers:
        raise ValueError(
            "the model has no NF4Linear: quantize_base first; a plain model is shardable as it is"
        )
    if done := [name for name, layer in layers.items() if "packed" in layer._parameters]:
        raise ValueError(f"{done[0]} is shardable already, and {len(done) - 1} others are")
    for layer in layers.values():
        for name in layer.names:
            if (tensor := layer._buffers[name]).dtype == torch.uint8:
                del layer._buffers[name]
                layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return list(layers)


def make_plain(model: nn.Module) -> list[str]:
    """The opposite of `make_shardable`: bytes are buffers again; returns the names of the layers it changed.

    Raises ValueError: a layer that is sharded, of which this process has only a part. Chapter 17.
    """
    layers = {name: layer for name, layer in nf4_layers(model).items() if "packed" in layer._parameters}
    for name, layer in layers.items():
        if isinstance(layer.packed, DTensor):
            raise ValueError(
                f"{name} is sharded: take the whole state (get_model_state_dict with full_state_dict=True) "
                "and load it into a model that is not"
            )
    for layer in layers.values():
        for name in [name for name in layer.names if name in layer._parameters]:
            layer.register_buffer(name, layer._parameters.pop(name).detach())
    return list(layers)


def nf4_layers(model: nn.Module) -> dict[str, NF4Linear]:
    """The quantized layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
