"""A model divided among processes by torch's FSDP2, and its adapter out of it. Chapter 17."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lora2qlora.adapters import lora_layers, save_adapter
from lora2qlora.sharding.checks import check_group, check_shardable, check_whole
from lora2qlora.sharding.parameters import make_shardable, nf4_layers


def shard(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    precision: MixedPrecisionPolicy | None = None,
    blocks: list[nn.Module] | None = None,
) -> list[str]:
    """Divide a model among the processes of a group, in place, by torch's `fully_shard`; names of its blocks.

    Each block (`blocks`, or what the model's `_no_split_modules` names) is gathered when its turn comes and
    let go after it, forward and backward; what lies outside of them is gathered for the whole pass. Make the
    model first: quantize, adapt, enable checkpointing, shard, and only then build the optimizer.
    `mesh` is one dimension of processes, all of them unless given; `precision` is FSDP2's, which casts
    floats alone.

    Raises ValueError: no process group, a model that is sharded or wrapped, blocks that are not found, a
    trained dtype beside another, a base of bitsandbytes with storage in 8-bit integers (accelerate leaves it
    whole on every card, and some releases of torch break it: one storage for every engine); TypeError: a
    linear layer of an unknown kind. Then nothing is changed. Chapter 17.
    """
    check_group(mesh)
    check_whole(model)
    chosen = blocks_of(model) if blocks is None else {f"block {i}": block for i, block in enumerate(blocks)}
    check_shardable(model, chosen)
    if any("packed" in layer._buffers for layer in nf4_layers(model).values()):
        make_shardable(model)
    options = {"mesh": mesh, "mp_policy": precision or MixedPrecisionPolicy()}
    for block in chosen.values():
        fully_shard(block, **options)
    fully_shard(model, **options)
    return list(chosen)


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks that a model of transformers names as not to be split; ValueError where it names none."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    found = {name: m for name, m in model.named_modules() if type(m).__name__ in kinds}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no blocks by its _no_split_modules, {sorted(kinds)}: "
            "pass blocks=[...], in the order in which they are used"
        )
    return found


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its numbers: gathered from all processes, which all have to ask, if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save_sharded_adapter(model: nn.Module, directory: str | os.PathLike) -> None:
    """`save_adapter` of a sharded model: every process must call it, and the first one writes.

    What it writes is what one process writes, and what PEFT loads. Errors are those of `save_adapter`, on the
    first process. All leave together. Chapter 17.
    """
    with torch.no_grad():
        gathered = {
            layer: {name: whole(getattr(layer, name)) for name in ("lora_A", "lora_B")}
            for layer in lora_layers(model).values()
        }
    try:
        if not dist.is_initialized() or dist.get_rank() == 0:
            with holding(gathered):
                save_adapter(model, directory)
    finally:
        if dist.is_initialized():
            dist.barrier()


@contextmanager
def holding(tensors: dict[nn.Module, dict[str, Tensor]]) -> Iterator[None]:
    """Modules hold other tensors as parameters for a while, by name."""
    before = {module: dict(module._parameters) for module in tensors}
    try:
        for module, named in tensors.items():
            module._parameters.update({name: nn.Parameter(t, False) for name, t in named.items()})
        yield
    finally:
        for module, named in before.items():
            module._parameters.update(named)
