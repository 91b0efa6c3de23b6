"""A model divided among processes by FSDP2, on the tape: what a rank holds, gathers, lets go and reduces.

A group is a block of the model, or what lies outside of all blocks. FSDP2 divides every parameter along its
first dimension, in parts that are rounded up. A group is gathered into one buffer, which is copied out into
one tensor a parameter; in the forward pass the buffer stays until the next group has its own, in the backward
pass the next group's buffer is filled meanwhile.
"""

from lora2qlora.memory.divided import Parameter, all_parameters, block_parameters, outer_parameters
from lora2qlora.memory.methods import Full, LoRA, QLoRA, trained_tensors
from lora2qlora.memory.shape import LlamaShape
from lora2qlora.memory.tape import Size, Tape

OUTER = 0  # the group of what lies outside of the blocks, which are counted from 1


class Group:
    """A group of parameters on the tape: gathered for a while, their gradients reduced to a part."""

    def __init__(self, tape: Tape, parameters: list[Parameter], ranks: int):
        self.tape = tape
        self.gathered = ranks * sum(p.part_bytes(ranks) for p in parameters)
        self.reduced = sum(p.part_bytes(ranks) for p in parameters if p.trains)
        self.buffer, self.whole, self.gradients, self.done = None, None, [], False

    def gather(self) -> None:
        """The buffer into which all ranks' parts go."""
        if self.whole is None and self.buffer is None:
            self.buffer = self.tape.new(self.gathered)

    def copy_out(self) -> None:
        """A tensor a parameter, beside the buffer."""
        if self.whole is None:
            self.whole = self.tape.new(self.gathered)

    def let_go(self) -> None:
        """Only this rank's parts are left."""
        if self.whole is not None:
            self.tape.drop(self.whole)
        self.whole = None


class Undivided:
    """One process: nothing is gathered, nothing reduced."""

    def __init__(self, shape: LlamaShape, method: Full | LoRA | QLoRA):
        self.trained = [size for _, size in trained_tensors(shape, method)]

    def forward(self, number: int) -> None:
        pass

    leave = backward = reduce = forward

    def end(self) -> None:
        pass

    free_late = end


class Groups:
    """All groups of a model: what their hooks do in a step, in the order in which they do it."""

    def __init__(self, tape: "ShardedTape", shape: LlamaShape, method: Full | LoRA | QLoRA, ranks: int):
        self.tape, self.ranks = tape, ranks
        self.trained = [p.part_bytes(ranks) for p in all_parameters(shape, method) if p.trains]
        self.groups = [Group(tape, outer_parameters(shape, method), ranks)]
        self.groups += [Group(tape, block_parameters(shape, method), ranks) for _ in range(shape.layers)]
        self.late, self.reducing = None, None  # buffers: of the last group forward, of the last one reduced
        self.current = self.groups[OUTER]  # whose gradients are being made

    def forward(self, number: int) -> None:
        """Before a group's forward pass: its buffer, its tensors, and the last one's buffer goes."""
        group = self.groups[number]
        group.gather()
        group.copy_out()
        self.free_late()
        self.late, group.buffer = group.buffer, None

    def leave(self, number: int) -> None:
        """After a block's forward pass; the outer group is not let go before its backward pass is over."""
        self.groups[number].let_go()

    def free_late(self) -> None:
        """The buffer that the last group of the forward pass left."""
        if self.late is not None:
            self.tape.drop(self.late)
        self.late = None

    def backward(self, number: int) -> None:
        """Before a group's backward pass: its tensors, and the buffer of the one that follows."""
        group = self.groups[number]
        self.turn_to(group)
        group.gather()
        if group.buffer is not None:
            group.copy_out()
            self.tape.drop(group.buffer)
            group.buffer = None
        following = number - 1 or None if number else len(self.groups) - 1
        if following:
            self.groups[following].gather()

    def turn_to(self, group: Group) -> None:
        """The gradients made from here on are this group's."""
        self.current.gradients += self.tape.made
        self.tape.made, self.current = [], group

    def reduce(self, number: int) -> None:
        """After a group's backward pass: it is let go, and its gradients are reduced to this rank's part."""
        group = self.groups[number]
        self.turn_to(self.groups[OUTER])
        group.let_go()
        group.done = True
        self.free_reducing()
        if group.reduced:
            self.reducing = self.tape.new(self.ranks * group.reduced)
            self.tape.drop(*group.gradients)
            self.tape.new(group.reduced, "gradients")
            self.tape.made = []

    def free_reducing(self) -> None:
        """The buffer of the last reduction."""
        if self.reducing is not None:
            self.tape.drop(self.reducing)
        self.reducing = None

    def end(self) -> None:
        """After the backward pass: what no hook has come to yet."""
        for number, group in enumerate(self.groups):
            if not group.done:
                self.reduce(number)
        self.free_reducing()


class ShardedTape(Tape):
    """A tape that remembers the gradients made since the last group was reduced."""

    made = ()

    def new(self, size: int, kind: str = "transient", needs: bool = False) -> Size:
        tensor = super().new(size, kind, needs)
        if kind == "gradients":
            self.made = [*self.made, tensor]
        return tensor
