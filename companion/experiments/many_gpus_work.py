"""What each process of many_gpus.py does; start it by torchrun, or alone: one part, figures to a file.

torchrun --standalone --nproc-per-node 2 companion/experiments/many_gpus_work.py bytes --out figures.json
"""

import argparse
import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lora2qlora.memory import storage_bytes, track_step
from lora2qlora.sharding import save_sharded_adapter, whole
from many_gpus_models import batch_of, build, divide, loss_of, mean_of_ranks, my_part, trained
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

RATE = 1e-3


class OutOfSight(DefaultReduceScatter):
    """Gloo reduces a copy of its own, which NCCL does not need: the watch does not see it."""

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        work = dist.reduce_scatter_single(output_tensor, input_tensor, op=op, group=group, async_op=True)
        with _disable_current_modes():
            work.wait()


class Sent(TorchDispatchMode):
    """Counts collectives of FSDP: all-gathers and reduce-scatters."""

    def __init__(self):
        super().__init__()
        self.calls = [0, 0]

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        kinds = ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_")
        if function._schema.name in kinds:
            self.calls[kinds.index(function._schema.name)] += 1
        return function(*arguments, **(options or {}))


def engines() -> list[str]:
    return ["ddp", "fsdp2"] if dist.is_initialized() and dist.get_world_size() > 1 else ["one"]


def weigh(method: str, engine: str, storage=torch.float32) -> dict:
    """[bytes] of this rank between two steps, and at the fullest moment of the second step."""
    model = divide(build(method, checkpointing=True, storage=storage), engine)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_reduce_scatter(OutOfSight())
    optimizer = torch.optim.AdamW(trained(model), lr=RATE, foreach=False)
    ids = batch_of(0, rows=2, length=64)["input_ids"]
    track_step(model, optimizer, ids, watch=lambda *functions, **_: [f() for f in functions])
    static = storage_bytes(model, optimizer)
    report = track_step(model, optimizer, ids)
    return {"static": static, "peak": report.peak_bytes, "start": report.start_bytes}


def part_bytes(options) -> dict:
    """Every method under every engine, this many processes; of each rank."""
    return weigh_all(("full", "lora", "qlora", "bnb"), engines())


def part_apart(options) -> dict:
    """The same with embedding and head in groups of their own."""
    return weigh_all(("full", "lora", "qlora"), ["apart"])


def weigh_all(methods: tuple, engines: list[str]) -> dict:
    figures = {}
    for method in methods:
        for engine in engines:
            mine = weigh(method, engine)
            ranks = [mine]
            if dist.is_initialized():
                dist.all_gather_object(ranks := [None] * dist.get_world_size(), mine)
            figures[f"{method} {engine}"] = ranks
    return figures


def run_steps(model, optimizer, steps: range, ragged: bool = False, divide_by: str = "global") -> list[float]:
    """Losses of steps of AdamW, the mean over ranks."""
    losses = []
    for step in steps:
        loss = loss_of(model, my_part(batch_of(step, ragged=ragged)), divide_by)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean_of_ranks(loss))
    return losses


def part_losses(options) -> dict:
    """Ten steps of every method and engine; ragged batches divided by the global and by the local count."""
    figures = {}
    for method in ("full", "lora", "qlora"):
        for engine in engines():
            for rows, divide_by in (("even", "local"), ("ragged", "global"), ("ragged", "local")):
                model = divide(build(method), engine)
                optimizer = torch.optim.AdamW(trained(model), lr=RATE)
                losses = run_steps(model, optimizer, range(10), rows == "ragged", divide_by)
                figures[f"{method} {engine} {rows} {divide_by}"] = losses
                if (method, rows) == ("qlora", "even") and options.folder:
                    bare = getattr(model, "module", model)
                    save_sharded_adapter(bare, Path(options.folder, f"{engine}-{options.ranks}"))
    return figures


def part_train(options) -> dict:
    """QLoRA under FSDP2 from a checkpoint, if there is one, to a step; a checkpoint after some steps.

    `--kill STEP` ends rank 1 by SIGKILL between the forward and the backward pass of that step.
    """
    model = divide(build("qlora"), "fsdp2" if options.ranks > 1 else "one")
    optimizer = torch.optim.AdamW(trained(model), lr=RATE)
    first, folder, losses = 0, Path(options.folder, "checkpoint"), {}
    done = Path(options.folder, "done.json")
    if done.exists():
        run_steps(model, optimizer, range(1))  # the optimizer's states must be there to be filled
        state, states = get_state_dict(model, optimizer)
        dcp.load({"model": state, "optimizer": states}, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=states)
        first = json.loads(done.read_text())["steps"]
    for step in range(first, options.steps):
        if options.kill == step and dist.get_rank() == 1:
            model.model.layers[2].register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        losses[step] = run_steps(model, optimizer, range(step, step + 1))[0]
        if step + 1 == options.save:
            state, states = get_state_dict(model, optimizer)
            dcp.save({"model": state, "optimizer": states}, checkpoint_id=folder, no_dist=options.ranks == 1)
            if options.rank == 0:
                done.write_text(json.dumps({"steps": step + 1}))
    weight = whole(model.get_parameter("model.layers.0.self_attn.q_proj.lora_B")).norm().item()
    return {"first": first, "losses": losses, "norm of a B": weight}


PARTS = {"bytes": part_bytes, "apart": part_apart, "losses": part_losses, "train": part_train}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", required=True, help="a file for the figures, which the first rank writes")
    parser.add_argument("--folder", default="", help="for adapters and checkpoints")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--save", type=int, default=0, help="a checkpoint after so many steps")
    parser.add_argument("--kill", type=int, default=-1, help="rank 1 dies in this step")
    options = parser.parse_args()
    if "RANK" in os.environ:  # started by torchrun or accelerate launch
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    is_one = not dist.is_initialized()
    options.ranks, options.rank = (1, 0) if is_one else (dist.get_world_size(), dist.get_rank())
    start = time.monotonic()
    figures = PARTS[options.part](options)
    if options.rank == 0:
        figures = {"figures": figures, "seconds": round(time.monotonic() - start, 1)}
        Path(options.out).write_text(json.dumps(figures), encoding="utf-8")
    if not is_one:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
