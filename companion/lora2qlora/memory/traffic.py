"""What processes send each other in a training step, by formula. Chapter 17."""

from dataclasses import dataclass

from lora2qlora.blockwise import check_size
from lora2qlora.memory.divided import all_parameters, block_parameters, outer_parameters
from lora2qlora.memory.methods import Full, LoRA, QLoRA
from lora2qlora.memory.shape import LlamaShape


@dataclass(frozen=True)
class Traffic:
    """What one rank sends in a step [bytes], in how many calls, and what it computes meanwhile [FLOPs]."""

    all_gather: int
    reduce_scatter: int
    calls: tuple[int, int]  # of all-gather and of reduce-scatter
    flops: int

    @property
    def total(self) -> int:
        """[bytes] sent."""
        return self.all_gather + self.reduce_scatter

    def seconds(self, bytes_per_second: float) -> float:
        """[s] on the link, if nothing is hidden behind the computation."""
        return self.total / bytes_per_second


def step_traffic(
    shape: LlamaShape,
    method: Full | LoRA | QLoRA,
    ranks: int,
    batch: int = 1,
    length: int = 512,
    checkpointing: bool = False,
) -> Traffic:
    """Of a step of `sharding.shard`, with `batch` sequences of `length` tokens on each rank.

    A group of P bytes is gathered by sending a part, P / N, to each of N - 1 others, and its gradients are
    reduced by sending as much of them: a ring does neither with less. Blocks are gathered twice, forward and
    backward, what lies outside of them once. FLOPs are 2 a token and weight of a matrix forward, as many for
    the gradient of the input, as many again for that of a weight that trains, and 2 for computing a block
    again; attention's own are left out. Raises ValueError: sizes below 1. FSDP2's schedule; chapter 17.
    """
    for name, size in (("ranks", ranks), ("batch", batch), ("length", length)):
        check_size(name, size)
    block, outer = block_parameters(shape, method), outer_parameters(shape, method)
    gathered = sum(p.part_bytes(ranks) for p in outer) + 2 * shape.layers * sum(
        p.part_bytes(ranks) for p in block
    )
    reduced = sum(p.part_bytes(ranks) for p in all_parameters(shape, method) if p.trains)
    calls = (1 + 2 * shape.layers, shape.layers + isinstance(method, Full))
    return Traffic(
        (ranks - 1) * gathered,
        (ranks - 1) * reduced,
        calls,
        step_flops(shape, method, batch * length, checkpointing),
    )


def step_flops(shape: LlamaShape, method: Full | LoRA | QLoRA, tokens: int, checkpointing: bool) -> int:
    """[FLOPs] of the matrix products with weights in a step."""
    base = shape.layers * sum(out * in_ for out, in_ in shape.linears.values())
    adapters = 0
    if not isinstance(method, Full):
        pairs = [shape.linears[name] for name in method.chosen(shape.order)]
        adapters = shape.layers * method.rank * sum(out + in_ for out, in_ in pairs)
    head = shape.vocabulary * shape.hidden
    times = 4 + 2 * checkpointing
    trained = base + head if isinstance(method, Full) else adapters
    return tokens * (times * (base + adapters) + 4 * head + 2 * trained)
