"""gpu.py: Llama-shaped models with random weights, made layer by layer on the device.

Memory and speed do not depend on the values of weights. A dense layer is filled, quantized if asked for,
and freed before the next is made: a model never exists in 16 bits unless it is trained in 16 bits.
"""

import bitsandbytes
import torch
from lora2qlora.adapters import add_lora
from lora2qlora.qlora import NF4Linear
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

METHODS = ("full", "lora", "qlora", "qlora-fast", "qlora-peft")


def build(
    config,
    method: str,
    rank: int,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    adapter_dtype: torch.dtype = torch.float32,
    checkpointing: bool = True,
):
    """A LlamaForCausalLM of random weights that trains as `method` says: one of METHODS.

    "lora" and "qlora" are this package's; "qlora-fast" with its fast dequantizer; "qlora-peft" is PEFT over
    bitsandbytes. Adapters are of rank `rank`, on every linear layer but the head.
    """
    torch.manual_seed(0)
    compute = {"compute_dtype": dtype}
    quantize = {
        "qlora": lambda linear: NF4Linear.from_linear(linear, **compute),
        "qlora-fast": lambda linear: NF4Linear.from_linear(linear, **compute),
        "qlora-peft": lambda linear: bitsandbytes_linear(linear, dtype),
    }.get(method)
    model = fill(config, device, dtype, quantize)
    model.requires_grad_(False)
    if method == "full":
        model.requires_grad_(True)
    elif method == "qlora-peft":
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear"))
    else:
        add_lora(model, "all-linear", rank, 16, dtype=adapter_dtype)
    if method == "qlora-fast":
        from lora2qlora.fast import use_fast

        use_fast(model)
    if checkpointing:
        checkpoint_layers(model)
    model.config.use_cache = False
    return model.train()


def checkpoint_layers(model) -> None:
    """Gradient checkpointing of every decoder layer, by whichever name this transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@torch.no_grad()
def fill(config, device: str, dtype: torch.dtype, quantize=None):
    """A config's model on the device, layer by layer; `quantize` replaces each nn.Linear but the head."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            values = torch.empty(parameter.shape, dtype=dtype, device=device)
            values = values.normal_(0, 0.02) if parameter.ndim > 1 else values.fill_(1)
            setattr(module, key, nn.Parameter(values))
        if quantize and isinstance(module, nn.Linear) and module is not head:
            model.set_submodule(name, quantize(module))
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    model.tie_weights()
    return model


def bitsandbytes_linear(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """The same layer as bitsandbytes' Linear4bit: NF4, double quantization."""
    options = {"quant_type": "nf4", "compress_statistics": True}
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, device="meta", **options
    )
    weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, **options)
    layer.weight = weight.to(linear.weight.device)
    layer.support_avx512bf16_for_cpu = False  # on a CPU it would be repacked for inference, for good
    return layer


def make_step(model, batch: int, length: int, optimizer=None):
    """A function that runs one training step on random tokens and returns the loss as a tensor."""
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(model.config.vocab_size, (batch, length), generator=generator).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=1e-4)

    def step():
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    step.optimizer, step.rows = optimizer, rows
    return step
