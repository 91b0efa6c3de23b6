"""The ledger: bytes by what they are for; and those that a model and its optimizer hold between two steps."""

from dataclasses import dataclass, fields

from lora2qlora.memory.methods import ADAMW, Full, LoRA, Optimizer, QLoRA, trained_tensors
from lora2qlora.memory.shape import LlamaShape


@dataclass(frozen=True)
class MemoryLedger:
    """[bytes] held at one moment of a training step, by what they are for; `total` is their sum."""

    weights: int = 0  # the base, embedding, norms and buffers; in 4 bits only the codes
    constants: int = 0  # quantization constants
    adapters: int = 0
    gradients: int = 0  # of what trains
    optimizer: int = 0
    activations: int = 0  # kept for the backward pass
    logits: int = 0  # everything as wide as the vocabulary
    transient: int = 0  # lives for an operation or two

    @property
    def total(self) -> int:
        """[bytes] of all components."""
        return sum(getattr(self, field.name) for field in fields(self))


COMPONENTS = tuple(field.name for field in fields(MemoryLedger))


def static_memory(
    shape: LlamaShape, method: Full | LoRA | QLoRA, optimizer: Optimizer = ADAMW
) -> MemoryLedger:
    """[bytes] held between two steps, when gradients are gone: weights, constants, adapters, optimizer."""
    linears = [out * in_ for out, in_ in shape.linears.values()]
    outside = shape.parameters - shape.layers * sum(linears)
    weights = outside * method.dtype.itemsize
    weights += shape.angle_kinds * 2 * 4 * (shape.head_dim // 2)  # rotary frequencies, twice
    weights += method.dtype.itemsize * (shape.traits.scaled == "embedding")  # by which number
    if isinstance(method, QLoRA):
        weights += shape.layers * sum(-(-size // 2) for size in linears)
        constants = shape.layers * sum(nf4_constants(size, method) for size in linears)
    else:
        weights += shape.layers * sum(linears) * method.dtype.itemsize
        constants = 0
    trained = trained_tensors(shape, method)
    adapters = 0 if isinstance(method, Full) else sum(size for _, size in trained)
    states = sum(optimizer.bytes_for(count, size) for count, size in trained)
    states += optimizer.shared_bytes if any(count >= optimizer.smallest for count, _ in trained) else 0
    return MemoryLedger(weights=weights, constants=constants, adapters=adapters, optimizer=states)


def nf4_constants(count: int, method: QLoRA) -> int:
    """[bytes] beside the codes of a weight of `count` numbers in NF4."""
    blocks = -(-count // method.block_size)
    return 4 * blocks if method.group_size is None else blocks + 4 * -(-blocks // method.group_size) + 4
