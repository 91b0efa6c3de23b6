"""The bytes of any causal model between two steps, and which of its parameters stay at full size."""

import re
from collections import defaultdict
from dataclasses import dataclass

from torch import nn

from lora2qlora.lora import LoRALinear, is_linear
from lora2qlora.memory.config import Source
from lora2qlora.memory.ledger import MemoryLedger
from lora2qlora.memory.methods import ADAMW, Full, LoRA, Optimizer, QLoRA
from lora2qlora.memory.simulation import check_step, on_meta
from lora2qlora.qlora import NF4Linear


@dataclass(frozen=True)
class StaticReport:
    """What a model and its optimizer hold, and [bytes] of the stacks of matrices that are in no linear layer.

    The names of those stand for all layers, with * for a number. Neither `quantize_base` nor bitsandbytes
    quantizes them, and no adapter is put on them: the experts of most mixtures of experts.
    """

    ledger: MemoryLedger
    dense: dict[str, int]


def static_of(source: Source, method: Full | LoRA | QLoRA, optimizer: Optimizer = ADAMW) -> StaticReport:
    """[bytes] held between two steps by any causal model, mixtures of experts too, without its numbers.

    `source` and the errors are those of `simulate_step`, which counts a step; the ledger of `training_memory`
    knows no mixture of experts. Chapter 11.
    """
    check_step(method, 1, 1)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer is an Optimizer such as ADAMW, got {optimizer!r}")
    model = on_meta(source, method, checkpointing=False)
    held, dense, seen = defaultdict(int), defaultdict(int), set()
    trained = []
    for name, module in model.named_modules():
        tensors = [*module.named_parameters(prefix=name, recurse=False)]
        tensors += module.named_buffers(prefix=name, recurse=False)
        for own, tensor in tensors:
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            held[part(module, own)] += tensor.nbytes
            if tensor.requires_grad:
                trained.append((tensor.numel(), tensor.nbytes))
            if isinstance(tensor, nn.Parameter) and tensor.ndim > 2 and not is_linear(module):
                dense[re.sub(r"\b\d+\b", "*", own)] += tensor.nbytes
    states = sum(optimizer.bytes_for(count, size) for count, size in trained)
    states += optimizer.shared_bytes if any(count >= optimizer.smallest for count, _ in trained) else 0
    return StaticReport(MemoryLedger(**held, optimizer=states), dict(dense))


def part(module: nn.Module, name: str) -> str:
    """The component of the ledger that a tensor counts towards."""
    if isinstance(module, LoRALinear):
        return "adapters"
    is_constant = isinstance(module, NF4Linear) and name.split(".")[-1] not in ("packed", "bias")
    return "constants" if is_constant else "weights"
