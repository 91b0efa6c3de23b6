"""Where every byte of a training step goes: a ledger that predicts it, and a tracker that measures it.

The ledger goes through the operations of a step of a Llama-like model one by one, as autograd does, and
keeps count of what is held: a tape of sizes instead of numbers. The measurement counts live storages, or asks
the CUDA allocator. The simulation measures a step of any causal model on tensors without numbers. Chapter 11.

Left out: what the device itself takes (context, kernels, workspaces inside an operation) and what an
allocator holds in reserve beyond what it handed out.
"""

from lora2qlora.memory.base import shape_of
from lora2qlora.memory.divided import divided_memory
from lora2qlora.memory.families import LINEARS
from lora2qlora.memory.ledger import COMPONENTS, MemoryLedger, static_memory
from lora2qlora.memory.methods import (
    ADAMW,
    ADAMW_8BIT,
    ADAMW_32,
    ADAMW_FOREACH,
    ADAMW_FUSED,
    SGD,
    SGD_MOMENTUM,
    Full,
    LoRA,
    Optimizer,
    QLoRA,
)
from lora2qlora.memory.prediction import PHASES, StepForecast, forecast, training_memory
from lora2qlora.memory.presets import SHAPES
from lora2qlora.memory.shape import LlamaShape
from lora2qlora.memory.simulation import simulate_step
from lora2qlora.memory.static import StaticReport, static_of
from lora2qlora.memory.tracker import PeakReport, storage_bytes, track_peak, track_step
from lora2qlora.memory.traffic import Traffic, step_flops, step_traffic

__all__ = [  # noqa: RUF022 (in the order in which one meets them)
    "LINEARS", "LlamaShape", "SHAPES", "shape_of",
    "Full", "LoRA", "QLoRA", "Optimizer",
    "ADAMW", "ADAMW_FOREACH", "ADAMW_FUSED", "ADAMW_32", "ADAMW_8BIT", "SGD", "SGD_MOMENTUM",
    "MemoryLedger", "COMPONENTS", "static_memory",
    "PHASES", "StepForecast", "training_memory", "forecast",
    "storage_bytes", "PeakReport", "track_peak", "track_step",
    "simulate_step", "StaticReport", "static_of",
    "divided_memory", "Traffic", "step_traffic", "step_flops",
]  # fmt: skip
