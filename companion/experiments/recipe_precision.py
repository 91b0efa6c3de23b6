"""What activation checkpointing and 16-bit formats do to the gradient of the recipe's trained adapters.

The model has been through the recipe (recipe.py), since new adapters are half zeros, and with them half of
the gradient. Run by recipe_mistakes.py.
"""

import io
import tempfile
from contextlib import contextmanager, redirect_stderr

import torch
from lora2qlora.memory import SHAPES, LlamaShape, track_peak
from peft import LoraConfig, get_peft_model
from recipe import IGNORED, fine_tune, training_rows
from torch.utils.flop_counter import FlopCounterMode
from transformers import DataCollatorForSeq2Seq, LlamaConfig, LlamaForCausalLM

# The three models of chapter 13; the biases of Qwen's attention, less than two megabytes, are left out.
COUNTED = {
    "SmolLM2-135M": SHAPES["SmolLM2-135M"],
    "Qwen2.5-7B": LlamaShape(3584, 28, 28, 18944, 152064, kv_heads=4),
    "Qwen2.5-32B": LlamaShape(5120, 64, 40, 27648, 152064, kv_heads=8),
}
# Format, and the powers of two that the loss is multiplied by.
CURVES = {
    "bf16": (torch.bfloat16, (0, 16)),
    "fp16": (torch.float16, (0, 4, 8, 12, 16, 18, 20)),
}


def chunks(asked: dict, tokenizer, labels: str = "answer") -> list[list[dict]]:
    """The first `batches` batches of `rows` rows of the training set."""
    rows, size = training_rows(asked, tokenizer, labels), asked["rows"]
    if len(rows) < size * asked["batches"]:
        raise ValueError(f"{asked['batches']} batches of {size} rows, but only {len(rows)} rows")
    return [rows[size * k : size * (k + 1)] for k in range(asked["batches"])]


def trained(asked: dict, seed: int):
    """A model after the recipe, in eval mode, and batches for it."""
    with tempfile.TemporaryDirectory() as directory, redirect_stderr(io.StringIO()):
        model, tokenizer, _ = fine_tune(asked, asked, seed, directory)
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    model.config.use_cache = False
    return model, [collator(rows).to(model.device) for rows in chunks(asked, tokenizer)]


def backward(model, batch, scale: float = 1.0) -> None:
    """Forward and backward, with the same dropout each time; the loss is multiplied by `scale`."""
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    (model(**batch).loss * scale).backward()


def gradient(model, batch, scale: float = 1.0) -> torch.Tensor:
    """The gradient of all adapters as one vector, `scale` divided out again."""
    backward(model, batch, scale)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]) / scale


# Activation checkpointing -------------------------------------------------------------------------


def checkpointing(asked: dict, seed: int) -> dict:
    """With and without: gradients equal to the bit, peak bytes of a step, FLOPs of a step.

    A list has one entry a batch. A peak is what a step holds at most beyond what the model held before;
    `flops` are of one row of `flop_tokens` tokens, counted from shapes, and have no dequantization in them.
    """
    model, batches = trained(asked, seed)
    model.train()
    plain, plain_bytes = step_by_step(model, batches)
    model.activation_checkpointing_enable()
    checkpointed, checkpointed_bytes = step_by_step(model, batches)
    return {
        "gradients_equal": [torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True)],
        "peak_bytes": {"plain": plain_bytes, "checkpointed": checkpointed_bytes},
        "flops": {name: flops_of(shape, asked) for name, shape in COUNTED.items()},
    }


def step_by_step(model, batches) -> tuple[list[torch.Tensor], list[int]]:
    """The gradient of each batch, and the bytes that its step holds at most beside the model."""
    gradients = [gradient(model, batch) for batch in batches]
    peaks = []
    for batch in batches:
        model.zero_grad(set_to_none=True)  # else the last step's gradients are there before
        peak = track_peak(lambda batch=batch: backward(model, batch), device=model.device)
        peaks.append(peak.peak_bytes - peak.start_bytes)
    return gradients, peaks


def flops_of(shape: LlamaShape, asked: dict) -> dict[str, int]:
    """FLOPs of a LoRA step with and without checkpointing; frozen numbers of the layers and the head."""
    return {
        "plain": step_flops(shape, asked, checkpointing=False),
        "checkpointed": step_flops(shape, asked, checkpointing=True),
        "layers": shape.layers * sum(out * into for out, into in shape.linears.values()),
        "head": shape.vocabulary * shape.hidden,
    }


def step_flops(shape: LlamaShape, asked: dict, checkpointing: bool) -> int:
    """FLOPs of a LoRA step on one row of `flop_tokens` tokens, on the meta device: no numbers needed."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        use_cache=False,
    )
    tokens = asked["flop_tokens"]
    with torch.device("meta"):
        adapters = LoraConfig(r=asked["rank"], target_modules="all-linear")
        model = get_peft_model(LlamaForCausalLM(config), adapters).train()
        ids = torch.zeros(1, tokens, dtype=torch.long)
        mask = torch.zeros(1, 1, tokens, tokens)  # given, as there are no numbers to make one from
    if checkpointing:
        model.activation_checkpointing_enable()
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    return counter.get_total_flops()


# Formats of 16 bits -------------------------------------------------------------------------------


class Rounded(torch.autograd.Function):
    """Rounds a tensor to a 16-bit format, and its gradient likewise."""

    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = dtype
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype).to(grad.dtype), None


@contextmanager
def rounding(model, dtype: torch.dtype):
    """What goes into and comes out of every adapted layer is rounded, forward and backward.

    That is nearly what matrix units do, which take 16 bits, add in 32 and give 16. The weights stay as they
    are, and so do what lies between the layers and what lies inside one (the rounding of A's output).
    """
    hooks = []
    for layer in [module for module in model.modules() if hasattr(module, "lora_A")]:
        hooks.append(layer.register_forward_pre_hook(lambda _, x: (Rounded.apply(x[0], dtype), *x[1:])))
        hooks.append(layer.register_forward_hook(lambda _, x, y: Rounded.apply(y, dtype)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float | None:
    """‖found − exact‖ / ‖exact‖; None where the gradient overflowed."""
    error = ((found - exact).norm() / exact.norm()).item()
    return error if torch.isfinite(found).all() else None


def precision(asked: dict, seed: int) -> dict:
    """Relative error of the adapters' gradient against that in 32 bits, without dropout.

    `errors` by format and by the power of two that the loss is multiplied by, one entry a batch; null where
    a gradient was not finite. `norms` are those of the gradients in 32 bits.
    """
    model, batches = trained(asked, seed)
    exact = [gradient(model, batch) for batch in batches]
    errors = {}
    for name, (dtype, powers) in CURVES.items():
        with rounding(model, dtype):
            errors[name] = {
                str(power): [
                    relative_error(gradient(model, batch, 2.0**power), true)
                    for batch, true in zip(batches, exact, strict=True)
                ]
                for power in powers
            }
    return {"errors": errors, "norms": [true.norm().item() for true in exact]}
