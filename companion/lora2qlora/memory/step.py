"""One training step of a model on a tape: forward, backward, and the optimizer's turn."""

import itertools

from lora2qlora.memory.block import Block
from lora2qlora.memory.methods import Full, LoRA, Optimizer, QLoRA
from lora2qlora.memory.ranks import OUTER, Groups, Undivided
from lora2qlora.memory.shape import LlamaShape
from lora2qlora.memory.tape import Checkpoint, Size, Tape


class Step:
    """The operations of one step of `batch` sequences of `length` tokens."""

    def __init__(
        self,
        tape: Tape,
        shape: LlamaShape,
        method: Full | LoRA | QLoRA,
        batch: int,
        length: int,
        checkpointing: bool,
        groups: Groups | Undivided | None = None,
    ):
        self.tape, self.shape, self.method, self.checkpointing = tape, shape, method, checkpointing
        self.groups, self.tokens = groups or Undivided(shape, method), batch * length
        self.batch, self.length = batch, length
        self.full, self.width = isinstance(method, Full), method.dtype.itemsize
        self.block = Block(tape, shape, method, self.tokens)

    def forward_and_backward(self) -> None:
        """Embedding, blocks, norm, head, loss, and back."""
        tape, shape, groups, pulls = self.tape, self.shape, self.groups, []
        tape.new(8 * self.tokens)  # the token ids
        groups.forward(OUTER)
        x, pull_embedding = self.embedding()
        positions = tape.new(8 * self.length)
        width = 4 if shape.traits.wide_angles else self.width
        sizes = 2 * shape.angle_kinds * [self.length * shape.head_dim * width]
        angles = [tape.new(size, "activations") for size in sizes]
        embedded = tape.hold(x)
        for layer in range(1, shape.layers + 1):
            turns = not shape.unturned or layer % shape.unturned > 0
            groups.forward(layer)
            y, pull = self.checkpointed(x, turns) if self.checkpointing else self.block(x, turns)
            groups.leave(layer)
            pulls.append((pull, x.needs))
            tape.drop(x)
            x = y
        y, pull_norm = self.block.norm(x)
        tape.drop(x, embedded)
        if not self.checkpointing:  # nobody will compute a block again
            tape.drop(positions)
        gradient, of_head, losses = self.loss(y)
        gradient = pull_norm(gradient)
        for layer in range(shape.layers, 0, -1):
            groups.backward(layer)
            pull, goes_on = pulls[layer - 1]
            gradient = pull(gradient)
            if goes_on:  # the hook is on the gradient of what came in
                groups.reduce(layer)
            if layer == shape.traits.far:  # the first that needs them is the last of these
                tape.drop(*angles[2:])
        tape.drop(*angles[:2])
        if self.checkpointing:
            tape.drop(positions)
        pull_embedding(gradient, of_head)
        groups.end()
        tape.drop(*losses)

    def embedding(self):
        """The first hidden states, in some families times a number."""
        tape, shape = self.tape, self.shape
        # With checkpointing transformers wants a gradient of the embedding's output, frozen or not.
        needs = self.full or self.checkpointing
        x, pull_scaled, leaf = tape.new(self.tokens * shape.hidden * self.width, needs=needs), None, None
        if shape.traits.scaled:
            leaf, (x, pull_scaled) = x, self.block.scale(x)
            # Only Granite's embedding ends before the number, and then waits for its gradient.
            if self.full or not needs or shape.traits.scaled != "all":
                tape.drop(leaf)
                leaf = None

        def pullback(gradient, of_head):
            if pull_scaled and gradient:
                gradient = pull_scaled(gradient)
            if leaf:
                tape.drop(leaf)
            if self.full:
                tape.new(shape.vocabulary * shape.hidden * self.width, "gradients")
                if shape.tied:  # the embedding's gradient, and the head's is added to it
                    tape.drop(of_head)
            if gradient:
                tape.drop(gradient)

        return x, pullback

    def checkpointed(self, x: Size, turns: bool):
        """A block that keeps its input alone, and is computed again when its backward pass begins."""
        tape = self.tape
        tape.checkpoint = Checkpoint(lambda: self.block(x, turns))
        y, pull = self.block(x, turns)
        tape.checkpoint = None
        kept = tape.hold(x)
        if kept.kind == "transient":
            tape.move(kept, "activations")

        def pullback(gradient):
            gradient = pull(gradient)
            tape.drop(kept)
            return gradient

        return y, pullback

    def loss(self, x: Size):
        """LM head and cross-entropy in float32, forward and backward: gradients of x and of the head."""
        tape, shape, n = self.tape, self.shape, self.tokens
        wide, exact = n * shape.vocabulary * self.width, n * shape.vocabulary * 4
        saved = [tape.save(x)] if self.full else []
        logits = tape.new(wide, "logits")
        if shape.traits.scaled == "all":
            unscaled, logits = logits, tape.new(wide, "logits")
            tape.drop(unscaled)
        as_float = tape.cast(logits, exact, "logits", keep=True)
        padded = tape.new(8 * self.batch * (self.length + 1))
        labels = tape.new(8 * n) if self.batch > 1 else tape.hold(padded)  # one row lies as it should
        log_softmax = tape.new(exact, "logits")
        loss, weights = tape.new(4), tape.new(4)
        tape.drop(as_float, padded, logits, x)
        self.groups.free_late()
        tape.mark()
        one = tape.new(4)
        self.groups.backward(OUTER)
        of_loss = tape.new(exact, "logits")
        tape.drop(labels, weights)
        of_logits = tape.new(exact, "logits")
        tape.drop(of_loss, log_softmax)
        of_logits = tape.cast(of_logits, wide, "logits")
        if shape.traits.scaled == "all":
            of_scaled, of_logits = of_logits, tape.new(wide, "logits")
            tape.drop(of_scaled)
        of_head = tape.new(shape.vocabulary * shape.hidden * self.width, "gradients") if self.full else None
        gradient = tape.new(n * shape.hidden * self.width)
        tape.drop(of_logits)
        tape.release(*saved)
        return gradient, of_head, (loss, one)

    def update(self, optimizer: Optimizer) -> None:
        """The optimizer's turn: what it needs for all parameters at once, or for one after the other."""
        tape, sizes = self.tape, self.groups.trained
        tape.mark()
        tape.drop(tape.new(optimizer.all_copies * sum(sizes)))
        if optimizer.own_copies:
            for last, size in itertools.pairwise([0, *sizes]):
                tape.drop(tape.new(last), *[tape.new(size) for _ in range(optimizer.own_copies)])
