"""Operators of torch around raw pointers: a tracer sees neither ctypes nor a kernel write. Chapter 14."""

from collections.abc import Callable

import torch


def operator(schema: str, function: Callable, fake: Callable) -> torch._ops.OpOverload:
    """An operator `lora2qlora::…` of torch that calls `function`, for every device, and is recorded whole.

    torch.compile, torch.export, torch.jit.trace and make_fx put it into their graphs; where there are no
    numbers `fake` gives the shapes. `schema` says what is written in place, "Tensor(a!) out". Some 6 μs a
    call, where `torch.library.custom_op` has 50. A module that is loaded again keeps its operators.
    """
    name, arguments = schema[: schema.index("(")], schema[schema.index("(") :]
    if not hasattr(torch.ops.lora2qlora, name):
        torch.library.define(f"lora2qlora::{name}", arguments)
        torch.library.impl(f"lora2qlora::{name}", "default", function)
        torch.library.register_fake(f"lora2qlora::{name}", fake)
    return getattr(torch.ops.lora2qlora, name).default


def nothing(*arguments) -> None:
    """What an operator without a result does where there are no numbers."""
