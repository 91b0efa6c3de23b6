"""A model's parameters one by one, and what a rank holds of each when FSDP2 divides them. Chapter 17."""

from dataclasses import dataclass

from lora2qlora.blockwise import check_size
from lora2qlora.memory.ledger import MemoryLedger, nf4_constants
from lora2qlora.memory.methods import ADAMW, Full, LoRA, Optimizer, QLoRA
from lora2qlora.memory.shape import LlamaShape

KINDS = ("weights", "constants", "adapters")


@dataclass(frozen=True)
class Parameter:
    """A parameter as FSDP2 sees it: `rows` along its first dimension, and what it is for."""

    rows: int
    numbers: int  # in a row
    width: int  # [bytes] of a number
    kind: str = "weights"  # a component of the ledger
    trains: bool = False

    def part(self, ranks: int) -> int:
        """Numbers in the part that the first rank holds, which is as large as any: rows are rounded up."""
        return -(-self.rows // ranks) * self.numbers

    def part_bytes(self, ranks: int) -> int:
        """[bytes] of that part."""
        return self.part(ranks) * self.width


def block_parameters(shape: LlamaShape, method: Full | LoRA | QLoRA) -> list[Parameter]:
    """The parameters of a block in the order of model.parameters(), NF4 bytes among them."""
    width, full, found = method.dtype.itemsize, isinstance(method, Full), []
    chosen = () if full else method.chosen(shape.order)
    vectors = list(shape.block)
    for name in shape.order:
        out, in_ = shape.linears[name]
        vectors.remove(out * in_)
        if name in chosen:
            own = method.adapter_dtype.itemsize
            found.append(Parameter(method.rank, in_, own, "adapters", True))
            found.append(Parameter(out, method.rank, own, "adapters", True))
        if not isinstance(method, QLoRA):
            found.append(Parameter(out, in_, width, trains=full))
        else:
            found.append(Parameter(-(-out * in_ // 2), 1, 1))
            if method.group_size is not None:
                found.append(Parameter(-(-out * in_ // method.block_size), 1, 1, "constants"))
        if name in shape.biases:
            vectors.remove(out)
            found.append(Parameter(out, 1, width, trains=full))
    return found + [Parameter(count, 1, width, trains=full) for count in vectors]


def outer_parameters(shape: LlamaShape, method: Full | LoRA | QLoRA) -> list[Parameter]:
    """What lies outside of the blocks: embedding, last norm, and the LM head if it is another."""
    width, full = method.dtype.itemsize, isinstance(method, Full)
    table = Parameter(shape.vocabulary, shape.hidden, width, trains=full)
    norm = Parameter(shape.hidden, 1, width, trains=full)
    return [table, norm] if shape.tied else [table, norm, table]


def all_parameters(shape: LlamaShape, method: Full | LoRA | QLoRA) -> list[Parameter]:
    """All of them, in the order of model.parameters()."""
    first, *last = outer_parameters(shape, method)
    return [first, *(shape.layers * block_parameters(shape, method)), *last]


def divided_memory(
    shape: LlamaShape, method: Full | LoRA | QLoRA, optimizer: Optimizer = ADAMW, ranks: int = 1
) -> MemoryLedger:
    """[bytes] that the first of `ranks` holds between two steps: parts of all but buffers.

    Buffers are rotary frequencies, a factor of the embedding, and the float constants of NF4 weights: scales
    and offset, or plain absmax. Raises ValueError: ranks below 1.
    """
    check_size("ranks", ranks)
    parameters = all_parameters(shape, method)
    held = {kind: sum(p.part_bytes(ranks) for p in parameters if p.kind == kind) for kind in KINDS}
    held["weights"] += shape.angle_kinds * 2 * 4 * (shape.head_dim // 2)
    held["weights"] += method.dtype.itemsize * (shape.traits.scaled == "embedding")
    if isinstance(method, QLoRA):
        sizes = [out * in_ for out, in_ in shape.linears.values()]
        codes = [-(-size // method.block_size) * (method.group_size is not None) for size in sizes]
        held["constants"] += shape.layers * (sum(nf4_constants(size, method) for size in sizes) - sum(codes))
    trained = [p for p in parameters if p.trains]
    states = sum(optimizer.bytes_for(p.part(ranks), p.part_bytes(ranks)) for p in trained)
    states += optimizer.shared_bytes if any(p.part(ranks) >= optimizer.smallest for p in trained) else 0
    return MemoryLedger(**held, optimizer=states)
