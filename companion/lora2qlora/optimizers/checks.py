"""What is refused: options, gradients, sizes, and states that are not `AdamW8bit`'s own."""

import math
from collections.abc import Iterable
from numbers import Real

import torch
from torch import Tensor

from lora2qlora.blockwise import FLOATS, TINY

# Options of torch's Adams, and the only value each has here.
FIXED = {"amsgrad": False, "maximize": False, "differentiable": False, "decoupled_weight_decay": True}


def check_group(group: dict, block_size: int) -> None:
    """Raise what `AdamW8bit` says it raises of options and parameters."""
    if missing := {"lr", "betas", "eps", "weight_decay", "block_size"} - group.keys():
        raise ValueError(f"the options of a group lack {sorted(missing)}, got {sorted(group)}")
    for name, value in FIXED.items():
        got = group.get(name, value)
        if not isinstance(got, int) or got != value:  # a tensor of many has no truth
            raise ValueError(f"{name}={got!s:.80} is not implemented, need {name}={value}")
    if not isinstance(group["block_size"], int) or group["block_size"] != block_size:
        raise ValueError(
            f"got a group with block_size={group['block_size']!s:.80}, this optimizer's is {block_size}: "
            "a state is read with the block size that made it"
        )
    if not (in_float32(group["lr"]) and in_float32(group["weight_decay"])):
        raise ValueError(
            f"lr and weight_decay must be finite and not negative, got {group['lr']!s:.80}, "
            f"{group['weight_decay']!s:.80}"
        )
    betas = group["betas"]
    pair = isinstance(betas, tuple | list) and len(betas) == 2
    if not (pair and all(in_float32(beta) and beta < 1 for beta in betas)):
        raise ValueError(f"betas are two numbers in [0, 1), got {betas!s:.80}")
    step, decay = group["lr"] / (1 - betas[0]), group["lr"] * group["weight_decay"]
    if not (in_float32(step) and in_float32(decay)):
        raise ValueError(
            "lr / (1 - beta1) and lr * weight_decay must be numbers that float32 can hold, got "
            f"{step!s:.80}, {decay!s:.80}"
        )
    if not (in_float32(group["eps"]) and group["eps"] > TINY):
        raise ValueError(
            f"eps must be positive, above {TINY}, as a second moment may be 0; got {group['eps']!s:.80}"
        )
    for index, parameter in enumerate(group["params"]):
        if parameter.dtype not in FLOATS:
            raise TypeError(f"parameter {index} of the group is {parameter.dtype}, need one of {FLOATS}")


def in_float32(number: object) -> bool:
    """Whether an option is a number, not negative, that float32 can hold."""
    if isinstance(number, Tensor) and number.numel() == 1 and number.dtype in FLOATS:
        number = number.item()  # torch's schedules may keep a learning rate in a tensor
    most = 2**63 if isinstance(number, int) else 3.4e38  # torch takes no larger integer
    return isinstance(number, Real) and not isinstance(number, bool) and 0 <= number < most


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


def read_state_dict(
    state_dict: dict, own_groups: list[dict], own: list[Tensor]
) -> tuple[dict[int, dict], list[dict], dict[int, Tensor]]:
    """States, groups, and each index's parameter, of a state dict; ValueError where it is none for these."""
    groups, states = (
        state_dict.get(part) if isinstance(state_dict, dict) else None for part in ("param_groups", "state")
    )
    whole = isinstance(groups, list | tuple) and all(isinstance(group, dict) for group in groups)
    whole = whole and isinstance(states, dict) and all(isinstance(state, dict) for state in states.values())
    if not whole:
        raise ValueError(f"a state dict has state and param_groups, as torch's have; got {state_dict!s:.80}")
    lists = [group.get("params") for group in groups]
    sizes = [len(params) if isinstance(params, list | tuple) else 0 for params in lists]
    if (mine := [len(group["params"]) for group in own_groups]) != sizes:
        raise ValueError(f"this optimizer has groups of {mine} parameters, the state is for {sizes}")
    indices = [index for params in lists for index in params]
    if not all(isinstance(index, int) for index in indices) or len(set(indices)) < len(indices):
        raise ValueError(f"params are ints, each once, got {indices!s:.80}")
    states = {index: state for index, state in states.items() if state}
    if unknown := states.keys() - set(indices):
        raise ValueError(f"the state is for a parameter {next(iter(unknown))!s:.80}, which no group has")
    return states, list(groups), dict(zip(indices, own, strict=True))


def check_state(index: int, state: dict, expected: dict[str, Tensor], codes: dict[str, int]) -> None:
    """ValueError unless a parameter's state has the expected names, shapes, dtypes, and possible values.

    `codes` says how many values each state's codebook has.
    """

    def describe(tensors):
        kinds = {str(name): _form(value) for name, value in tensors.items()}
        return dict(sorted(kinds.items()))

    if describe(state) != describe(expected):
        raise ValueError(
            f"the state of parameter {index} does not fit: got {describe(state)}, need {describe(expected)}"
        )
    for name, tensor in state.items():
        least, most = tensor.aminmax() if tensor.numel() else (torch.zeros(()),) * 2
        if not (least.isfinite() and most.isfinite()) or (least < 0 and name != "exp_avg"):
            need = "finite" if name == "exp_avg" else "finite and not negative"
            raise ValueError(
                f"{name} of parameter {index} must be {need}, got numbers from {least} to {most}"
            )
        if tensor.dtype == torch.uint8 and most.item() >= codes[name]:
            raise ValueError(
                f"{name} of parameter {index} has code {most}, beyond a codebook of {codes[name]} values"
            )


def _form(value: object) -> str:
    """Dtype and shape of a tensor, and where or how it is kept if that is not as a parameter is."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    odd = [str(value.layout)] * (value.layout != torch.strided) + ["on meta"] * value.is_meta
    return " ".join([str(value.dtype), str(list(value.shape)), *odd])


def check_sizes(name: str, sizes: Iterable[int]) -> list[int]:
    """The sizes as a list; ValueError unless each is an int of at least 0."""
    sizes = list(sizes)
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ValueError(f"{name} are ints of at least 0, got {size!r}")
    return sizes
