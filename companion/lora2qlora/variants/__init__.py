"""Variants of LoRA, each over LoRALinear and in a few lines. Chapter 18."""

from lora2qlora.variants.dora import DoRALinear
from lora2qlora.variants.eva import eva_start
from lora2qlora.variants.loftq import loftq
from lora2qlora.variants.lora_plus import lora_plus_groups
from lora2qlora.variants.model import adapt
from lora2qlora.variants.pissa import as_plain_lora, pissa
from lora2qlora.variants.rslora import rslora_alpha

__all__ = [  # noqa: RUF022 (in the order in which one meets them)
    "rslora_alpha", "lora_plus_groups", "DoRALinear", "pissa", "as_plain_lora", "loftq", "eva_start",
    "adapt",
]  # fmt: skip
