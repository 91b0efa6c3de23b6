"""What is done to a whole model in place: which weights train, what they are, what precision computes."""

from __future__ import annotations

import functools

import torch


@torch.no_grad()
def change_linear_weights(model, change) -> list[str]:
    """In place, the weight of every linear layer but the LM head becomes `change(weight)`; returns names.

    What quantizing a base does to a model, without a quantized layer: pass a function that quantizes a
    weight [out, in] and dequantizes it. Raises ValueError: a result of another shape. Chapter 09.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    for name, module in linear.items():
        changed = change(module.weight)
        if changed.shape != module.weight.shape:
            raise ValueError(f"{name}: {list(module.weight.shape)} cannot become {list(changed.shape)}")
        module.weight.copy_(changed)
    return list(linear)


def keep_trainable(model) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference, after which nothing trains.

    On CPUs with AVX512-BF16, version 0.50 repacks a layer for good at its first forward in eval mode, and
    computes with it in bfloat16. The kernel for that layout has no backward: evaluate once, then train,
    and every adapter that feeds another four-bit layer (q, k, v, gate, up) gets no gradient, with no
    error. tests/test_models.py shows it.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def train_every_linear(model) -> dict[str, torch.nn.Parameter]:
    """Full fine-tuning of what LoRA would adapt: freeze a model but for its linear layers' weights.

    The LM head stays frozen, as it often is the embedding. Returns the weights by their layers' names;
    what is in them now is the start, to be cloned by whoever wants ΔW.
    """
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    weights = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    for weight in weights.values():
        weight.requires_grad_(True)
    return weights


def compute_in_bfloat16(model):
    """The model, in place, with its forward passes in bfloat16 and its weights as they are.

    Mixed precision: float32 weights take the small steps of training, bfloat16 products are twice as fast.
    Attention runs without the fused kernel, which on a CPU is slow for the tasks' short rows.

    The model's class is replaced, by one derived from it: a forward of the instance would go with every
    copy and run the original's weights. Raises ValueError for a model that has such a forward already.
    """
    if "forward" in vars(model):
        raise ValueError(
            "this model's forward was replaced, as accelerate does for a model that it offloads: "
            "load it whole on one device for compute_in_bfloat16"
        )
    model.set_attn_implementation("eager")
    model.__class__ = _in_bfloat16(type(model))
    return model


@functools.cache
def _in_bfloat16(kind: type) -> type:
    """The class `kind`, of the same name, with its forward under autocast."""

    @functools.wraps(kind.forward)
    def forward(self, *arguments, **options):
        device = self.get_input_embeddings().weight.device.type
        with torch.autocast(device, dtype=torch.bfloat16):
            return kind.forward(self, *arguments, **options)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
