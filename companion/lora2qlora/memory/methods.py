"""What trains, and in how many bytes: the three methods, and what an optimizer keeps for each parameter."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lora2qlora.blockwise import FLOATS, check_size
from lora2qlora.memory.families import FUSED, LINEARS
from lora2qlora.memory.shape import LlamaShape


@dataclass(frozen=True)
class Full:
    """Full fine-tuning: every parameter trains, in `dtype`."""

    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self):
        check_float("dtype", self.dtype)


@dataclass(frozen=True)
class LoRA:
    """A frozen base in `dtype`, and adapters of one rank over some of the linear layers of every block.

    The targets LINEARS mean all of them, whatever a family calls them.
    """

    rank: int = 16
    targets: tuple[str, ...] = LINEARS
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype = torch.float32

    def __post_init__(self):
        check_size("rank", self.rank)
        if not self.targets or not set(self.targets) <= {*LINEARS, *FUSED}:
            raise ValueError(f"targets are some of {(*LINEARS, FUSED[0], FUSED[2])}, got {self.targets!r}")
        check_float("dtype", self.dtype)
        check_float("adapter_dtype", self.adapter_dtype)

    def chosen(self, names: Iterable[str]) -> list[str]:
        """Those of a model's linear layers that are adapted; ValueError where it has no such layer."""
        if set(self.targets) == set(LINEARS):
            return list(names)
        if missing := set(self.targets) - set(names):
            raise ValueError(f"the model has no {sorted(missing)}; targets are some of {tuple(names)}")
        return [name for name in names if name in self.targets]


@dataclass(frozen=True)
class QLoRA(LoRA):
    """LoRA over a base in NF4; embedding, norms and LM head stay in `dtype`."""

    block_size: int = 64
    group_size: int | None = 256  # None: no double quantization
    compute_dtype: torch.dtype = torch.bfloat16

    def __post_init__(self):
        super().__post_init__()
        check_size("block_size", self.block_size)
        if self.group_size is not None:
            check_size("group_size", self.group_size)
        check_float("compute_dtype", self.compute_dtype)


def check_float(name: str, dtype: torch.dtype) -> None:
    """TypeError unless a dtype is one in which a model trains."""
    if dtype not in FLOATS:
        raise TypeError(f"{name} must be one of {FLOATS}, got {dtype!r}")


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer keeps for each parameter, and what it needs while it steps."""

    states: int = 2  # numbers kept for each parameter
    state_bytes: int | None = None  # bytes of one; those of the parameter unless given
    counter_bytes: int = 4  # kept for each tensor: how many steps it took
    own_copies: int = 0  # temporaries as large as the parameter in hand; the last one lives a turn longer
    all_copies: int = 0  # temporaries as large as all parameters together
    block_size: int | None = None  # numbers of a state that share a float32 absmax
    smallest: int = 0  # a tensor with fewer numbers keeps its states in float32, without blocks
    shared_bytes: int = 0  # kept once: codebooks

    def bytes_for(self, count: int, size: int) -> int:
        """[bytes] kept between steps for a tensor of `count` numbers that takes `size` bytes itself."""
        if count < self.smallest:
            state = 4 * count
        else:
            state = size if self.state_bytes is None else self.state_bytes * count
            state += 4 * -(-count // self.block_size) if self.block_size else 0
        return self.states * state + self.counter_bytes


ADAMW = Optimizer(own_copies=2)  # torch.optim.AdamW parameter by parameter, its way on a CPU
ADAMW_FOREACH = Optimizer(all_copies=1)  # all parameters at once, its way on a GPU
ADAMW_FUSED = Optimizer()  # fused=True
ADAMW_32 = Optimizer(state_bytes=4)  # states in float32 whatever the parameters are in
# bitsandbytes' AdamW8bit
ADAMW_8BIT = Optimizer(2, 1, counter_bytes=0, block_size=256, smallest=4096, shared_bytes=2048)
SGD = Optimizer(states=0, counter_bytes=0)
SGD_MOMENTUM = Optimizer(states=1, counter_bytes=0)


def trained_tensors(shape: LlamaShape, method: Full | LoRA | QLoRA) -> list[tuple[int, int]]:
    """(numbers, bytes) of every tensor that trains, in the order of model.parameters()."""
    if isinstance(method, Full):
        outer = [shape.vocabulary * shape.hidden]
        counts = outer + shape.layers * shape.block + [shape.hidden] + ([] if shape.tied else outer)
        width = method.dtype.itemsize
    else:
        pairs = [shape.linears[name] for name in method.chosen(shape.order)]
        counts = shape.layers * [method.rank * n for out, in_ in pairs for n in (in_, out)]
        width = method.adapter_dtype.itemsize
    return [(count, count * width) for count in counts]
