"""A tape of sizes: what autograd holds during a step, in bytes instead of numbers.

It knows what is allocated, held, saved for the backward pass and released, and when a checkpointed block is
computed again. The operations themselves stand in the files after this one.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict

from lora2qlora.memory.ledger import MemoryLedger


class Size:
    """A tensor of which only the bytes are known; it lives while something holds it."""

    __slots__ = ("holders", "kind", "needs", "saved", "size")

    def __init__(self, size: int, kind: str, needs: bool):
        self.size, self.kind, self.needs = size, kind, needs
        self.holders, self.saved = 1, 0  # how many hold it; for how many of them autograd does


class Slot:
    """A tensor saved for the backward pass. In a checkpointed block it is empty until it is needed."""

    __slots__ = ("checkpoint", "tensor")

    def __init__(self, checkpoint: "Checkpoint | None" = None):
        self.tensor, self.checkpoint = None, checkpoint


class Checkpoint:
    """A block that keeps its input alone: how to compute it again, and what it saves then."""

    def __init__(self, forward: Callable):
        self.forward, self.slots = forward, []
        self.empty, self.made = iter(self.slots), []  # slots yet to fill, tensors made in the second pass


class EarlyStop(Exception):
    """The last saved tensor of a block is computed again: the rest of its forward pass is not needed."""


class Tape:
    """Counts the bytes held by component, and remembers the fullest moment of each phase."""

    def __init__(self, static: MemoryLedger):
        self.held, self.total = asdict(static), static.total
        self.curve, self.starts, self.peaks = [], [], []
        self.checkpoint, self.again = None, None  # the block in its first, or its second, forward pass
        self.mark()

    def mark(self) -> None:
        """A phase begins."""
        self.starts.append(len(self.curve))
        self.curve.append(self.total)
        self.most = self.total
        self.peaks.append(tuple(self.held.values()))

    def new(self, size: int, kind: str = "transient", needs: bool = False) -> Size:
        """A tensor is allocated, and held once; `needs` is whether a gradient must reach it."""
        self.held[kind] += size
        self.total = total = self.total + size
        self.curve.append(total)
        if total > self.most:
            self.most, self.peaks[-1] = total, tuple(self.held.values())
        tensor = Size(size, kind, needs)
        if self.again:
            self.again.made.append(tensor)
        return tensor

    def hold(self, tensor: Size) -> Size:
        """One holder more."""
        tensor.holders += 1
        return tensor

    def drop(self, *tensors: Size) -> None:
        """One holder less for each; without a holder a tensor is freed."""
        for tensor in tensors:
            tensor.holders -= 1
            if not tensor.holders:
                self.held[tensor.kind] -= tensor.size
                self.total -= tensor.size

    def cast(self, tensor: Size, size: int, kind: str = "transient", keep: bool = False) -> Size:
        """A tensor in a dtype in which it takes `size` bytes: itself, if it does already.

        The caller's hold on it goes, unless it is to be kept.
        """
        if tensor.size == size:
            return self.hold(tensor) if keep else tensor
        other = self.new(size, kind)
        if not keep:
            self.drop(tensor)
        return other

    def add(self, first: Size | None, second: Size) -> Size:
        """Two gradients of one tensor, added in place."""
        if first is not None:
            self.drop(first)
        return second

    def move(self, tensor: Size, kind: str) -> None:
        """A tensor counts towards another component."""
        self.held[tensor.kind] -= tensor.size
        self.held[kind] += tensor.size
        tensor.kind = kind

    def save(self, tensor: Size) -> Slot:
        """Autograd keeps a tensor for the backward pass; in a checkpointed block only its place."""
        if self.checkpoint:
            self.checkpoint.slots.append(slot := Slot(self.checkpoint))
            return slot
        slot = next(self.again.empty) if self.again else Slot()
        slot.tensor = self.hold(tensor)
        tensor.saved += 1
        if tensor.kind == "transient":
            self.move(tensor, "activations")
        if self.again and slot is self.again.slots[-1]:
            raise EarlyStop
        return slot

    def load(self, *slots: Slot) -> None:
        """Saved tensors are needed: the first such call computes a checkpointed block again."""
        for slot in slots:
            if slot.tensor is None:
                self.recompute(slot.checkpoint)

    def recompute(self, checkpoint: Checkpoint) -> None:
        """The forward pass of a block again, up to its last saved tensor, keeping what it saves."""
        self.again = checkpoint
        with suppress(EarlyStop):
            checkpoint.forward()
        self.again = None
        for tensor in checkpoint.made:  # the names of the forward pass are gone
            if tensor.holders > tensor.saved:
                tensor.holders = tensor.saved + 1
                self.drop(tensor)

    def release(self, *slots: Slot) -> None:
        """The backward pass is done with saved tensors."""
        for slot in slots:
            tensor, slot.tensor = slot.tensor, None
            tensor.saved -= 1
            if not tensor.saved and tensor.holders > 1 and tensor.kind == "activations":
                self.move(tensor, "transient")
            self.drop(tensor)
