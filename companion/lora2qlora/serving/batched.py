"""Many adapters on one base: a batch in which each row has its own. Chapter 16.

Punica and S-LoRA gather the rows' A and B in a kernel of their own; here the stacks are indexed and two
batched products follow. The base, of any kind, is computed once for all rows.
"""

import os
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora2qlora.adapters.model import replace
from lora2qlora.adapters.targets import lora_layers
from lora2qlora.lora import LoRALinear, check_adapter, is_plain_lora
from lora2qlora.serving.folders import read_adapter


class BatchedLoRALinear(nn.Module):
    """y[i] = base(x[i]) + s B A x[i], with A, B and s = α / r of the adapter of row i, or the base alone.

    `adapters` are LoRALinears by name, of the base's shape, whose numbers are copied into one stack A
    [1 + k, r, in] and one B [1 + k, out, r]: the first is zeros, for rows without an adapter, and smaller
    ranks are filled up with zeros. `use_adapters` says which adapter a row has. Nothing trains.

    Raises ValueError: no adapter, another shape, dtype or device; in a forward pass, as many rows as were not
    said. Source: Punica (arXiv 2310.18547), S-LoRA (2311.03285). PEFT does one product after another.
    """

    def __init__(self, base: nn.Module, adapters: Mapping[str, LoRALinear]):
        _check(base, adapters)
        super().__init__()
        first = next(iter(adapters.values())).lora_A
        self.base, self.names = base, tuple(adapters)
        self.in_features, self.out_features = base.in_features, base.out_features
        count, rank = 1 + len(adapters), max(layer.rank for layer in adapters.values())
        self.register_buffer("A", first.new_zeros(count, rank, self.in_features, requires_grad=False))
        self.register_buffer("B", first.new_zeros(count, self.out_features, rank, requires_grad=False))
        self.register_buffer("scalings", first.new_zeros(count, 1, 1, requires_grad=False))
        self.register_buffer("rows", torch.zeros(0, dtype=torch.long, device=first.device), persistent=False)
        for name, layer in adapters.items():
            self.put(name, layer)

    @property
    def weight(self) -> Tensor:
        """The base's weight, as LoRALinear says it: some models ask for its dtype."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias

    @torch.no_grad()
    def put(self, name: str, adapter: LoRALinear) -> None:
        """Put an adapter in the place of the one of this name: a hot swap; nothing is compiled again.

        Raises KeyError: no such name; ValueError: another shape, or a rank above that of the stack.
        """
        if name not in self.names:
            raise KeyError(
                f"no adapter {name!r:.80} here, of {', '.join(self.names)}: build the layer with it"
            )
        _check(self.base, {name: adapter})
        if adapter.rank > (most := self.A.shape[1]):
            raise ValueError(
                f"{name} has rank {adapter.rank}, the stack holds up to {most}: build the layer with it"
            )
        place, rank = 1 + self.names.index(name), adapter.rank
        for stack, numbers in (
            (self.A[place, :rank], adapter.lora_A),
            (self.B[place, :, :rank], adapter.lora_B),
        ):
            stack.copy_(numbers)
        self.A[place, rank:], self.B[place, :, rank:], self.scalings[place] = 0, 0, adapter.scaling

    def forward(self, x: Float[Tensor, "batch ... in"]) -> Float[Tensor, "batch ... out"]:
        rows, y = self.rows, self.base(x)
        if len(rows) != len(x):
            raise ValueError(
                f"{len(x)} rows in the batch, adapters for {len(rows)}: use_adapters(model, rows)"
            )
        flat = x.reshape(len(x), -1, self.in_features).to(self.A.dtype)
        low = torch.bmm(flat, self.A[rows].mT) * self.scalings[rows]
        return (y + torch.bmm(low, self.B[rows].mT).view(y.shape)).to(y.dtype)


def use_adapters(model: nn.Module, rows: Sequence[str | None]) -> None:
    """Say which adapter each row of the next batches goes through, by name; None is the base alone.

    Raises KeyError: an adapter that no layer has; ValueError: no rows, or a model without batched layers.
    """
    layers = [module for module in model.modules() if isinstance(module, BatchedLoRALinear)]
    known = {name for layer in layers for name in layer.names}
    if not layers or not len(rows):
        raise ValueError(
            f"need rows and batched layers, got {len(rows)} rows, {len(layers)} layers: load_adapters"
        )
    if unknown := [name for name in rows if name is not None and name not in known]:
        raise KeyError(f"no adapter {unknown[0]!r:.80}: use one of {', '.join(sorted(known))}, or None")
    for layer in layers:
        places = {name: place for place, name in enumerate(layer.names, start=1)}
        layer.rows = torch.tensor([places.get(name, 0) for name in rows], device=layer.A.device)


def load_adapters(model: nn.Module, directories: Mapping[str, str | os.PathLike]) -> list[str]:
    """Put a BatchedLoRALinear over every layer that one of the adapters in these folders is for, in place.

    Returns the names replaced. An adapter that is not for a layer leaves its rows there to the base. Raises
    ValueError: no folders, adapters on the model already, or what `read_adapter` refuses; FileNotFoundError.
    The model is as it was then.
    """
    if (
        not directories
        or lora_layers(model)
        or any(isinstance(m, BatchedLoRALinear) for m in model.modules())
    ):
        raise ValueError("need folders of adapters by name, and a model without adapters (remove_lora)")
    layers: dict[str, dict[str, LoRALinear]] = {}
    for adapter, directory in directories.items():
        for name, (rank, alpha, A, B) in read_adapter(model, directory).items():
            layer = LoRALinear(model.get_submodule(name), rank, alpha)
            layer.lora_A.data.copy_(A)
            layer.lora_B.data.copy_(B)
            layers.setdefault(name, {})[adapter] = layer
    batched = {name: BatchedLoRALinear(model.get_submodule(name), own) for name, own in layers.items()}
    replace(model, batched)
    return list(batched)


def _check(base: nn.Module, adapters: Mapping[str, LoRALinear]) -> None:
    """ValueError unless these are adapters for a base of this shape, alike in dtype and device."""
    if not isinstance(adapters, Mapping) or not adapters:
        raise ValueError(f"need LoRALinears by name, got {adapters!r:.80}")
    for name, layer in adapters.items():
        if not isinstance(layer, LoRALinear) or not is_plain_lora(layer):
            raise ValueError(f"{name} must be a plain LoRALinear, got {type(layer).__name__}")
        check_adapter(base, layer.rank, layer.alpha)
        got, here = (layer.out_features, layer.in_features), (base.out_features, base.in_features)
        if got != here:
            raise ValueError(f"{name} is for a layer of {list(got)}, this one is {list(here)}")
    kinds = {(layer.lora_A.dtype, layer.lora_A.device) for layer in adapters.values()}
    if len(kinds) > 1:
        raise ValueError(f"the adapters differ in dtype or device: {sorted(map(str, kinds))}")
