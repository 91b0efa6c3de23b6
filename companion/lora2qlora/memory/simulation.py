"""The simulation: a training step of any causal model of transformers, run without numbers.

The ledger knows some families by heart. A simulated step runs the code of transformers itself, on fake
tensors, which have a shape, a dtype and a device, and no memory behind them.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from lora2qlora.adapters import add_lora, count_parameters, lora_layers
from lora2qlora.blockwise import check_size
from lora2qlora.memory.config import Source, read_config
from lora2qlora.memory.families import LINEARS
from lora2qlora.memory.methods import (
    ADAMW,
    ADAMW_FOREACH,
    ADAMW_FUSED,
    SGD,
    SGD_MOMENTUM,
    Full,
    LoRA,
    Optimizer,
    QLoRA,
)
from lora2qlora.memory.tracker import PeakReport, track_step
from lora2qlora.qlora import NF4Linear, quantize_base
from lora2qlora.qlora.state import shapes_alone

MAKE = {
    ADAMW: partial(torch.optim.AdamW, foreach=False),
    ADAMW_FOREACH: partial(torch.optim.AdamW, foreach=True),
    ADAMW_FUSED: partial(torch.optim.AdamW, fused=True),
    SGD: partial(torch.optim.SGD, lr=1e-3, foreach=False),
    SGD_MOMENTUM: partial(torch.optim.SGD, lr=1e-3, momentum=0.9, foreach=False),
}


def simulate_step(
    config_or_model: Source,
    method: Full | LoRA | QLoRA,
    batch: int = 1,
    length: int = 512,
    checkpointing: bool = False,
    optimizer: Optimizer | Callable[[list], torch.optim.Optimizer] = ADAMW,
) -> PeakReport:
    """What `track_step` would measure of a step, were the model there: to the byte, without its numbers.

    The model is any causal one of transformers: itself before it is adapted or quantized, with numbers or on
    the meta device, or its config, or the dict or path of its config.json. Arguments are those of
    `training_memory`; the targets LINEARS mean "all-linear" here, whatever the layers are called. `optimizer`
    may also be what makes one of a list of parameters, such as `AdamW8bit`. Of a mixture of experts every
    expert gets tokens. It takes seconds for each billion parameters, and while it runs, other threads should
    not run models of transformers.

    Raises TypeError: no causal model, or no such method or optimizer; ValueError: sizes below 1, targets that
    the model lacks, adapters already, or a model whose course depends on numbers. Chapter 11.
    """
    check_step(method, batch, length)
    make = maker(optimizer)
    model = on_meta(config_or_model, method, checkpointing)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), KnownNumbers(), unpacked():
            model.to_empty(device="cpu")
            model.tie_weights()  # what is one weight became two
            made = make([p for p in model.parameters() if p.requires_grad])
            first_step(made)
            return track_step(model, made, torch.empty(batch, length, dtype=torch.int64))
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"{type(model).__name__} goes by its numbers in {error.func}, and a simulated step has none"
        ) from error


def check_step(method: Full | LoRA | QLoRA, batch: int, length: int) -> None:
    """TypeError unless the method is one, ValueError unless the sizes are at least 1."""
    if not isinstance(method, Full | LoRA):
        raise TypeError(f"method is a Full, LoRA or QLoRA, got {method!r}")
    check_size("batch", batch)
    check_size("length", length)


def maker(optimizer: Optimizer | Callable) -> Callable[[list], torch.optim.Optimizer]:
    """What makes an optimizer of a list of parameters."""
    if isinstance(optimizer, Optimizer):
        if optimizer not in MAKE:
            raise TypeError(
                f"no optimizer of torch is known to keep {optimizer!r}: pass what makes one of a list of "
                "parameters, such as lora2qlora.optimizers.AdamW8bit"
            )
        return MAKE[optimizer]
    if not callable(optimizer):
        raise TypeError(f"optimizer is one such as ADAMW, or what makes one of parameters, got {optimizer!r}")
    return optimizer


def on_meta(source: Source, method: Full | LoRA | QLoRA, checkpointing: bool) -> nn.Module:
    """The model of `source` on the meta device, as the method has it, ready to train."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(read_config(source))
    config.use_cache = False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=method.dtype)
    check_experts(model, method.dtype)
    if isinstance(source, nn.Module):
        check_same(source, model)
    if isinstance(method, QLoRA):
        quantize_base(model, "all-linear", True, method.compute_dtype, method.block_size)
        group(model, method.group_size)
    if isinstance(method, LoRA):
        targets = "all-linear" if set(method.targets) == set(LINEARS) else list(method.targets)
        add_lora(model, targets, method.rank, alpha=method.rank, dtype=method.adapter_dtype)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def check_experts(model: nn.Module, dtype: torch.dtype) -> None:
    """ValueError where torch does not know the product of a mixture's experts without numbers."""
    grouped = getattr(model.config, "_experts_implementation", None) == "grouped_mm"
    if grouped and dtype != torch.bfloat16 and any(p.ndim == 3 for p in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} is a mixture of experts: simulate it in torch.bfloat16, got {dtype}"
        )


def check_same(model: nn.Module, built: nn.Module) -> None:
    """ValueError unless a model is what its config says: a base, neither adapted nor quantized."""
    given, expected = count_parameters(model).total, count_parameters(built).total
    quantized = any(isinstance(module, NF4Linear) for module in model.modules())
    if given != expected or lora_layers(model) or quantized:
        raise ValueError(
            f"{type(model).__name__} has {given:,} parameters, one of its config {expected:,}: pass the base "
            "model, before it is adapted or quantized, or its config"
        )


def group(model: nn.Module, size: int | None) -> None:
    """The constants of NF4 layers on the meta device in groups of another size; None: not quantized."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, NF4Linear) and layer.group_size != size:
            weight = shapes_alone(layer.weight, layer.block_size, size)
            model.set_submodule(name, NF4Linear(weight, layer.bias, layer.compute_dtype))


def first_step(optimizer: torch.optim.Optimizer) -> None:
    """A step on gradients of no matter what, so that the optimizer's states are there."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


class KnownNumbers(TorchDispatchMode):
    """Whoever asks a tensor without numbers for its only one is told 1: one step went by, all is well."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            dtype = arguments[0].dtype
            return 1.0 if dtype.is_floating_point else True if dtype == torch.bool else 1
        return function(*arguments, **(options or {}))


@contextmanager
def unpacked() -> Iterator[None]:
    """No sequences are packed into one row: transformers cannot see it here, and would make a mask."""
    from transformers import masking_utils

    search = masking_utils.find_packed_sequence_indices

    def find_none(position_ids):
        search(position_ids)  # for its bytes

    masking_utils.find_packed_sequence_indices = find_none
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = search
