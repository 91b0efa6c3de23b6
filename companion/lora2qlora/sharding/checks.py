"""What can be divided among processes, and what would go wrong without a word. Chapter 17."""

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lora2qlora.adapters.names import REGISTERING
from lora2qlora.lora import is_linear
from lora2qlora.qlora import NF4Linear


def check_group(mesh: DeviceMesh | None) -> None:
    """ValueError unless there is a group of processes to divide among."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "there is no process group: start the script by torchrun or accelerate launch, and call "
            "torch.distributed.init_process_group() first"
        )
    if mesh is not None and mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, got {mesh.ndim}: {mesh}")


def check_whole(model: nn.Module) -> None:
    """ValueError where a model, or a part of it, is sharded already, or DDP has taken note of it."""
    for name, module in model.named_modules():
        wrapper = next((kind.__name__ for kind in type(module).__mro__ if kind.__name__ in REGISTERING), None)
        divided = isinstance(module, FSDPModule) or any(
            isinstance(p, DTensor) for p in module.parameters(False)
        )
        if wrapper or divided:
            how = f"wrapped in {wrapper}" if wrapper else "sharded"
            raise ValueError(
                f"{name or type(model).__name__} is {how} already: build the model anew, shard once"
            )


def check_shardable(model: nn.Module, blocks: dict[str, nn.Module]) -> None:
    """Raise what `shard` says it raises of a model, and change nothing."""
    for name, module in model.named_modules():
        if is_linear(module) and not (hasattr(module, "base") or hasattr(module, "base_layer")):
            check_kind(name or type(model).__name__, module)
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    if len(dtypes) > 1:
        raise ValueError(
            f"what trains has the dtypes {sorted(map(str, dtypes))}, but gradients are reduced together: "
            "give all of it one (add_lora's dtype=, or .to(dtype) on what trains)"
        )
    parts = set(model.modules())
    if stray := [name for name, block in blocks.items() if block not in parts]:
        raise ValueError(f"{stray[0]} is no part of this {type(model).__name__}")


def check_kind(name: str, linear: nn.Module) -> None:
    """Raise unless a linear layer's weight is one that FSDP2 divides: floats, or our bytes."""
    weight = getattr(linear, "weight", None)
    if isinstance(linear, NF4Linear):
        return
    if hasattr(weight, "quant_state") and not weight.is_floating_point():
        raise ValueError(
            f"{name} holds its 4 bits in {weight.dtype}, which accelerate leaves whole on every card and "
            "some releases of torch break: load the model with bnb_4bit_quant_storage=torch.bfloat16, the "
            "dtype of the rest"
        )
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        raise TypeError(
            f"{name} is a {type(linear).__name__}, of which it is not known how to divide it: need nn.Linear "
            "or NF4Linear, under a LoRALinear or PEFT's"
        )
