"""Where every byte of a training step goes: a ledger that predicts it, and a tracker that measures it.

The ledger goes through the operations of a step of a Llama-like model one by one, as autograd does, and
keeps count of what is held: a tape of sizes instead of numbers. The measurement counts live storages, or asks
the CUDA allocator. Chapter 11.

Left out: what the device itself takes (context, kernels, workspaces inside an operation) and what an
allocator holds in reserve beyond what it handed out.
"""

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora2qlora.adapters import count_parameters
from lora2qlora.nf4 import PIECE

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def check_count(name: str, count: int) -> None:
    """ValueError unless a size is an int of at least 1."""
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {count!r}")


# --- what is trained, and how --------------------------------------------------------------------


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama-like model: gated MLP, RMSNorm, rotary positions, no biases."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    kv_heads: int | None = None  # as many as heads unless given
    head_size: int | None = None  # hidden / heads unless given
    tied: bool = False  # the LM head is the embedding

    def __post_init__(self):
        for field in fields(self):
            size = getattr(self, field.name)
            optional = field.name in ("kv_heads", "head_size") and size is None
            if field.name != "tied" and not optional:
                check_count(field.name, size)
        if self.heads % (self.kv_heads or self.heads) or (self.hidden % self.heads and not self.head_size):
            raise ValueError(f"heads must divide hidden, and kv_heads divide heads, got {self}")

    @property
    def head_dim(self) -> int:
        """Numbers in one head."""
        return self.head_size or self.hidden // self.heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the linear layers of one block, in the order in which they are used."""
        q, kv = self.heads * self.head_dim, (self.kv_heads or self.heads) * self.head_dim
        h, i = self.hidden, self.intermediate
        return dict(zip(LINEARS, [(q, h), (kv, h), (kv, h), (h, q), (i, h), (i, h), (h, i)], strict=True))

    @property
    def parameters(self) -> int:
        """How many parameters such a model has, each counted once."""
        block = sum(out * in_ for out, in_ in self.linears.values()) + 2 * self.hidden
        return self.layers * block + self.hidden + (2 - self.tied) * self.vocabulary * self.hidden


# Published shapes. 175B has GPT-3's width and depth in the form of a Llama.
SHAPES = {
    "SmolLM2-135M": LlamaShape(576, 30, 9, 1536, 49152, kv_heads=3, tied=True),
    "Llama-3.2-1B": LlamaShape(2048, 16, 32, 8192, 128256, kv_heads=8, tied=True),
    "LLaMA-7B": LlamaShape(4096, 32, 32, 11008, 32000),
    "Llama-3.1-8B": LlamaShape(4096, 32, 32, 14336, 128256, kv_heads=8),
    "LLaMA-13B": LlamaShape(5120, 40, 40, 13824, 32000),
    "LLaMA-33B": LlamaShape(6656, 60, 52, 17920, 32000),
    "LLaMA-65B": LlamaShape(8192, 80, 64, 22016, 32000),
    "Llama-2-70B": LlamaShape(8192, 80, 64, 28672, 32000, kv_heads=8),
    "175B": LlamaShape(12288, 96, 96, 32768, 50257),
}


@dataclass(frozen=True)
class Full:
    """Full fine-tuning: every parameter trains, in `dtype`."""

    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class LoRA:
    """A frozen base in `dtype`, and adapters of one rank over some of the linear layers of every block."""

    rank: int = 16
    targets: tuple[str, ...] = LINEARS
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype = torch.float32

    def __post_init__(self):
        check_count("rank", self.rank)
        if not self.targets or not set(self.targets) <= set(LINEARS):
            raise ValueError(f"targets are some of {LINEARS}, got {self.targets!r}")


@dataclass(frozen=True)
class QLoRA(LoRA):
    """LoRA over a base in NF4; embedding, norms and LM head stay in `dtype`."""

    block_size: int = 64
    group_size: int | None = 256  # None: no double quantization
    compute_dtype: torch.dtype = torch.bfloat16


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


# --- the ledger ----------------------------------------------------------------------------------


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
) -> MemoryLedger:
    """[bytes] by component at the fullest moment of a training step of `batch` sequences of `length` tokens.

    `model_or_shape` is the base model before it is adapted or quantized, on the meta device too, or its
    shape alone. `checkpointing` keeps only the input of each block, and computes the rest twice. The step
    is one after the first: the optimizer's states are there. The model is a Llama of transformers with
    sdpa attention, the loss its own, with logits in float32; adapters are `LoRALinear` over `NF4Linear`.

    Raises ValueError: a model that no LlamaShape describes, sizes below 1; TypeError: anything else that
    does not fit. QLoRA, sections 2 and 3. Chapter 11.
    """
    return forecast(model_or_shape, method, batch, length, checkpointing, optimizer).peak


def forecast(
    model_or_shape: nn.Module | LlamaShape,
    method: Full | LoRA | QLoRA,
    batch: int = 1,
    length: int = 512,
    checkpointing: bool = False,
    optimizer: Optimizer = ADAMW,
) -> StepForecast:
    """The whole step that `training_memory` takes the peak of; arguments and errors as there. Chapter 11."""
    shape = model_or_shape if isinstance(model_or_shape, LlamaShape) else shape_of(model_or_shape)
    if not isinstance(method, Full | LoRA):
        raise TypeError(f"method is a Full, LoRA or QLoRA, got {method!r}")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer is an Optimizer such as ADAMW, got {optimizer!r}")
    check_count("batch", batch)
    check_count("length", length)
    tape = _Tape(static_memory(shape, method, optimizer))
    _Step(tape, shape, method, batch, length, checkpointing).run()
    tape.mark()
    sizes = [size for _, size in _trained(shape, method)]
    tape.drop(tape.new(optimizer.all_copies * sum(sizes)))
    for last, size in itertools.pairwise([0, *sizes]):
        if optimizer.own_copies:
            copies = [tape.new(last), *(tape.new(size) for _ in range(optimizer.own_copies))]
            tape.drop(*copies)
    peaks = [*tape.peaks, MemoryLedger(*tape.fullest)]
    end_bytes = tape.total - tape.held["gradients"]
    return StepForecast(
        tuple(tape.curve), tuple(tape.starts), dict(zip(PHASES, peaks, strict=True)), end_bytes
    )


def static_memory(
    shape: LlamaShape, method: Full | LoRA | QLoRA, optimizer: Optimizer = ADAMW
) -> MemoryLedger:
    """[bytes] held between two steps, when gradients are gone: weights, constants, adapters, optimizer."""
    linears = [out * in_ for out, in_ in shape.linears.values()]
    outside = shape.parameters - shape.layers * sum(linears)
    weights = outside * method.dtype.itemsize + 2 * 4 * (shape.head_dim // 2)  # rotary frequencies, twice
    if isinstance(method, QLoRA):
        weights += shape.layers * sum(-(-size // 2) for size in linears)
        constants = shape.layers * sum(nf4_constants(size, method) for size in linears)
    else:
        weights += shape.layers * sum(linears) * method.dtype.itemsize
        constants = 0
    trained = _trained(shape, method)
    adapters = 0 if isinstance(method, Full) else sum(size for _, size in trained)
    states = sum(optimizer.bytes_for(count, size) for count, size in trained)
    states += optimizer.shared_bytes if any(count >= optimizer.smallest for count, _ in trained) else 0
    return MemoryLedger(weights=weights, constants=constants, adapters=adapters, optimizer=states)


def nf4_constants(count: int, method: QLoRA) -> int:
    """[bytes] beside the codes of a weight of `count` numbers in NF4."""
    blocks = -(-count // method.block_size)
    return 4 * blocks if method.group_size is None else blocks + 4 * -(-blocks // method.group_size) + 4


def _trained(shape: LlamaShape, method: Full | LoRA | QLoRA) -> list[tuple[int, int]]:
    """(numbers, bytes) of every tensor that trains, in the order of model.parameters()."""
    if isinstance(method, Full):
        outer = [shape.vocabulary * shape.hidden]
        block = [out * in_ for out, in_ in shape.linears.values()] + 2 * [shape.hidden]
        counts = outer + shape.layers * block + [shape.hidden] + ([] if shape.tied else outer)
        width = method.dtype.itemsize
    else:
        pairs = [shape.linears[name] for name in LINEARS if name in method.targets]
        counts = shape.layers * [method.rank * n for out, in_ in pairs for n in (in_, out)]
        width = method.adapter_dtype.itemsize
    return [(count, count * width) for count in counts]


# --- a tape of sizes -----------------------------------------------------------------------------


class _Size:
    """A tensor of which only the bytes are known; it lives while something holds it."""

    __slots__ = ("holders", "kind", "needs", "saved", "size")

    def __init__(self, size: int, kind: str, needs: bool):
        self.size, self.kind, self.needs, self.holders, self.saved = size, kind, needs, 1, 0


class _Slot:
    """A tensor saved for the backward pass. In a checkpointed block it is empty until it is needed."""

    __slots__ = ("block", "tensor")

    def __init__(self, tensor: _Size | None, block: "_Block | None"):
        self.tensor, self.block = tensor, block


class _Block:
    """A checkpointed block: what it would have saved, and how to compute it again."""

    def __init__(self, forward: Callable):
        self.forward, self.slots = forward, []


class _EarlyStop(Exception):
    """The last saved tensor of a block is computed again: the rest of its forward pass is not needed."""


class _Tape:
    """Counts the bytes held by component, and remembers the fullest moment of each phase."""

    def __init__(self, static: MemoryLedger):
        self.held = {name: getattr(static, name) for name in COMPONENTS}
        self.total, self.curve, self.starts, self.peaks = static.total, [], [], []
        self.block, self.again = None, None  # the checkpointed block in its first, or second, forward pass
        self.mark()

    def mark(self) -> None:
        """A phase begins, and the one before is over."""
        if self.starts:
            self.peaks.append(MemoryLedger(*self.fullest))
        self.starts.append(len(self.curve))
        self.curve.append(self.total)
        self.most, self.fullest = self.total, tuple(self.held.values())

    def new(self, size: int, kind: str = "transient", needs: bool = False) -> _Size:
        """A tensor is allocated, and held once; `needs` is whether a gradient must reach it."""
        self.held[kind] += size
        self.total = total = self.total + size
        self.curve.append(total)
        if total > self.most:
            self.most, self.fullest = total, tuple(self.held.values())
        tensor = _Size(size, kind, needs)
        if self.again:
            self.again[1].append(tensor)
        return tensor

    def hold(self, tensor: _Size) -> _Size:
        """One holder more."""
        tensor.holders += 1
        return tensor

    def drop(self, *tensors: _Size) -> None:
        """One holder less for each; without a holder a tensor is freed."""
        for tensor in tensors:
            tensor.holders -= 1
            if not tensor.holders:
                self.held[tensor.kind] -= tensor.size
                self.total -= tensor.size

    def move(self, tensor: _Size, kind: str) -> None:
        """A tensor counts towards another component."""
        self.held[tensor.kind] -= tensor.size
        self.held[kind] += tensor.size
        tensor.kind = kind

    def save(self, tensor: _Size) -> _Slot:
        """Autograd keeps a tensor for the backward pass; in a checkpointed block only its place."""
        if self.block:
            self.block.slots.append(slot := _Slot(None, self.block))
            return slot
        slot = _Slot(None, None) if not self.again else next(self.again[0])
        slot.tensor = self.hold(tensor)
        tensor.saved += 1
        if tensor.kind == "transient":
            self.move(tensor, "activations")
        if self.again and slot is self.again[2]:
            raise _EarlyStop
        return slot

    def load(self, *slots: _Slot) -> None:
        """Saved tensors are needed: the first such call computes a checkpointed block again."""
        for slot in slots:
            if slot.tensor is None:
                self.recompute(slot.block)

    def recompute(self, block: _Block) -> None:
        """The forward pass of a block again, up to its last saved tensor, keeping what it saves."""
        self.again = (iter(block.slots), [], block.slots[-1])
        with suppress(_EarlyStop):
            block.forward()
        (_, tensors, _), self.again = self.again, None
        for tensor in tensors:  # the names of the forward pass are gone
            if tensor.holders > tensor.saved:
                tensor.holders = tensor.saved + 1
                self.drop(tensor)

    def release(self, *slots: _Slot) -> None:
        """The backward pass is done with saved tensors."""
        for slot in slots:
            tensor, slot.tensor = slot.tensor, None
            tensor.saved -= 1
            if not tensor.saved and tensor.holders > 1 and tensor.kind == "activations":
                self.move(tensor, "transient")
            self.drop(tensor)

    def add(self, first: _Size | None, second: _Size) -> _Size:
        """Two gradients of one tensor, added in place."""
        if first is not None:
            self.drop(first)
        return second


class _Step:
    """The operations of one training step on a tape; forward gives a size and its pullback.

    A pullback takes over the gradient of the output and returns that of the input, or None.
    """

    def __init__(self, tape, shape, method, batch, length, checkpointing):
        self.tape, self.shape, self.method, self.checkpointing = tape, shape, method, checkpointing
        self.batch, self.length, self.tokens = batch, length, batch * length
        self.full, self.width = isinstance(method, Full), method.dtype.itemsize
        self.compute = method.compute_dtype.itemsize if isinstance(method, QLoRA) else self.width

    def run(self) -> None:
        """Forward and backward: embedding, blocks, norm, head, loss, and back."""
        tape, shape, n = self.tape, self.shape, self.tokens
        tape.new(8 * n)  # the token ids
        # With checkpointing transformers wants a gradient of the embedding's output, frozen or not.
        embedded = x = tape.new(n * shape.hidden * self.width, needs=self.full or self.checkpointing)
        positions = tape.new(8 * self.length)
        angles = [tape.new(self.length * shape.head_dim * self.width, "activations") for _ in range(2)]
        tape.hold(embedded)
        pulls = []
        for _ in range(shape.layers):
            y, pull = self.checkpointed(x) if self.checkpointing else self.block(x)
            pulls.append(pull)
            tape.drop(x)
            x = y
        y, pull_norm = self.norm(x)
        tape.drop(x, embedded, *[positions] * (not self.checkpointing))
        gradient, gradient_of_head, losses = self.loss(y)
        gradient = pull_norm(gradient)
        for pull in reversed(pulls):
            gradient = pull(gradient)
        tape.drop(*angles, *[positions] * self.checkpointing)
        if self.full:
            tape.new(shape.vocabulary * shape.hidden * self.width, "gradients")
            tape.drop(*[gradient_of_head] * shape.tied)
        if gradient:
            tape.drop(gradient)
        tape.drop(*losses)

    def loss(self, x: _Size):
        """LM head and cross-entropy in float32, forward and backward: gradients of x and of the head."""
        tape, shape, n = self.tape, self.shape, self.tokens
        wide, exact = n * shape.vocabulary * self.width, n * shape.vocabulary * 4
        saved = [tape.save(x)] if self.full else []
        logits = tape.new(wide, "logits")
        as_float = tape.new(exact, "logits") if self.width != 4 else tape.hold(logits)
        padded = tape.new(8 * self.batch * (self.length + 1))
        labels = tape.new(8 * n) if self.batch > 1 else tape.hold(padded)  # one row lies as it should
        log_softmax = tape.new(exact, "logits")
        loss, weights = tape.new(4), tape.new(4)
        tape.drop(as_float, padded, logits, x)
        tape.mark()
        one = tape.new(4)
        of_loss = tape.new(exact, "logits")
        tape.drop(labels, weights)
        of_logits = tape.new(exact, "logits")
        tape.drop(of_loss, log_softmax)
        if self.width != 4:
            exact_gradient, of_logits = of_logits, tape.new(wide, "logits")
            tape.drop(exact_gradient)
        weight = tape.new(shape.vocabulary * shape.hidden * self.width, "gradients") if self.full else None
        gradient = tape.new(n * shape.hidden * self.width)
        tape.drop(of_logits)
        tape.release(*saved)
        return gradient, weight, (loss, one)

    def checkpointed(self, x: _Size):
        """A block that keeps its input alone, and is computed again when its backward pass begins."""
        tape = self.tape
        tape.block = _Block(lambda: self.block(x))
        y, pull = self.block(x)
        tape.block = None
        kept = tape.hold(x)
        if kept.kind == "transient":
            tape.move(kept, "activations")

        def pullback(gradient):
            gradient = pull(gradient)
            tape.drop(kept)
            return gradient

        return y, pullback

    def block(self, x: _Size):
        """Attention and MLP, each behind a norm and added to what came in."""
        tape, size = self.tape, self.tokens * self.shape.hidden * self.width
        normed, pull_norm = self.norm(x)
        mixed, pull_attention = self.attention(normed)
        tape.drop(normed)
        middle = tape.new(size, needs=mixed.needs or x.needs)
        tape.drop(mixed)
        normed, pull_second = self.norm(middle)
        changed, pull_mlp = self.mlp(normed)
        tape.drop(normed)
        y = tape.new(size, needs=changed.needs or middle.needs)
        tape.drop(changed, middle)

        def pullback(gradient):
            for needs, pulls in (
                (middle.needs, (pull_mlp, pull_second)),
                (x.needs, (pull_attention, pull_norm)),
            ):
                branch = tape.hold(gradient)
                for pull in pulls:
                    branch = pull(branch) if branch else None
                if not needs:
                    tape.drop(gradient)
                    return None
                gradient = tape.add(gradient, branch) if branch else gradient
            return gradient

        return y, pullback

    def norm(self, x: _Size):
        """RMSNorm as transformers has it: squares, mean, root and product in float32, then cast back."""
        tape, n, h, width = self.tape, self.tokens, self.shape.hidden, self.width
        needs = x.needs or self.full
        exact = tape.new(4 * n * h, needs=x.needs) if width != 4 else tape.hold(x)
        saved = [tape.save(exact)] if x.needs else []
        square = tape.new(4 * n * h)
        mean = tape.new(4 * n)
        tape.drop(square)
        shifted = tape.new(4 * n)
        root = tape.new(4 * n)
        saved += [tape.save(root)] if x.needs else []
        tape.drop(shifted)
        saved += [tape.save(exact), tape.save(root)] if x.needs else []
        product = tape.new(4 * n * h)
        tape.drop(root, exact)
        scaled = tape.new(width * n * h) if width != 4 else tape.hold(product)
        saved_scaled = [tape.save(scaled)] if self.full else []
        y = tape.new(width * n * h, needs=needs)
        tape.drop(scaled, product, mean)

        def pullback(gradient):
            of_scaled = tape.new(width * n * h) if x.needs else None
            if self.full:
                tape.load(*saved_scaled)
                long = tape.new(width * n * h)
                tape.new(width * h, "gradients")
                tape.drop(long)
                tape.release(*saved_scaled)
            tape.drop(gradient)
            return self.back_through_root(of_scaled, saved) if x.needs else None

        return y, pullback

    def back_through_root(self, gradient: _Size, saved: list[_Slot]) -> _Size:
        """The backward pass of RMSNorm from its cast on: the hungriest of the small operations."""
        tape, exact, short = self.tape, 4 * self.tokens * self.shape.hidden, 4 * self.tokens
        square, root, *both = saved
        if self.width != 4:
            rounded, gradient = gradient, tape.new(exact)
            tape.drop(rounded)
        of_x, long, of_root = tape.new(exact), tape.new(exact), tape.new(short)
        tape.drop(long, gradient)
        tape.release(*both)
        powers, of_shifted = [tape.new(short), tape.new(short)], tape.new(short)
        tape.drop(of_root, *powers)
        tape.release(root)
        of_square = tape.new(exact)
        tape.drop(of_shifted)
        doubled, of_x_too = [tape.new(exact), tape.new(exact)], tape.new(exact)
        tape.drop(of_square, *doubled)
        tape.release(square)
        gradient = tape.add(of_x, of_x_too)
        if self.width != 4:
            of_x, gradient = gradient, tape.new(self.width * self.tokens * self.shape.hidden)
            tape.drop(of_x)
        return gradient

    def attention(self, x: _Size):
        """q, k and v, turned by their positions, sdpa, and the output projection."""
        tape, n = self.tape, self.tokens
        q, pull_q = self.linear("q_proj", x)
        k, pull_k = self.linear("k_proj", x)
        v, pull_v = self.linear("v_proj", x)
        turned = [self.turn(q), self.turn(k)]
        tape.drop(q, k)
        needs = q.needs or k.needs or v.needs
        saved = [tape.save(t) for t in (*turned, v)] if needs else []
        mixed = tape.new(q.size, needs=needs)
        log_sums = tape.new(4 * n * self.shape.heads)
        saved += [tape.save(mixed), tape.save(log_sums)] if needs else []
        tape.drop(log_sums)
        y, pull_o = self.linear("o_proj", mixed)
        tape.drop(mixed, v, *turned)

        def pullback(gradient):
            gradient = pull_o(gradient)
            if not needs:
                return None
            of_q, of_k, of_v = (tape.new(t.size) for t in (q, k, v))
            tape.drop(gradient)
            tape.release(*saved)
            of_k = self.turn_back(of_k, k.needs)
            of_q = self.turn_back(of_q, q.needs)
            of_x = None
            for t, gradient, pull in ((v, of_v, pull_v), (k, of_k, pull_k), (q, of_q, pull_q)):
                if not t.needs:
                    tape.drop(*filter(None, (gradient,)))
                    continue
                if t is not v:  # it lies in memory head by head, and is copied
                    by_head, gradient = gradient, tape.new(t.size)
                    tape.drop(by_head)
                of_x = pull(gradient, of_x)
            return of_x

        return y, pullback

    def turn(self, x: _Size) -> _Size:
        """Rotary positions: x cos + (x turned by halves) sin."""
        tape, size = self.tape, x.size
        by_cos, negated = tape.new(size), tape.new(size // 2)
        halves = tape.new(size)
        tape.drop(negated)
        by_sin = tape.new(size)
        tape.drop(halves)
        y = tape.new(size, needs=x.needs)
        tape.drop(by_cos, by_sin)
        return y

    def turn_back(self, gradient: _Size, needs: bool) -> _Size | None:
        """The backward pass of `turn`."""
        tape, size = self.tape, gradient.size
        if not needs:
            tape.drop(gradient)
            return None
        by_sin, negated = tape.new(size), tape.new(size // 2)
        first = tape.new(size)
        tape.drop(negated)
        second = tape.new(size)
        tape.drop(by_sin)
        both = tape.add(first, second)
        by_cos = tape.new(size)
        tape.drop(gradient)
        return tape.add(both, by_cos)

    def mlp(self, x: _Size):
        """down(silu(gate(x)) · up(x))."""
        tape = self.tape
        gate, pull_gate = self.linear("gate_proj", x)
        saved_gate = [tape.save(gate)] if gate.needs else []
        opened = tape.new(gate.size, needs=gate.needs)
        tape.drop(gate)
        up, pull_up = self.linear("up_proj", x)
        saved = [tape.save(opened)] if up.needs else []
        saved += [tape.save(up)] if opened.needs else []
        product = tape.new(up.size, needs=opened.needs or up.needs)
        tape.drop(opened, up)
        y, pull_down = self.linear("down_proj", product)
        tape.drop(product)

        def pullback(gradient):
            gradient, of_x = pull_down(gradient), None
            if not product.needs:
                return None
            of_opened = tape.new(up.size) if opened.needs else None
            of_up = tape.new(up.size) if up.needs else None
            tape.drop(gradient)
            tape.release(*saved)
            if of_up:
                of_x = pull_up(of_up)
            if of_opened:
                of_gate = tape.new(up.size)
                tape.drop(of_opened)
                tape.release(*saved_gate)
                of_x = pull_gate(of_gate, of_x)
            return of_x

        return y, pullback

    def linear(self, name: str, x: _Size):
        """A linear layer of a block as the method has it: trained, or frozen, in NF4, adapted."""
        out, in_ = self.shape.linears[name]
        base = self.quantized if isinstance(self.method, QLoRA) else self.plain
        if self.full or name not in self.method.targets:
            return base(x, out, in_)
        return self.adapted(x, out, in_, base)

    def plain(self, x: _Size, out: int, in_: int):
        """y = x Wᵀ. Only a weight that trains keeps its input."""
        tape, n, width = self.tape, self.tokens, self.width
        saved = [tape.save(x)] if self.full else []
        saved += [tape.save(_Size(0, "weights", False))] if x.needs else []  # W itself: no byte more
        y = tape.new(n * out * width, needs=x.needs or self.full)

        def pullback(gradient, of_x=None):
            tape.load(*saved)
            if self.full:
                tape.new(out * in_ * width, "gradients")
            if x.needs:
                of_x = tape.add(of_x, tape.new(n * in_ * width))
            tape.drop(gradient)
            tape.release(*saved)
            return of_x

        return y, pullback

    def quantized(self, x: _Size, out: int, in_: int):
        """y = x Ŵᵀ, with Ŵ dequantized for the moment, forward and backward."""
        tape, n = self.tape, self.tokens
        cast_x = self.cast(x, n * in_ * self.compute, self.compute != self.width, keep=True)
        weight = self.dequantize(out * in_)
        y = tape.new(n * out * self.compute)
        tape.drop(weight, cast_x)
        saved = [tape.save(_Size(0, "weights", False))] if x.needs else []
        y = self.cast(y, n * out * self.width, self.compute != self.width)
        y.needs = x.needs

        def pullback(gradient, of_x=None):
            gradient = self.cast(gradient, n * out * self.compute, self.compute != self.width)
            tape.load(*saved)
            weight = self.dequantize(out * in_)
            of_cast_x = tape.new(n * in_ * self.compute)
            tape.drop(weight, gradient)
            tape.release(*saved)
            return tape.add(of_x, self.cast(of_cast_x, n * in_ * self.width, self.compute != self.width))

        return y, pullback

    def cast(self, tensor: _Size, size: int, differs: bool, keep: bool = False) -> _Size:
        """A tensor in another dtype, or itself; the caller's hold on it goes, unless it is to be kept."""
        if not differs:
            return self.tape.hold(tensor) if keep else tensor
        other = self.tape.new(size)
        if not keep:
            self.tape.drop(tensor)
        return other

    def dequantize(self, count: int) -> _Size:
        """The dense weight, by way of its absmax values and of pieces of some 2^18 numbers."""
        tape, method = self.tape, self.method
        dense = tape.new(count * self.compute)
        blocks = 4 * -(-count // method.block_size)
        absmax = []
        if method.group_size is not None:
            steps = [tape.new(blocks) for _ in range(2)]
            absmax = [tape.new(blocks)]
            tape.drop(*steps)
        piece = max(1, PIECE // (2 * method.block_size)) * 2 * method.block_size
        # Codes in 8 and in 32 bits and values in 32; from the second piece on the last values are there too.
        tape.drop(tape.new(64 + (9 * count if count <= piece else 13 * piece)), *absmax)
        return dense

    def adapted(self, x: _Size, out: int, in_: int, base: Callable):
        """y = base(x) + (α / r) B A x as `LoRALinear` has it, with a cast wherever the dtypes differ."""
        tape, n, width, rank = self.tape, self.tokens, self.width, self.method.rank
        own = self.method.adapter_dtype.itemsize
        wide = max(own, width)
        y, pull_base = base(x, out, in_)
        cast_x = self.cast(x, n * in_ * own, own != width, keep=True)
        saved_x = tape.save(cast_x)
        unscaled = tape.new(n * rank * own)
        tape.drop(cast_x)
        low = tape.new(n * rank * own)
        tape.drop(unscaled)
        saved_low = tape.save(low)
        update = tape.new(n * out * own)
        total = tape.new(n * out * wide)
        tape.drop(update)
        total = self.cast(total, n * out * width, wide != width)
        tape.drop(y, low)
        total.needs = True

        def pullback(gradient, of_x=None):
            gradient = self.cast(gradient, n * out * wide, wide != width)
            of_y = self.cast(gradient, n * out * width, wide != width, keep=True) if x.needs else None
            gradient = self.cast(gradient, n * out * own, wide != own)
            tape.load(saved_low, saved_x)
            tape.new(out * rank * own, "gradients")
            of_low = tape.new(n * rank * own)
            tape.drop(gradient)
            tape.release(saved_low)
            of_unscaled = tape.new(n * rank * own)
            tape.drop(of_low)
            tape.new(rank * in_ * own, "gradients")
            if x.needs:
                of_cast_x = tape.new(n * in_ * own)
            tape.drop(of_unscaled)
            tape.release(saved_x)
            if not x.needs:
                return None
            of_x = tape.add(of_x, self.cast(of_cast_x, n * in_ * width, own != width))
            return pull_base(of_y, of_x)

        return total, pullback


# --- what a model has, and what it takes ---------------------------------------------------------


def shape_of(model: nn.Module) -> LlamaShape:
    """The LlamaShape of a base model, by its config; it need not hold any numbers.

    Raises ValueError: it has other parameters than such a shape (biases, say, or adapters already);
    TypeError: no model with a config that names the sizes of a Llama.
    """
    config = getattr(model, "config", None)
    try:
        shape = LlamaShape(
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            intermediate=config.intermediate_size,
            vocabulary=config.vocab_size,
            kv_heads=config.num_key_value_heads,
            head_size=getattr(config, "head_dim", None),
            tied=config.tie_word_embeddings,
        )
    except AttributeError as error:
        raise TypeError(
            f"need a LlamaShape or a Llama-like model with a config, got {type(model).__name__} ({error})"
        ) from error
    if (counted := count_parameters(model).total) != shape.parameters:
        raise ValueError(
            f"{type(model).__name__} has {counted:,} parameters, a Llama of its sizes {shape.parameters:,}: "
            "pass the base model, before adapters, or a LlamaShape"
        )
    return shape


def storage_bytes(*holders: nn.Module | torch.optim.Optimizer | Tensor) -> int:
    """[bytes] of the storages behind modules' parameters and buffers, optimizers' states and tensors.

    A storage counts once and whole, however many tensors look into it: tied weights once, a slice as much
    as what it was cut from. Gradients do not count. Raises TypeError: none of these. Chapter 11.
    """
    storages = {}
    for tensor in _tensors(holders):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _tensors(holders: Iterable) -> Iterator[Tensor]:
    for holder in holders:
        if isinstance(holder, Tensor):
            yield holder
        elif isinstance(holder, nn.Module):
            yield from holder.parameters()
            yield from holder.buffers()
        elif isinstance(holder, torch.optim.Optimizer):
            yield from (leaf for leaf in tree_leaves(dict(holder.state)) if isinstance(leaf, Tensor))
        else:
            raise TypeError(f"can weigh modules, optimizers and tensors, got {type(holder).__name__}")


@dataclass(frozen=True)
class PeakReport:
    """What `track_peak` saw. On CUDA the curve has the peak of each function alone."""

    peak_bytes: int
    start_bytes: int  # held at the start, of what the functions used
    end_bytes: int
    peaks: tuple[int, ...]  # [bytes] at most during each function
    curve: tuple[int, ...]  # [bytes] held after each allocation
    starts: tuple[int, ...]  # where in the curve each function begins


def track_peak(
    *functions: Callable[[], object], device: str | torch.device = "cpu", held: Iterable = ()
) -> PeakReport:
    """Call functions one after the other, and say how many bytes of tensors were held at most.

    On CUDA the allocator says it. Elsewhere every operation of torch is watched: a storage lives from the
    operation that returns it until it is freed. One that was there before counts from the start, if it is
    in `held` (modules, optimizers, tensors) or an operation reads it. Workspaces inside an operation are
    not seen. Under the watch autograd adds gradients out of place, which it otherwise does in place: one
    more tensor for a moment, where several meet.

    Raises ValueError: no function. Chapter 11. torch's own MemTracker does not take frozen parameters.
    """
    if not functions:
        raise ValueError("track_peak needs a function to call")
    if torch.device(device).type == "cuda":
        return _track_cuda(functions, device)
    watch = _LiveStorages()
    for tensor in _tensors(held):
        watch.see(tensor, is_new=False)
    for function in functions:
        watch.starts.append(len(watch.events))
        with watch:
            function()
    return watch.report()


class _LiveStorages(TorchDispatchMode):
    """Births and deaths of storages, in order: positive bytes for one, negative for the other."""

    def __init__(self):
        super().__init__()
        self.events, self.starts, self.before, self.alive = [], [], 0, set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        from_numbers = function is torch.ops.aten.lift_fresh.default  # torch.tensor([...])
        for leaf in tree_leaves((arguments, options)):
            self.see(leaf, is_new=from_numbers)
        result = function(*arguments, **(options or {}))
        for leaf in tree_leaves(result):
            self.see(leaf, is_new=True)
        return result

    def see(self, leaf, is_new: bool) -> None:
        """Count a storage when it is first met, and when it goes."""
        if not isinstance(leaf, Tensor) or not (size := leaf.untyped_storage().nbytes()):
            return
        storage = leaf.untyped_storage()
        if (key := storage._cdata) in self.alive:
            return
        self.alive.add(key)
        if is_new:
            self.events.append(size)
        else:
            self.before += size

        def end():
            self.alive.discard(key)
            self.events.append(-size)

        weakref.finalize(storage, end).atexit = False

    def report(self) -> PeakReport:
        """The running total, from what was there before."""
        total, curve, starts = self.before, [], []
        for i, change in enumerate([*self.events, 0]):
            for _ in range(self.starts.count(i)):
                starts.append(len(curve))
                curve.append(total)
            if change > 0:
                curve.append(total + change)
            total += change
        bounds = [*starts, len(curve)]
        peaks = tuple(max(curve[a:b]) for a, b in itertools.pairwise(bounds))
        return PeakReport(max(curve), self.before, total, peaks, tuple(curve), tuple(starts))


def _track_cuda(functions, device) -> PeakReport:
    """The same by the CUDA allocator: the high-water mark of each function."""
    start, peaks = torch.cuda.memory_allocated(device), []
    for function in functions:
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        peaks.append(torch.cuda.max_memory_allocated(device))
    end, peaks = torch.cuda.memory_allocated(device), tuple(peaks)
    return PeakReport(max(peaks), start, end, peaks, peaks, tuple(range(len(peaks))))


def track_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, watch: Callable = track_peak
) -> PeakReport:
    """Measure one training step on `ids` [batch, length] in its three phases, as PHASES names them.

    The model is one of transformers, or takes `input_ids` and `labels` and returns a `.loss` as those do.
    Gradients are gone before and after. Let a step go by before: the first one makes the optimizer's states.
    """
    losses = []

    def forward():
        losses.append(model(input_ids=ids, labels=ids).loss)

    def step():
        optimizer.step()
        optimizer.zero_grad()

    optimizer.zero_grad()
    return watch(forward, lambda: losses.pop().backward(), step, device=ids.device, held=(model, optimizer))
