"""What is refused: options, gradients, sizes, and states that are not `AdamW8bit`'s own."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lora2qlora.blockwise import FLOATS

# Options of torch's Adams, and the only value each has here.
FIXED = {"amsgrad": False, "maximize": False, "differentiable": False, "decoupled_weight_decay": True}


def check_group(group: dict, block_size: int) -> None:
    """Raise what `AdamW8bit` says it raises of options and parameters."""
    if missing := {"lr", "betas", "eps", "weight_decay", "block_size"} - group.keys():
        raise ValueError(f"the options of a group lack {sorted(missing)}, got {sorted(group)}")
    for name, value in FIXED.items():
        if group.get(name, value) != value:
            raise ValueError(f"{name}={group[name]} is not implemented, need {name}={value}")
    if group["block_size"] != block_size:
        raise ValueError(
            f"got a group with block_size={group['block_size']}, this optimizer's is {block_size}: "
            "a state is read with the block size that made it"
        )
    if not 0 <= group["lr"] < math.inf or not 0 <= group["weight_decay"] < math.inf:
        raise ValueError(
            f"lr and weight_decay must be finite and not negative, got {group['lr']}, {group['weight_decay']}"
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
    """ValueError unless a parameter's state has the expected names, shapes, dtypes, and possible values."""

    def describe(tensors):
        return {name: f"{t.dtype} {list(t.shape)}" for name, t in sorted(tensors.items())}

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


def check_sizes(name: str, sizes: Iterable[int]) -> list[int]:
    """The sizes as a list; ValueError unless each is an int of at least 0."""
    sizes = list(sizes)
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ValueError(f"{name} are ints of at least 0, got {size!r}")
    return sizes
