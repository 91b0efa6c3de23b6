"""QLoRA with transformers' Trainer over several processes, as users start it; the same script on GPUs.

    accelerate launch --config_file fsdp2.yaml companion/experiments/many_gpus_trainer.py --out figures.json

`--write-config fsdp2.yaml --processes 2` writes such a file for this machine and ends.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from lora2qlora.memory import storage_bytes
from lora2qlora.sharding import make_shardable, save_sharded_adapter
from many_gpus_models import batch_of, build
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

CONFIG = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_cpu_ram_efficient_loading: false
machine_rank: 0
mixed_precision: 'no'
num_machines: 1
num_processes: {processes}
main_process_port: 0
use_cpu: {use_cpu}
"""


def train(options) -> dict:
    """Losses by step, what this process holds of the model, and how many parameters are divided."""
    model = build("qlora")
    if not options.plain:
        make_shardable(model)
    rows = [
        {key: value[row] for key, value in batch_of(step).items()} for step in range(8) for row in range(8)
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=8 // options.ranks,
            max_steps=6,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            weight_decay=0.01,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            seed=0,
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        if options.ranks > 1 and not torch.cuda.is_available():
            # accelerate 1.15 turns FSDP on for GPUs alone: on CPUs it takes DDP, whatever its config says.
            trainer.accelerator.state.distributed_type = DistributedType.FSDP
            trainer.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # of the config file
            trainer.is_fsdp_enabled = True
        trainer.train()
    found = trainer.model_wrapped
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    divided = sum(isinstance(p, DTensor) for p in found.parameters())
    if options.adapter:
        save_sharded_adapter(found, options.adapter)
    return {"losses": losses, "bytes": storage_bytes(found), "divided parameters": divided}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="a file for the figures, which the first rank writes")
    parser.add_argument("--adapter", help="a folder for the adapter")
    parser.add_argument("--plain", action="store_true", help="without make_shardable: the base is replicated")
    parser.add_argument("--write-config", help="write a config file for accelerate launch, and end")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if options.write_config:
        use_cpu = str(not torch.cuda.is_available()).lower()
        text = CONFIG.format(processes=options.processes, use_cpu=use_cpu)
        Path(options.write_config).write_text(text, encoding="utf-8")
        return
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    options.ranks = state.num_processes
    figures = train(options)
    if state.is_main_process:
        Path(options.out).write_text(json.dumps({"figures": figures}), encoding="utf-8")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
