"""Adapters: LoRA over a whole model, and files in PEFT's format. Chapters 04 and 15."""

from lora2qlora.adapters.merging import MergeCost, merge_cost, merge_quantized
from lora2qlora.adapters.model import (
    ParameterCount,
    add_lora,
    count_parameters,
    merge_lora,
    put_adapters,
    remove_lora,
)
from lora2qlora.adapters.names import naming
from lora2qlora.adapters.peft_config import CONFIG
from lora2qlora.adapters.peft_files import WEIGHTS, load_adapter, save_adapter
from lora2qlora.adapters.targets import find_targets, lora_layers

__all__ = [  # noqa: RUF022 (in the order in which one meets them)
    "find_targets", "lora_layers",
    "add_lora", "remove_lora", "merge_lora", "ParameterCount", "count_parameters",
    "put_adapters", "naming",
    "merge_quantized", "merge_cost", "MergeCost",
    "CONFIG", "WEIGHTS", "save_adapter", "load_adapter",
]  # fmt: skip
