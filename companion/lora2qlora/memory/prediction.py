"""A whole training step worked out beforehand: the curve of its bytes, and the peak of each phase."""

from dataclasses import dataclass
from functools import cached_property

from torch import nn

from lora2qlora.blockwise import check_size
from lora2qlora.memory.base import shape_of
from lora2qlora.memory.divided import divided_memory
from lora2qlora.memory.ledger import MemoryLedger, static_memory
from lora2qlora.memory.methods import ADAMW, Full, LoRA, Optimizer, QLoRA
from lora2qlora.memory.ranks import Groups, ShardedTape, Undivided
from lora2qlora.memory.shape import LlamaShape
from lora2qlora.memory.step import Step
from lora2qlora.memory.tape import Tape

PHASES = ("forward", "backward", "step")


@dataclass(frozen=True)
class StepForecast:
    """A training step as the ledger sees it: bytes held after every operation, and the peak of each phase."""

    curve: tuple[int, ...]  # [bytes] held after each allocation
    starts: tuple[int, ...]  # where in the curve each phase of PHASES begins
    peaks: dict[str, MemoryLedger]  # the fullest moment of each phase
    end_bytes: int  # held when the step is over and the gradients are gone

    @cached_property
    def peak(self) -> MemoryLedger:
        """The fullest moment of the step."""
        return max(self.peaks.values(), key=lambda ledger: ledger.total)


def training_memory(
    model_or_shape: nn.Module | LlamaShape,
    method: Full | LoRA | QLoRA,
    batch: int = 1,
    length: int = 512,
    checkpointing: bool = False,
    optimizer: Optimizer = ADAMW,
    ranks: int = 1,
) -> MemoryLedger:
    """[bytes] by component at the fullest moment of a training step of `batch` sequences of `length` tokens.

    `model_or_shape` is the base model before it is adapted or quantized, on the meta device too, or its
    shape alone; dtypes are the method's. `checkpointing` keeps only the input of each block, and computes
    the rest twice. The step is one after the first: the optimizer's states are there. The model is a Llama
    of transformers, the loss its own, with logits in float32; adapters are `LoRALinear` over `NF4Linear`.
    With `ranks` it is the first of so many processes, each with such a batch, over which `sharding.shard`
    divides the model; DDP takes what one process takes, and once more the gradients.

    Assumed are fused (sdpa) attention, no padding mask, no dropout and no autocast. Without checkpointing,
    dropout before the adapters adds a tenth or more to a small model's peak, a padding mask a few percent;
    autocast moves it too.

    Raises ValueError: a model that no LlamaShape describes, attention that slides a window within `length`,
    sizes or ranks below 1; TypeError: anything else that does not fit. QLoRA, sections 2, 3. Chapters 11, 17.
    """
    return forecast(model_or_shape, method, batch, length, checkpointing, optimizer, ranks).peak


def forecast(
    model_or_shape: nn.Module | LlamaShape,
    method: Full | LoRA | QLoRA,
    batch: int = 1,
    length: int = 512,
    checkpointing: bool = False,
    optimizer: Optimizer = ADAMW,
    ranks: int = 1,
) -> StepForecast:
    """The whole step that `training_memory` takes the peak of; arguments and errors as there. Chapter 11."""
    if isinstance(model_or_shape, str):
        raise TypeError("need a LlamaShape or a Llama-like model of it, got str: try shape_of")
    shape = model_or_shape if isinstance(model_or_shape, LlamaShape) else shape_of(model_or_shape)
    if not isinstance(method, Full | LoRA):
        raise TypeError(f"method is a Full, LoRA or QLoRA, got {method!r}")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer is an Optimizer such as ADAMW, got {optimizer!r}")
    check_size("batch", batch)
    check_size("length", length)
    check_size("ranks", ranks)
    if shape.window and shape.window <= length:
        raise ValueError(
            f"attention in a window of {shape.window} tokens takes a mask, which is not counted, from length "
            f"{shape.window} on; got length {length}: simulate_step counts it"
        )
    if ranks == 1:
        tape, groups = Tape(static_memory(shape, method, optimizer)), Undivided(shape, method)
    else:
        tape = ShardedTape(divided_memory(shape, method, optimizer, ranks))
        groups = Groups(tape, shape, method, ranks)
    step = Step(tape, shape, method, batch, length, checkpointing, groups)
    step.forward_and_backward()
    step.update(optimizer)
    peaks = {phase: MemoryLedger(*held) for phase, held in zip(PHASES, tape.peaks, strict=True)}
    end_bytes = tape.total - tape.held["gradients"]
    return StepForecast(tuple(tape.curve), tuple(tape.starts), peaks, end_bytes)
