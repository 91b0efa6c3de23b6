"""Chapter 15: every way to make one model of an NF4 base and its adapter.

A way takes a `Trained` and returns a model. Weights are what a way stores, and the book computes with
them in float32, so that ways differ in their weights alone.
"""

import copy
import logging
import time
import warnings
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import torch
from lora2qlora.adapters import load_adapter, lora_layers, merge_lora, merge_quantized, save_adapter
from lora2qlora.blockwise import dequantize_blockwise, int_codebook, quantize_blockwise
from lora2qlora.lab.models import load_base_model
from lora2qlora.nf4 import dequantize_nf4, nf4_codebook
from lora2qlora.qlora import NF4Linear, quantize_base
from peft import PeftModel
from torch import nn

NF4_BYTES = 4.127 / 8  # a weight, blocks of 64, double quantization
INT8_BLOCK = 32


@dataclass(frozen=True)
class Trained:
    """An adapter over its NF4 base, `model`, and the weights that were quantized, `original`."""

    model: nn.Module
    original: nn.Module
    name: str  # of the base, to load it with bitsandbytes
    rank: int


def apart(trained: Trained) -> nn.Module:
    """What was trained: the adapter over NF4."""
    return trained.model


def base_alone(trained: Trained) -> nn.Module:
    """The NF4 base without the adapter."""
    model = copy.deepcopy(trained.model)
    for layer in lora_layers(model).values():
        nn.init.zeros_(layer.lora_B)
    return model


def dequantized(dtype: torch.dtype):
    """Ŵ + ΔW summed in float32 and rounded once: torchtune's way."""
    return lambda trained: merge_quantized(trained.model, dtype)


def summed_in_bfloat16(trained: Trained) -> nn.Module:
    """Ŵ and ΔW rounded to bfloat16 each, and their sum once more."""
    model = merge_quantized(trained.model, torch.bfloat16)
    for name, layer in lora_layers(trained.model).items():
        W = dequantize_nf4(layer.base.weight, torch.bfloat16)
        model.get_submodule(name).weight.data = W + layer.delta_weight().detach().bfloat16()
    return model


def original(trained: Trained) -> nn.Module:
    """W + ΔW: Unsloth's way, and what loading the adapter over the 16-bit model gives."""
    with TemporaryDirectory() as directory:
        save_adapter(trained.model, directory)
        model = copy.deepcopy(trained.original)
        load_adapter(model, directory)
    return merge_lora(model)


def requantized(trained: Trained) -> nn.Module:
    """Ŵ + ΔW, rounded to NF4 again: PEFT's way, with this book's layers."""
    return to_nf4(merge_quantized(trained.model, torch.float32))


def original_requantized(trained: Trained) -> nn.Module:
    """W + ΔW, rounded to NF4 once."""
    return to_nf4(original(trained))


def peft_on_bitsandbytes(trained: Trained) -> nn.Module:
    """PEFT's merge_and_unload on bitsandbytes' Linear4bit."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    base, _ = load_base_model(trained.name, quantization="nf4")
    with TemporaryDirectory() as directory, warnings.catch_warnings(action="ignore"):
        save_adapter(trained.model, directory)
        return PeftModel.from_pretrained(base, directory).merge_and_unload()


def eight_bits(trained: Trained) -> nn.Module:
    """Ŵ + ΔW in blocks of 32 with 8-bit integers, as in GGUF's Q8_0."""
    codebook = int_codebook(8)
    return changed(
        trained, lambda _, W: dequantize_blockwise(quantize_blockwise(W, codebook, INT8_BLOCK), codebook)
    )


def with_remainder(trained: Trained) -> nn.Module:
    """NF4 again, and what that lost as a new adapter of the same rank."""
    again = requantized(trained)

    def restored(name, W):
        rounded = dequantize_nf4(again.get_submodule(name).weight, torch.float32)
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(W - rounded, q=2 * trained.rank, niter=4)
        r = trained.rank
        return rounded + (U[:, :r] * S[:r]) @ V[:, :r].T

    return changed(trained, restored)


def stochastic(trained: Trained) -> nn.Module:
    """Ŵ + ΔW on the old scales, each weight rounded up or down with the odds that keep its mean."""
    codebook, layers = nf4_codebook(), lora_layers(trained.model)
    generator = torch.Generator().manual_seed(0)

    def rounded(name, W):
        absmax = layers[name].base.weight.absmax.dequantize()[:, None]
        x = (W.view(len(absmax), -1) / absmax.clamp(min=1e-38)).clamp(-1, 1)
        low = (torch.bucketize(x, codebook, right=True) - 1).clamp(0, 14)
        step = codebook[low + 1] - codebook[low]
        up = torch.rand(x.shape, generator=generator) * step < x - codebook[low]
        return (codebook[low + up.long()] * absmax).view(W.shape)

    return changed(trained, rounded)


def changed(trained: Trained, change) -> nn.Module:
    """Ŵ + ΔW with `change(name, weight)` in the place of each adapted layer's weight."""
    model = merge_quantized(trained.model, torch.float32)
    for name in lora_layers(trained.model):
        layer = model.get_submodule(name)
        layer.weight.data = change(name, layer.weight.data)
    return model


def to_nf4(model: nn.Module) -> nn.Module:
    """The model with its linear layers in NF4, in place."""
    quantize_base(model, compute_dtype=torch.float32)
    return model


# A way by name: how it is made, the bytes of an adapted weight and of any other, whether the adapter is kept.
WAYS = {
    "apart": (apart, NF4_BYTES, 2, True),
    "base alone": (base_alone, NF4_BYTES, 2, False),
    "dequantized, float32": (dequantized(torch.float32), 4, 4, False),
    "dequantized, float16": (dequantized(torch.float16), 2, 2, False),
    "dequantized, bfloat16": (dequantized(torch.bfloat16), 2, 2, False),
    "summed in bfloat16": (summed_in_bfloat16, 2, 2, False),
    "original": (original, 2, 2, False),
    "dequantized, NF4 again": (requantized, NF4_BYTES, 2, False),
    "original, then NF4": (original_requantized, NF4_BYTES, 2, False),
    "PEFT on bitsandbytes": (peft_on_bitsandbytes, NF4_BYTES, 2, False),
    "dequantized, int8": (eight_bits, 1 + 2 / INT8_BLOCK, 2, False),
    "NF4 and a remainder": (with_remainder, NF4_BYTES, 2, True),
    "stochastic": (stochastic, NF4_BYTES, 2, False),
}


def make(way: str, trained: Trained) -> tuple[nn.Module, float]:
    """The model of a way, in evaluation mode, and the seconds that making it took."""
    started = time.perf_counter()
    with torch.no_grad():
        model = WAYS[way][0](trained)
    return model.eval(), time.perf_counter() - started


def stored_bytes(way: str, trained: Trained) -> int:
    """[bytes] of the model as a file of this way: adapters and norms in 16 bits but for float32."""
    _, own, other, keeps = WAYS[way]
    layers = lora_layers(trained.model).values()
    adapted = sum(layer.in_features * layer.out_features for layer in layers)
    adapters = sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in layers)
    rest = sum(p.numel() for p in trained.original.parameters()) - adapted
    return round(adapted * own + rest * other + adapters * 2 * keeps)


def same_codes(model: nn.Module, trained: Trained) -> float:
    """The share of NF4 codes that are those of the base; for models whose layers are in NF4."""
    same = total = 0
    for name, layer in lora_layers(trained.model).items():
        made = model.get_submodule(name)
        packed = made.packed if isinstance(made, NF4Linear) else made.weight.data.view(-1)
        differ = packed ^ layer.base.packed
        same += (differ & 0xF0 == 0).sum().item() + (differ & 0x0F == 0).sum().item()
        total += 2 * differ.numel()
    return same / total
