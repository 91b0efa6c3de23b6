"""Adam's two states in 8 bits, their bytes, and what paging them moves. Chapter 12.

The states are stored block by block, as `blockwise` stores any tensor, and read back to 32 bits piece by
piece while a step is taken. Paging is a simulation: pages are counted, no memory is asked for.
"""

import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jaxtyping import Float, Float32
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora2qlora.blockwise import (
    FLOATS,
    BlockwiseQuantized,
    check_codebook,
    check_size,
    dequantize_blockwise,
    quantize_blockwise,
)
from lora2qlora.double_quantization import dynamic_codebook

PIECE = 2**16  # elements worked on at a time: their states in 32 bits stay in a processor's cache
STATES = ("exp_avg", "exp_avg_sq")  # torch's names of the two moments


def unsigned_dynamic_codebook() -> Float32[Tensor, "256"]:
    """The dynamic map without signs, for the second moment: seven decades, and 0, and 1.

    Decade i = 0 … 6 is (0.1, 1] · 10^(i - 6), cut into 2^(i + 1) equal parts, whose middles are the values:
    twice as many in each as `dynamic_codebook` has on one side. Equal bit for bit to bitsandbytes'
    `create_dynamic_map(signed=False)`. Dettmers et al. (2021, arXiv 2110.02861), section 2. Chapter 12.
    """
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + 1) + 1)
        values.append(10 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2)
    return torch.cat(values).sort().values


def adam_step(
    x: Float32[Tensor, " n"],
    grad: Float32[Tensor, " n"],
    m: Float32[Tensor, " n"],
    v: Float32[Tensor, " n"],
    step: int,
    group: dict,
) -> None:
    """One step of AdamW in place, of x, m and v, all in 32 bits; `step` t counts from 1.

    m ← β₁ m + (1 - β₁) g and v ← β₂ v + (1 - β₂) g², then x ← (1 - η λ) x and
    x ← x - η / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε)

    `group` holds lr η, betas, eps ε, weight_decay λ, as torch's optimizers keep them. Chapter 12.
    """
    lr, (beta1, beta2) = group["lr"], group["betas"]
    m.mul_(beta1).add_(grad, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    if group["weight_decay"]:
        x.mul_(1 - lr * group["weight_decay"])
    denominator = (v.sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
    x.addcdiv_(m, denominator, value=-lr / (1 - beta1**step))


def adam_step_8bit(
    x: Float[Tensor, " n"],
    grad: Float[Tensor, " n"],
    m: BlockwiseQuantized,
    v: BlockwiseQuantized,
    step: int,
    group: dict,
    codebooks: tuple[Tensor, Tensor],
    quantize: Callable[..., BlockwiseQuantized] = quantize_blockwise,
) -> None:
    """`adam_step` on states in 8 bits, in place: read them back, step, round them again, piece by piece.

    x is used before the states are rounded, so the rounding shows from the next step on. `quantize` has the
    signature of `quantize_blockwise`. Besides x and the states it needs a few pieces of memory. Chapter 12.
    """
    size = m.block_size
    length = max(1, PIECE // size) * size  # of a piece: whole blocks
    for start in range(0, len(x), length):
        piece, blocks = slice(start, start + length), slice(start // size, (start + length) // size)
        parts = [
            BlockwiseQuantized(q.indices[piece], q.absmax[blocks], x[piece].shape, torch.float32, size)
            for q in (m, v)
        ]
        moments = [dequantize_blockwise(q, code) for q, code in zip(parts, codebooks, strict=True)]
        values = x[piece].float()  # x itself where it is float32
        adam_step(values, grad[piece].float(), *moments, step, group)
        x[piece] = values
        for part, moment, codebook in zip(parts, moments, codebooks, strict=True):
            q = quantize(moment, codebook, size)
            part.indices.copy_(q.indices)
            part.absmax.copy_(q.absmax)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose states are kept in 8 bits: codes, and an absmax for each block of `block_size`.

    m is stored in the signed dynamic map, v in the unsigned one, by the nearest value; every step reads both
    back to 32 bits and takes `adam_step` before it rounds them again, so the first step is exactly Adam's.
    A tensor below `min_8bit_size` [elements] keeps 32-bit states. `update` may be set to a faster function
    like `adam_step_8bit`, and `codebooks` may be others; a state does not say which made it.

    bitsandbytes does the same, but on a CPU rounds to 65,536 even steps first, so that it stores no zero; on
    a GPU it decays after the step, skips elements that are not finite, and keeps the sign of m.

    Raises ValueError: options out of range, and in `step` a gradient that is not finite or whose square
    overflows (the message names the parameter; nothing is changed); TypeError: no float parameter or
    gradient. Dettmers et al. (2021, arXiv 2110.02861). Chapter 12.
    """

    update: Callable[..., None] = staticmethod(adam_step_8bit)

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        block_size: int = 256,
        min_8bit_size: int = 4096,
        codebooks: tuple[Tensor, Tensor] | None = None,
    ):
        check_size("block_size", block_size)
        self.block_size, self.min_8bit_size = block_size, min_8bit_size
        self.codebooks = codebooks or (dynamic_codebook(), unsigned_dynamic_codebook())
        for codebook in self.codebooks:
            check_codebook(codebook)
        if self.codebooks[1][0] < 0:
            raise ValueError("the codebook of the second moment has negative values, and no square is")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, group: dict) -> None:
        """Take more parameters, with options of their own; raises what the class says of options."""
        super().add_param_group(group)
        try:
            check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Take one step with the gradients that are there; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, parameter in enumerate(self._parameters()):
            check_gradient(index, parameter)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over a `state_dict()`, codes and absmax as they are; a copy, on the parameters' devices.

        Raises ValueError: other groups, or a state that does not fit its parameter by names, shapes and
        dtypes; the optimizer is unchanged then.
        """
        own = [len(group["params"]) for group in self.param_groups]
        saved = [len(group["params"]) for group in state_dict["param_groups"]]
        if own != saved:
            raise ValueError(f"this optimizer has groups of {own} parameters, the state is for {saved}")
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = dict(zip(indices, self._parameters(), strict=True))
        states = {index: state for index, state in state_dict["state"].items() if state}
        for index, state in states.items():
            if index not in parameters:
                raise ValueError(f"the state is for a parameter {index}, which no group has")
            check_state(index, state, self._start(parameters[index]))
        # torch's own loading would cast codes and absmax to the parameter's dtype
        super().load_state_dict({**state_dict, "state": {}})
        for index, state in states.items():
            device = parameters[index].device
            self.state[parameters[index]] = {
                name: value.to("cpu" if name == "step" else device, copy=True)
                for name, value in state.items()
            }

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _start(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before its first step: all zero, whatever the codes, as absmax is 0."""
        state = {"step": torch.zeros(())}
        small = parameter.numel() < self.min_8bit_size
        blocks = -(-parameter.numel() // self.block_size)
        for name in STATES:
            dtype = torch.float32 if small else torch.uint8
            state[name] = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
            if not small:
                state[f"{name}_absmax"] = torch.zeros(blocks, device=parameter.device)
        return state

    def _update(self, parameter: Tensor, group: dict) -> None:
        """One step of one parameter."""
        if not self.state[parameter]:
            self.state[parameter] = self._start(parameter)
        state = self.state[parameter]
        state["step"] += 1
        step = int(state["step"])
        x, grad = parameter.detach().reshape(-1), parameter.grad.reshape(-1)  # x: a copy if not contiguous
        moments = [state[name].view(-1) for name in STATES]
        if moments[0].dtype == torch.float32:
            values = x.float()
            adam_step(values, grad.float(), *moments, step, group)
            x.copy_(values)
        else:
            absmax = [state[f"{name}_absmax"] for name in STATES]
            stored = [
                BlockwiseQuantized(codes, scales, codes.shape, torch.float32, self.block_size)
                for codes, scales in zip(moments, absmax, strict=True)
            ]
            self.update(x, grad, *stored, step, group, self.codebooks)
        if not parameter.is_contiguous():
            parameter.copy_(x.view(parameter.shape))


def check_group(group: dict) -> None:
    """Raise what `AdamW8bit` says it raises of options and parameters."""
    if not 0 <= group["lr"] < math.inf or not 0 <= group["weight_decay"] < math.inf:
        raise ValueError(
            f"lr and weight_decay must not be negative, got {group['lr']}, {group['weight_decay']}"
        )
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas are two numbers in [0, 1), got {group['betas']}")
    if not 0 < group["eps"] < math.inf:
        raise ValueError(f"eps must be positive, as a second moment may be 0; got {group['eps']}")
    for index, parameter in enumerate(group["params"]):
        if parameter.dtype not in FLOATS:
            raise TypeError(f"parameter {index} of the group is {parameter.dtype}, need one of {FLOATS}")


def check_gradient(index: int, parameter: Tensor) -> None:
    """Raise what `AdamW8bit.step` says it raises of one parameter's gradient."""
    grad = parameter.grad
    if grad is None or not grad.numel():
        return
    if grad.layout != torch.strided or grad.dtype not in FLOATS:
        raise TypeError(
            f"the gradient of parameter {index} is {grad.layout}, {grad.dtype}: need dense floats"
        )
    least, most = grad.aminmax()  # says whether all are finite without a mask as large as the tensor
    largest = max(abs(least.item()), abs(most.item())) if least.isfinite() and most.isfinite() else math.inf
    if not largest < 1.8e19:  # the root of float32's largest number
        count = (~(grad.float().abs() < 1.8e19)).sum().item()
        raise ValueError(
            f"the gradient of parameter {index}, of shape {list(parameter.shape)}, is not finite, or its "
            f"square is not, in {count} of {grad.numel()} places: nothing was changed"
        )


def check_state(index: int, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """ValueError unless the state of a parameter has the expected names, shapes and dtypes."""

    def describe(tensors):
        return {name: f"{t.dtype} {list(t.shape)}" for name, t in sorted(tensors.items())}

    if describe(state) != describe(expected):
        raise ValueError(
            f"the state of parameter {index} does not fit: got {describe(state)}, need {describe(expected)}"
        )


def save_optimizer(optimizer: torch.optim.Optimizer, path: str | os.PathLike) -> None:
    """Write an optimizer's state to a safetensors file: the old file or the new one is there, never a part.

    Works for any whose states are tensors and whose options are plain numbers. Chapter 12.
    """
    path, saved = Path(path), optimizer.state_dict()
    tensors = {
        f"{index}.{name}": value.contiguous()
        for index, state in saved["state"].items()
        for name, value in state.items()
    }
    groups = json.dumps(saved["param_groups"])
    with TemporaryDirectory(prefix=".writing-", dir=path.parent) as partial:
        save_file(tensors, Path(partial, path.name), metadata={"param_groups": groups})
        os.replace(Path(partial, path.name), path)


def load_optimizer(optimizer: torch.optim.Optimizer, path: str | os.PathLike) -> None:
    """Take over the state that `save_optimizer` wrote; the optimizer is unchanged on any error.

    Raises FileNotFoundError; ValueError: a file that is cut short or no such file, or what the optimizer's
    own `load_state_dict` refuses. Chapter 12.
    """
    states: dict[int, dict] = {}
    try:
        with safe_open(path, framework="pt") as file:
            groups = json.loads((file.metadata() or {})["param_groups"])
            for key in file.keys():  # noqa: SIM118 (not a dictionary)
                index, name = key.split(".", 1)
                states.setdefault(int(index), {})[name] = file.get_tensor(key)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is cut short, or no optimizer's state ({error}): save it again") from error
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def adam_state_bytes(
    sizes: Iterable[int], bits: int = 8, block_size: int = 256, min_8bit_size: int = 4096
) -> int:
    """[bytes] that Adam keeps for tensors of these `sizes` [elements]: two states, and 4 to count steps.

    In 32 bits 8 a parameter; in 8 bits 2 + 8 / block_size, whole blocks counted, and 8 in a tensor
    below `min_8bit_size`. Exactly what `AdamW8bit` holds. Raises ValueError: other bits. Chapter 12.
    """
    if bits not in (8, 32):
        raise ValueError(f"states are kept in 8 or 32 bits, got {bits!r}")
    total = 0
    for n in sizes:
        in_8_bits = bits == 8 and n >= min_8bit_size
        total += 4 + (2 * n + 8 * -(-n // block_size) if in_8_bits else 8 * n)
    return total


@dataclass(frozen=True)
class PageTraffic:
    """[bytes] that one training step moved off the device and back onto it."""

    out_bytes: int
    in_bytes: int


class PagedMemory:
    """Pages that a driver may move off a device to make room, the least recently used first; a simulation.

    `reserve` says what the device holds that cannot be paged, such as weights and activations; `touch` uses
    a page, and brings it back if need be. `resident` lists pages, the least recently used first. A page is
    made on the device at its first touch. Least recently used, and 2 MiB pages, are assumptions.

    Raises ValueError: no size of at least 1, or a device too small. Chapter 12.
    """

    def __init__(self, capacity_bytes: int, page_bytes: int = 2**21):
        check_size("capacity_bytes", capacity_bytes)
        check_size("page_bytes", page_bytes)
        self.capacity_bytes, self.page_bytes, self.reserved_bytes = capacity_bytes, page_bytes, 0
        self.out_bytes = self.in_bytes = 0
        self._resident: OrderedDict[int, None] = OrderedDict()
        self._evicted: set[int] = set()

    @property
    def resident(self) -> list[int]:
        """The pages on the device, the least recently used first."""
        return list(self._resident)

    @property
    def room(self) -> int:
        """[pages] that fit beside what is reserved."""
        return (self.capacity_bytes - self.reserved_bytes) // self.page_bytes

    def reserve(self, size_bytes: int) -> None:
        """Hold `size_bytes` in all besides pages from now on; pages that no longer fit are evicted."""
        if not 0 <= size_bytes <= self.capacity_bytes:
            raise ValueError(
                f"out of memory: {size_bytes:,} bytes that cannot be paged, on a device of "
                f"{self.capacity_bytes:,}"
            )
        self.reserved_bytes = size_bytes
        self._evict_to(self.room)

    def touch(self, page: int) -> None:
        """Use a page: it is on the device afterwards, and the most recently used."""
        if self.room < 1:
            raise ValueError(
                f"no room for a page of {self.page_bytes:,} bytes beside {self.reserved_bytes:,}"
            )
        if page not in self._resident:
            self._evict_to(self.room - 1)
            self.in_bytes += self.page_bytes * (page in self._evicted)
            self._evicted.discard(page)
            self._resident[page] = None
        self._resident.move_to_end(page)

    def _evict_to(self, pages: int) -> None:
        while len(self._resident) > pages:
            page, _ = self._resident.popitem(last=False)
            self._evicted.add(page)
            self.out_bytes += self.page_bytes


def page_traffic(
    state_bytes: Sequence[int],
    capacity_bytes: int,
    peak_bytes: Sequence[int],
    rest_bytes: int,
    page_bytes: int = 2**21,
) -> list[PageTraffic]:
    """What each training step moves if optimizer states are paged: one `PageTraffic` for each peak.

    `state_bytes` are the states in the order of the optimizer's step, each on pages of its own. In step i the
    forward and backward pass hold `peak_bytes[i]` besides; then the optimizer touches every page once, in
    order, beside `rest_bytes` (weights, gradients). The rules are those of `PagedMemory`, and so are
    the errors. QLoRA, section 3, "Paged Optimizers". Chapter 12.
    """
    memory = PagedMemory(capacity_bytes, page_bytes)
    pages = sum(-(-size // page_bytes) for size in state_bytes)
    steps = []
    for peak in peak_bytes:
        before = memory.out_bytes, memory.in_bytes
        memory.reserve(peak)
        memory.reserve(rest_bytes)
        for page in range(pages):
            memory.touch(page)
        steps.append(PageTraffic(memory.out_bytes - before[0], memory.in_bytes - before[1]))
    return steps
