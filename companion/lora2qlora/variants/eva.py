"""EVA: A starts in the directions in which the layer's inputs vary most. Chapter 18."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lora2qlora.adapters import lora_layers


@torch.no_grad()
def eva_start(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> None:
    """Set each adapter's A to the first r principal directions of what comes into its layer, in place.

    The model runs over the batches, keyword arguments of its forward pass, of which tokens that an
    `attention_mask` hides do not count. B stays zero, so the model still computes what it did; the base may
    be quantized, as its weights are not looked at. A [r, in] has orthonormal rows, strongest first.

    Here every layer keeps its rank; the paper may move ranks between layers (ρ > 1). Raises ValueError: no
    adapters, no batches, B that has trained already, or fewer tokens than the rank; the model is as it was
    then. Paischer and others 2024 (arXiv 2410.07170), section 3.2.
    """
    layers = lora_layers(model)
    if not layers or any(layer.lora_B.any() for layer in layers.values()):
        raise ValueError("need adapters before their training: add_lora, then eva_start")
    sums = {name: Moments(layer.in_features, layer.lora_A.device) for name, layer in layers.items()}
    hooks = [layer.register_forward_pre_hook(sums[name].see) for name, layer in layers.items()]
    mode, count = model.training, 0
    try:
        model.eval()
        for batch in batches:
            mask = batch.get("attention_mask")
            for moments in sums.values():
                moments.mask = None if mask is None else mask.bool()
            model(**batch)
            count += 1
    finally:
        model.train(mode)
        for hook in hooks:
            hook.remove()
    most = max(layer.rank for layer in layers.values())
    if not count or (fewest := min(moments.tokens for moments in sums.values())) <= most:
        raise ValueError(f"need more tokens than the rank, {most}; got {fewest if count else 'no batches'}")
    directions = {name: moments.directions(layers[name].rank) for name, moments in sums.items()}
    for name, layer in layers.items():
        layer.lora_A.copy_(directions[name])


class Moments:
    """The sum and the sum of outer products of a layer's inputs, in float64."""

    def __init__(self, width: int, device: torch.device):
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.products = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.tokens, self.mask = 0, None

    def see(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """A forward pre-hook."""
        x = inputs[0] if self.mask is None else inputs[0][self.mask]
        x = x.reshape(-1, x.shape[-1]).double()
        self.total += x.sum(0)
        self.products += x.T @ x
        self.tokens += len(x)

    def directions(self, rank: int) -> Tensor:
        """The first principal directions as rows [r, in]: eigenvectors of the covariance."""
        mean = self.total / self.tokens
        _, vectors = torch.linalg.eigh(self.products - self.tokens * torch.outer(mean, mean))
        return vectors[:, -rank:].flip(1).T
