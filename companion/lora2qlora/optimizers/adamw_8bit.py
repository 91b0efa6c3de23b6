"""AdamW with its states in 8 bits as an optimizer of torch, and the bytes of those states."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lora2qlora.blockwise import BlockwiseQuantized, check_codebook, check_size, has_numbers
from lora2qlora.double_quantization import dynamic_codebook
from lora2qlora.optimizers.adam import adam_step, adam_step_8bit, unsigned_dynamic_codebook
from lora2qlora.optimizers.checks import (
    check_gradient,
    check_group,
    check_sizes,
    check_state,
    read_state_dict,
)

STATES = ("exp_avg", "exp_avg_sq")  # torch's names of the two moments


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose states are kept in 8 bits: codes, and an absmax for each block of `block_size`.

    m is stored in the signed dynamic map, v in the unsigned one, by the nearest value; every step reads both
    back to 32 bits and takes `adam_step` before it rounds them again, so the first step is exactly Adam's.
    A tensor below `min_8bit_size` [elements] keeps 32-bit states. `update` may be set to a faster function
    like `adam_step_8bit`, and `codebooks` may be others; a state does not say which made it.

    bitsandbytes does the same, but on a CPU rounds to 65,536 even steps first, so that it stores no zero; on
    a GPU it decays after the step, skips elements that are not finite, and keeps the sign of m.

    Raises ValueError: options out of range or not implemented, in `step` too, and there a gradient that is
    not finite or whose square overflows (the message names the parameter; nothing is changed); TypeError: no
    float parameter or gradient. Dettmers et al. (2021, arXiv 2110.02861). Chapter 12.
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
        check_sizes("min_8bit_size", [min_8bit_size])
        self.block_size, self.min_8bit_size = block_size, min_8bit_size
        self.codebooks = codebooks or (dynamic_codebook(), unsigned_dynamic_codebook())
        for codebook in self.codebooks:
            check_codebook(codebook)
        if has_numbers(self.codebooks[1]) and self.codebooks[1][0] < 0:
            raise ValueError("the codebook of the second moment has negative values, and no square is")
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "block_size": block_size})  # so that it is saved with a state

    def add_param_group(self, group: dict) -> None:
        """Take more parameters, with options of their own; raises what the class says of options."""
        super().add_param_group(group)
        try:
            check_group(self.param_groups[-1], self.block_size)
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
        for group in self.param_groups:  # a schedule, or whoever else, may have changed an option
            check_group(group, self.block_size)
        for index, parameter in enumerate(self._parameters()):
            check_gradient(index, parameter)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over a `state_dict()`, codes and absmax as they are; a copy, on the parameters' devices.

        Raises ValueError: other groups, another block size, options that the class refuses, or a state that
        does not fit its parameter, or has values that none can have; the optimizer is unchanged then.
        """
        states, groups, parameters = read_state_dict(state_dict, self.param_groups, self._parameters())
        # torch's AdamW names no block size; without states in 8 bits it needs none
        in_8_bits = any(f"{STATES[0]}_absmax" in state for state in states.values())
        known = {} if in_8_bits else {"block_size": self.block_size}
        groups = [{**known, **group} for group in groups]
        for group, mine in zip(groups, self.param_groups, strict=True):
            check_group({**group, "params": mine["params"]}, self.block_size)
        codes = dict(zip(STATES, map(len, self.codebooks), strict=True))
        for index, state in states.items():
            check_state(index, state, self._start(parameters[index]), codes)
        taken = {}
        for index, state in states.items():
            device = parameters[index].device
            taken[parameters[index]] = {
                name: value.detach().to("cpu" if name == "step" else device, copy=True)
                for name, value in state.items()
            }
        # torch's own loading would cast codes and absmax to the parameter's dtype
        super().load_state_dict({**state_dict, "state": {}, "param_groups": groups})
        self.state.update(taken)

    def __getstate__(self) -> dict:
        """What a copy or a pickle has: torch keeps its own attributes alone."""
        own = ("block_size", "min_8bit_size", "codebooks", "update")
        return {**super().__getstate__(), **{name: vars(self)[name] for name in own if name in vars(self)}}

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _start(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before its first step: all zero, whatever the codes, as absmax is 0."""
        state = {"step": torch.zeros((), dtype=torch.float32)}
        small = parameter.numel() < self.min_8bit_size
        blocks = -(-parameter.numel() // self.block_size)
        for name in STATES:
            dtype = torch.float32 if small else torch.uint8
            state[name] = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
            if not small:
                state[f"{name}_absmax"] = torch.zeros(blocks, dtype=torch.float32, device=parameter.device)
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


def adam_state_bytes(
    sizes: Iterable[int], bits: int = 8, block_size: int = 256, min_8bit_size: int = 4096
) -> int:
    """[bytes] that Adam keeps for tensors of these `sizes` [elements]: two states, and 4 to count steps.

    In 32 bits 8 a parameter; in 8 bits 2 + 8 / block_size, whole blocks counted, and 8 in a tensor
    below `min_8bit_size`. Exactly what `AdamW8bit` holds. Raises ValueError: other bits, sizes. Chapter 12.
    """
    if bits not in (8, 32):
        raise ValueError(f"states are kept in 8 or 32 bits, got {bits!r}")
    check_size("block_size", block_size)
    total = 0
    for n in check_sizes("sizes", sizes):
        in_8_bits = bits == 8 and n >= min_8bit_size
        total += 4 + (2 * n + 8 * -(-n // block_size) if in_8_bits else 8 * n)
    return total
