"""A training step measured in each of several processes over which a model is divided."""

import torch
import torch.distributed as dist
from lora2qlora.memory import storage_bytes, track_step
from lora2qlora.sharding import shard
from test_memory import MAKE, built
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


class OutOfSight(DefaultReduceScatter):
    """Gloo reduces a copy of its own, which NCCL does not need: the watch does not see it."""

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        work = dist.reduce_scatter_single(output_tensor, input_tensor, op=op, group=group, async_op=True)
        with _disable_current_modes():
            work.wait()


class Sent(TorchDispatchMode):
    """Counts collectives, and the bytes that each must send: a part to every other rank."""

    def __init__(self):
        super().__init__()
        self.bytes, self.calls = [0, 0], [0, 0]

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        kinds = ("_allgather_base_", "_reduce_scatter_base_")
        kind = next((i for i, name in enumerate(kinds) if function._schema.name == f"c10d::{name}"), None)
        if kind is not None:
            part = arguments[kind].nbytes  # the smaller of output and input
            self.bytes[kind] += (dist.get_world_size() - 1) * min(part, arguments[1 - kind].nbytes)
            self.calls[kind] += 1
        return function(*arguments, **(options or {}))


def measured_step(shape, method, batch, length, checkpointing, optimizer) -> tuple:
    """On this rank: static bytes after a step; of the next, the peak of each phase, and the curve."""
    model = built(shape, method, checkpointing)
    shard(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_reduce_scatter(OutOfSight())
    made = MAKE[optimizer]([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(shape.vocabulary, (batch, length))
    track_step(model, made, ids, watch=lambda *functions, **_: [f() for f in functions])
    static = storage_bytes(model, made)
    sent = Sent()
    with sent:
        report = track_step(model, made, ids)
    return static, report.peaks, sent.bytes, sent.calls


def measured_steps(settings) -> list[tuple]:
    return [measured_step(*setting) for setting in settings]
