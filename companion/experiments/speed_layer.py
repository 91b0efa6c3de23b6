"""speed.py, one QLoRA layer, forward and backward, beside PEFT's over bitsandbytes, and LoRA in 16 bits."""

import copy

import bitsandbytes as bnb
import torch
from lora2qlora import fast, nf4
from lora2qlora.double_quantization import QuantizedAbsmax
from lora2qlora.lab.models import keep_trainable
from lora2qlora.lora import LoRALinear
from lora2qlora.nf4 import NF4Weight
from lora2qlora.qlora import NF4Linear
from peft import LoraConfig, get_peft_model
from speed_rounds import profile_ops, speedups, take_turns
from torch import nn
from torch.nn import functional as F

LAYER = {"rank": 16, "alpha": 16, "dtype": "bfloat16"}
# A 7B model's q_proj, whose dense bfloat16 weight has 32 MiB, and one of a model with 1B, with 8 MiB.
LAYERS = [([size, size], rows) for size in (4096, 2048) for rows in (16, 128, 512, 2048)]


def layer_part(rounds: int, layers: list[tuple[list[int], int]]):
    """One QLoRA layer, forward and backward, and the pieces that its time is made of."""
    for shape, rows in layers:
        yield LAYER | {"shape": shape, "rows": rows}, lambda s=shape, n=rows: time_layer(s, n, rounds)


def bitsandbytes_layer(linear: nn.Linear) -> nn.Module:
    """PEFT's LoRA over a Linear4bit with double quantization."""
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, False, torch.bfloat16, True, "nf4")
    layer.weight = bnb.nn.Params4bit(
        linear.weight.detach().clone(), compress_statistics=True, quant_type="nf4", module=layer
    )
    wrapper = nn.Sequential(layer.to("cpu"))
    keep_trainable(wrapper)
    wrapper.is_loaded_in_4bit = True
    config = LoraConfig(r=LAYER["rank"], lora_alpha=LAYER["alpha"], target_modules=["0"])
    return get_peft_model(wrapper, config).base_model.model[0]


def same_bytes(layer) -> NF4Linear:
    """Our layer over the very tensors of PEFT's Linear4bit."""
    state = layer.base_layer.weight.quant_state
    absmax = QuantizedAbsmax(state.absmax, state.state2.absmax, state.offset, state.state2.blocksize)
    packed = layer.base_layer.weight.data.view(-1)
    return NF4Linear(NF4Weight(packed, absmax, torch.Size(state.shape), state.dtype, state.blocksize))


def build_layers(linear: nn.Linear) -> dict[str, nn.Module]:
    """The layer in each variant, with the same weights and the same adapter."""
    layers = {"peft_bnb": bitsandbytes_layer(linear)}
    for name in ("plain", "fast", "lora"):
        base = copy.deepcopy(linear) if name == "lora" else same_bytes(layers["peft_bnb"])
        layers[name] = LoRALinear(base, LAYER["rank"], LAYER["alpha"])
    fast.use_fast(layers["fast"])
    nn.init.normal_(layers["lora"].lora_B, std=0.01)
    theirs = layers["peft_bnb"]
    pairs = [(theirs.lora_A["default"].weight, theirs.lora_B["default"].weight)]
    pairs += [(layers[name].lora_A, layers[name].lora_B) for name in ("plain", "fast")]
    for A, B in pairs:
        A.data.copy_(layers["lora"].lora_A)
        B.data.copy_(layers["lora"].lora_B)
    return {name: layer.train() for name, layer in layers.items()}


def run_layer(layer, x, grad):
    """Forward and backward; output, gradient of the input, gradients of the adapter."""
    x.grad = None
    trained = [p for p in layer.parameters() if p.requires_grad]
    for p in trained:
        p.grad = None
    y = layer(x)
    y.backward(grad)
    return [y, x.grad, *[p.grad for p in trained]]


def time_layer(shape, rows, rounds):
    torch.manual_seed(0)
    out, in_ = shape
    linear = nn.Linear(in_, out, bias=False, dtype=torch.bfloat16)
    layers = build_layers(linear)
    x = torch.randn(rows, in_, dtype=torch.bfloat16).requires_grad_()
    grad = torch.randn(rows, out, dtype=torch.bfloat16)
    results = {name: run_layer(layer, x, grad) for name, layer in layers.items()}
    for ours, plain, theirs in zip(*[results[n] for n in ("fast", "plain", "peft_bnb")], strict=True):
        assert torch.equal(ours, plain)  # bit for bit
        assert (ours - theirs).norm() < 0.01 * theirs.norm()  # PEFT adds in another order, in bfloat16
    variants = {name: lambda m=layer: run_layer(m, x, grad) for name, layer in layers.items()}
    seconds = take_turns(variants, rounds)
    pieces = take_turns(layer_pieces(layers, linear, x.detach(), grad), rounds)
    return {
        "seconds": seconds,
        "pieces": pieces,
        "speedup": speedups(seconds, "peft_bnb"),
        "time_over_lora": {n: 1 / s for n, s in speedups(seconds, "lora").items()},
        "profile": {name: profile_ops(variants[name]) for name in ("peft_bnb", "fast")},
    }


def layer_pieces(layers, linear, x, grad):
    """The work inside one call, piece by piece: W dequantized twice, two products with W, the whole LoRA."""
    theirs, weight = layers["peft_bnb"].base_layer.weight, linear.weight.detach()
    q = layers["plain"].base.weight
    return {
        "lora": lambda: run_layer(layers["lora"], x.requires_grad_(), grad),
        "products": lambda: (F.linear(x.detach(), weight), grad @ weight),
        "bitsandbytes": lambda: [
            bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state) for _ in range(2)
        ],
        "plain": lambda: [nf4.dequantize_nf4(q, torch.bfloat16) for _ in range(2)],
        "fast": lambda: [fast.dequantize_to_scratch(q, torch.bfloat16) for _ in range(2)],
    }
