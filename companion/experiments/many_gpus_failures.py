"""What goes wrong with 4-bit models over several cards, each made to happen by two processes, and its cure.

torchrun --standalone --nproc-per-node 2 companion/experiments/many_gpus_failures.py --out figures.json
torchrun --standalone --nproc-per-node 2 companion/experiments/many_gpus_failures.py --hang --out figures.json
"""

import argparse
import json
import re
import time
import warnings
from datetime import timedelta
from pathlib import Path

import bitsandbytes as bnb
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from lora2qlora.lora import LoRALinear
from lora2qlora.memory import storage_bytes
from lora2qlora.sharding import make_shardable, shard
from many_gpus_models import batch_of, build, my_part, trained
from many_gpus_work import Sent
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

CPU = torch.device("cpu")


def flat(model, **options):
    """A model under FSDP1, which lays a group's parameters into one flat one."""
    return FSDP1(model, device_id=CPU, **options)


def by_fsdp2(model, precision=None):
    """Torch's fully_shard alone, without the checks of `shard`."""
    policy = precision or MixedPrecisionPolicy()
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def by_accelerate(model):
    """Accelerate's FSDP2, as its config file sets it up."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # On CPUs accelerate 1.15 takes DDP whatever its config says, without a word: so it does FSDP here too.
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
    return accelerator.prepare(model, optimizer)[0]


def step(model) -> dict:
    """Of one step: loss, the norm of this rank's gradients, and its bytes of parameters and buffers."""
    loss = model(**my_part(batch_of(0))).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    gradients = [getattr(g, "_local_tensor", g) for g in gradients]
    norm = sum(g.double().square().sum() for g in gradients) ** 0.5
    return {
        "loss": f"{loss.item():.4f}",
        "gradient": f"{float(norm):.4f}",
        "bytes": storage_bytes(model),
    }


def integer_storage(cured: bool) -> dict:
    model = build("bnb", storage=torch.float32 if cured else torch.uint8)
    alone = ModuleWrapPolicy({bnb.nn.Linear4bit})
    return step(flat(model, use_orig_params=True, auto_wrap_policy=alone))


def bytes_beside_floats(cured: bool) -> dict:
    model = build("qlora")
    if cured:
        return step(shard(model) and model)
    make_shardable(model)
    return step(flat(model, use_orig_params=True))


def frozen_beside_trained(cured: bool) -> dict:
    return step(flat(build("lora"), use_orig_params=cured))


def adapters_in_other_dtype(cured: bool) -> dict:
    """A base and adapters in bf16, but for one in float32, as a checkpoint may bring it."""
    model = build("lora").to(torch.bfloat16)
    if not cured:
        next(m for m in model.modules() if isinstance(m, LoRALinear)).lora_A.data = torch.randn(8, 128)
    return step(by_fsdp2(model))


def replicated(cured: bool) -> dict:
    return step(by_accelerate(build("bnb", storage=torch.float32 if cured else torch.uint8)))


def ours_by_accelerate(cured: bool) -> dict:
    model = build("qlora")
    if cured:
        make_shardable(model)
    return step(by_accelerate(model))


def quant_state_lost(cured: bool) -> dict:
    model = build("bnb", storage=torch.float32)
    if not cured:
        for module in model.modules():
            if getattr(module, "quant_state", None) is not None:
                module.quant_state = None
    return step(by_fsdp2(model))


def uint8_under_fsdp2(cured: bool) -> dict:
    return step(by_fsdp2(build("bnb", storage=torch.float32 if cured else torch.uint8)))


def bytes_cast(cured: bool) -> dict:
    """Mixed precision casts floats, and bitsandbytes' bytes stored as floats are some."""
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    return step(by_fsdp2(build("qlora" if cured else "bnb"), precision) if not cured else _sharded(precision))


def _sharded(precision):
    model = build("qlora")
    shard(model, precision=precision)
    return model


def checkpointing_after(cured: bool) -> dict:
    """Checkpointing put around blocks that are sharded already gathers as before, but names change."""
    model = build("qlora")
    wrap = lambda m: apply_activation_checkpointing(  # noqa: E731
        m, check_fn=lambda module: isinstance(module, LlamaDecoderLayer)
    )
    if cured:
        wrap(model)
    before = set(model.state_dict())
    blocks = [m for m in model.modules() if type(m).__name__.endswith("LlamaDecoderLayer")]
    shard(model, blocks=list(model.model.layers) if cured else blocks)
    if not cured:
        wrap(model)
    with Sent() as sent:
        figures = step(model)
    same = before == set(model.state_dict())
    return figures | {"all-gathers": sent.calls[0], "names as before": same}


CASES = {
    "integer storage in a flat parameter (FSDP1)": integer_storage,
    "bytes beside floats in a flat parameter (FSDP1)": bytes_beside_floats,
    "frozen beside trained in a flat parameter (FSDP1)": frozen_beside_trained,
    "adapters in two dtypes (FSDP2)": adapters_in_other_dtype,
    "bitsandbytes replicated without a word (accelerate, FSDP2)": replicated,
    "NF4Linear replicated without a word (accelerate, FSDP2)": ours_by_accelerate,
    "quant_state lost (FSDP2)": quant_state_lost,
    "bitsandbytes in uint8 (FSDP2)": uint8_under_fsdp2,
    "bytes cast by mixed precision (FSDP2)": bytes_cast,
    "checkpointing after sharding (FSDP2)": checkpointing_after,
}


def tried(function, cured: bool) -> dict:
    """What a case gives, or the error that it raises, and its warnings."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            figures = function(cured)
        except Exception as error:
            figures = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"}
    said = {str(w.message).splitlines()[0][:200] for w in heard if w.category is UserWarning}
    return figures | ({"warnings": sorted(said)} if said else {})


def hang() -> dict:
    """Rank 1 has a batch less, as from a loader that is not divided evenly: rank 0 waits for it."""
    model = _sharded(None)
    start, steps = time.monotonic(), 3 - dist.get_rank()
    try:
        for number in range(steps):
            model(**my_part(batch_of(number))).loss.backward()
        time.sleep(30 * dist.get_rank())
    except RuntimeError as error:
        said = re.sub(r"\[/.*?\]\s*", "", str(error))  # the path of a source file of gloo
        return {"error": said.splitlines()[0][:300], "seconds": round(time.monotonic() - start, 1)}
    return {"error": "", "seconds": round(time.monotonic() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument(
        "--hang", action="store_true", help="the case in which a rank waits, with its timeout"
    )
    options = parser.parse_args()
    dist.init_process_group("gloo", timeout=timedelta(seconds=10 if options.hang else 60))
    if options.hang:
        figures = {"ranks disagree": {"met": hang()}}
    else:
        figures = {n: {"met": tried(f, False), "cured": tried(f, True)} for n, f in CASES.items()}
    if dist.get_rank() == 0:
        Path(options.out).write_text(json.dumps({"figures": figures}), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
