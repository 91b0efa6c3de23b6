"""LoRA: a frozen linear layer plus a trained update of low rank. Chapter 03."""

import math
from numbers import Real

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lora2qlora.low_rank import check_rank

# float8 can be neither drawn nor added.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class LoRALinear(nn.Module):
    """y = base(x) + (α / r) · B A x, with A [r, in] random, B [out, r] zero at first, and the base frozen.

    `base` is any module with `in_features` and `out_features`: an nn.Linear, or one with quantized
    weights. A and B are float32 unless `dtype` says otherwise; the input is cast to their dtype and the
    sum to the base's output dtype. As B starts at zero, the layer starts out equal to its base.

    `alpha` and `rank` set `scaling` [1] = α / r; for rsLoRA's α / √r pass α √r. `dropout` acts on the
    input of A while training. The layer starts in the base's mode, training or evaluation. `weight` and
    `bias` are the base's, as in PEFT's layers: some models ask for their dtype.

    Raises ValueError: rank outside 1..min(in, out), alpha not positive, dropout outside [0, 1), a base that
    is offloaded; TypeError: no linear base, a LoRALinear, a dtype not in FLOATS. LoRA, section 4.1.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        check_adapter(base, rank, alpha, dropout, dtype)
        super().__init__()
        tensor = next((t for tensors in (base.parameters(), base.buffers()) for t in tensors), None)
        options = {"dtype": dtype, "device": None if tensor is None else tensor.device}
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **options))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **options))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.base = base.requires_grad_(False)
        self.rank, self.alpha = rank, alpha
        self.dropout = nn.Dropout(dropout)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.train(base.training)

    @property
    def scaling(self) -> float:
        """α / r, the factor of B A."""
        return self.alpha / self.rank

    @property
    def weight(self) -> Tensor:
        """The base's weight, without the update."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        y = self.base(x)
        # Scaled while it is still r wide: the same product for fewer multiplications.
        low = F.linear(self.dropout(x.to(self.lora_A.dtype)), self.lora_A) * self.scaling
        return (y + F.linear(low, self.lora_B)).to(y.dtype)

    def delta_weight(self) -> Float[Tensor, "out in"]:
        """The update of the weight, ΔW = (α / r) · B A, in the adapters' dtype."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}"


@torch.no_grad()
def merge(layer: LoRALinear) -> nn.Linear:
    """A new nn.Linear with W' = W + (α / r) · B A and the base's bias; the layer stays as it is.

    The sum is taken in the wider of the two dtypes and rounded once to the base's. The new layer is
    frozen, as its base is, in the same mode and on the same device.

    Raises TypeError: not a LoRALinear, or a base without a plain float weight. A quantized weight
    cannot hold the sum; what to call instead stands in the message. ValueError: a base whose weight is
    offloaded, or hooks, which the new layer would lose. LoRA, section 4.1. Chapters 03, 15.
    """
    check_merge(layer)
    base, weight = layer.base, layer.base.weight
    merged = nn.Linear(
        base.in_features, base.out_features, base.bias is not None, device="meta", dtype=weight.dtype
    )
    total = (weight + layer.delta_weight()).to(weight.dtype)
    merged.weight = nn.Parameter(total, requires_grad=False)
    if base.bias is not None:
        merged.bias = nn.Parameter(base.bias.clone(), requires_grad=False)
    return merged.train(layer.training)


def check_merge(layer: LoRALinear) -> None:
    """Raise what `merge` says it raises."""
    if not isinstance(layer, LoRALinear):
        raise TypeError(f"merge takes a LoRALinear, got {type(layer).__name__}")
    base, weight = layer.base, getattr(layer.base, "weight", None)
    is_plain = isinstance(base, nn.Linear) and type(base).forward is nn.Linear.forward
    if not is_plain or type(weight) is not nn.Parameter or not weight.is_floating_point():
        is_bitsandbytes = hasattr(weight, "quant_state")
        how = ", with bitsandbytes.functional.dequantize_4bit(weight, weight.quant_state)," * is_bitsandbytes
        by_hand = (
            f"Dequantize it{how} into a new nn.Linear, put that in its place (layer.base = ...), then merge"
        )
        # Such as NF4Linear, which this room does not know.
        itself = not isinstance(weight, Tensor) and callable(getattr(base, "dequantize", None))
        raise TypeError(
            f"merge needs an nn.Linear with a plain float weight as base, got {type(base).__name__}. "
            + ("Call lora2qlora.adapters.merge_quantized(model), which dequantizes" if itself else by_hand)
        )
    check_here(base)
    if weight.is_meta != layer.lora_A.is_meta or layer.lora_A.is_meta != layer.lora_B.is_meta:
        raise ValueError(
            "the base or the adapter is on the meta device, without numbers: load them, then merge"
        )
    if hooks := own_hooks(base) + own_hooks(layer):
        raise ValueError(
            f"the layer carries {', '.join(hooks)}, which a merged one would lose: remove them first "
            "(accelerate's by accelerate.hooks.remove_hook_from_submodules), then merge"
        )


def own_hooks(module: nn.Module) -> list[str]:
    """What changes the calls of this one module beside its class: hooks, and a forward of its own."""
    hooks = [name for name, value in vars(module).items() if name.endswith("_hooks") and value]
    is_of_its_class = getattr(module.forward, "__func__", None) is type(module).forward
    return hooks + ["a forward of its own"] * (not is_of_its_class)


def check_adapter(
    base: nn.Module, rank: int, alpha: float, dropout: float = 0.0, dtype: torch.dtype = torch.float32
) -> None:
    """Raise as LoRALinear does for these arguments, and change nothing."""
    if isinstance(base, LoRALinear):
        raise TypeError("base is a LoRALinear already: merge it first, or adapt its base")
    if not is_linear(base):
        raise TypeError(f"base must be a module with in_features and out_features, got {type(base).__name__}")
    check_rank(rank, base.out_features, base.in_features)
    if not _is_number(alpha) or alpha <= 0:
        raise ValueError(f"alpha must be a positive number, got {alpha!r:.80}")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be a probability in [0, 1), got {dropout!r:.80}")
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be a float dtype of torch, got {dtype!r}: one of {FLOATS}")
    check_here(base)


def _is_number(value) -> bool:
    """Whether a value is a finite number that a float can hold."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def check_here(base: nn.Module, *above: nn.Module) -> None:
    """ValueError where accelerate keeps weights elsewhere and brings them for the length of a pass only.

    `above` are modules that hold the base, whose hooks bring its weights too.
    """
    hooks = [getattr(module, "_hf_hook", None) for module in (*above, *base.modules())]
    for hook in hooks:
        hooks.extend(getattr(hook, "hooks", ()))  # a SequentialHook holds others
    has_meta = any(tensor.is_meta for tensors in (base.parameters(), base.buffers()) for tensor in tensors)
    if any(getattr(hook, "offload", False) or (hook and has_meta) for hook in hooks):
        raise ValueError(
            "accelerate offloads its weights, so that they are not there between two passes: load the model "
            "without offloading, or call accelerate.hooks.remove_hook_from_submodules(model) first"
        )


def is_plain_lora(layer: LoRALinear) -> bool:
    """Whether a layer computes what LoRALinear does, so that A, B, rank and alpha say all of it."""
    return type(layer).forward is LoRALinear.forward


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: it says how many features come in and how many go out."""
    names = ("in_features", "out_features")
    return (
        isinstance(module, nn.Module)
        # A compiled module hands on what it is asked for; it says nothing itself.
        and all(name in vars(module) or hasattr(type(module), name) for name in names)
        and all(isinstance(getattr(module, name), int) for name in names)
    )
