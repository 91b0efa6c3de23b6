"""Every linear layer of a model's base in NF4. Chapter 10."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lora2qlora.adapters import find_targets, lora_layers, naming
from lora2qlora.qlora.checks import check_linear, check_place, left_dense
from lora2qlora.qlora.layer import NF4Linear


def quantize_base(
    model: nn.Module,
    targets: list[str] | str = "all-linear",
    double_quant: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
    block_size: int = 64,
) -> list[str]:
    """Put an NF4Linear in the place of every target of a model, one at a time; returns the names.

    `targets` means what it means to `add_lora`; embeddings, norms and the LM head stay. All weights are
    checked before the first is replaced; a layer with several names stays one layer. Quantize first, then
    adapt: QLoRA is `add_lora` on the result. A warning names what "all-linear" leaves at full size though it
    is large: the experts of most mixtures of experts. Chapter 10.

    Raises ValueError: adapters on the model, no such target, or one that is quantized already, offloaded, has
    hooks or numbers that are not finite; TypeError: one without a plain float weight. The model is unchanged
    then; of one for which memory does not suffice a note on the error says how far it came.
    """
    if lora_layers(model):
        raise ValueError("the model carries adapters already: quantize its base first, then add_lora")
    names = find_targets(model, targets)
    for name in names:
        naming(name, check_linear, model.get_submodule(name), block_size, double_quant)
        check_place(model, name)
    if targets == "all-linear":
        warn_of_dense(left_dense(model, names))
    for done, name in enumerate(names):
        linear = model.get_submodule(name)
        with noting(f"{done} of {len(names)} layers are in NF4 already: load the model anew" if done else ""):
            layer = NF4Linear.from_linear(linear, block_size, double_quant, compute_dtype)
        for alias in [n for n, m in model.named_modules(remove_duplicate=False) if m is linear]:
            model.set_submodule(alias, layer)
    return names


@contextmanager
def noting(note: str) -> Iterator[None]:
    """What is raised inside carries a note; an interrupt does too."""
    try:
        yield
    except BaseException as error:
        if note:
            error.add_note(note)
        raise


def warn_of_dense(shares: dict[str, float]) -> None:
    """A UserWarning that names parameters which stay at full size, with their shares of all bytes."""
    if shares:
        named = ", ".join(f"{name} ({share:.0%})" for name, share in shares.items())
        warnings.warn(
            f"{sum(shares.values()):.0%} of the model's bytes stay at full size: {named}. They lie in no "
            "linear layer, as in most mixtures of experts; bitsandbytes leaves them in 16 bits too",
            stacklevel=3,
        )
