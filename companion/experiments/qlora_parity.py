"""Chapter 10: 50 training steps of QLoRA, step by step, ours beside PEFT's over bitsandbytes' layers.

Every run has the same base, the same start of A and the same batches; it differs from its neighbour in one
thing: whose code, double quantization or not, whose double-quantization codes, the compute dtype, and the
number of threads. Appends to records/qlora_parity.jsonl; a run that has a record is skipped.

    python companion/experiments/qlora_parity.py
"""

import argparse
import logging
from tempfile import TemporaryDirectory

import bitsandbytes as bnb
import torch
from lora2qlora.adapters import add_lora, find_targets, lora_layers, save_adapter
from lora2qlora.double_quantization import QuantizedAbsmax
from lora2qlora.lab import measured
from lora2qlora.lab.models import keep_trainable, load_base_model
from lora2qlora.lab.tasks import load_task
from lora2qlora.lab.training import make_batches, train
from lora2qlora.lora import LoRALinear
from lora2qlora.nf4 import NF4Weight
from lora2qlora.qlora import NF4Linear, quantize_base
from peft import PeftModel, prepare_model_for_kbit_training
from torch.nn import functional as F

SETTINGS = {"model": "smollm2-135m", "task": "wordnet", "batch_size": 8, "steps": 50, "learning_rate": 1e-3}
SETTINGS |= {"rank": 8, "alpha": 16}
# Code, double quantization, compute dtype, threads. "shared" is our code over bitsandbytes' stored tensors;
# "twice" is the same, but rounds the adapter's output to bfloat16 before the sum, as PEFT does, and the sum.
# "upcast" is PEFT's with norms, embedding and head in float32, as prepare_model_for_kbit_training makes them.
RUNS = (
    ("ours", False, "float32", 1),
    ("peft", False, "float32", 1),
    ("ours", True, "float32", 1),
    ("peft", True, "float32", 1),
    ("shared", True, "float32", 1),
    ("ours", False, "bfloat16", 1),
    ("peft", False, "bfloat16", 1),
    ("ours", True, "bfloat16", 1),
    ("peft", True, "bfloat16", 1),
    ("shared", True, "bfloat16", 1),
    ("upcast", True, "bfloat16", 1),
    ("peft", True, "bfloat16", 2),
    ("twice", True, "bfloat16", 1),
)


class RoundsTwice(LoRALinear):
    """Our layer with PEFT's sum: the adapter's output is rounded to the base's dtype, then the sum is."""

    def forward(self, x):
        y = self.base(x)
        low = F.linear(self.dropout(x.to(self.lora_A.dtype)), self.lora_A) * self.scaling
        return y + F.linear(low, self.lora_B).to(y.dtype)


def quantize_with_bitsandbytes(model, double_quant: bool, compute_dtype: torch.dtype) -> list[str]:
    """Put a Linear4bit in the place of every linear layer but the LM head; returns the names."""
    names = find_targets(model, "all-linear")
    for name in names:
        linear = model.get_submodule(name)
        shape, bias = (linear.in_features, linear.out_features), linear.bias is not None
        layer = bnb.nn.Linear4bit(*shape, bias, compute_dtype, double_quant, "nf4", device="meta")
        layer.weight = bnb.nn.Params4bit(
            linear.weight.detach(), compress_statistics=double_quant, quant_type="nf4", module=layer
        )
        layer.bias = linear.bias
        model.set_submodule(name, layer.to(linear.weight.device))
    keep_trainable(model)
    model.is_loaded_in_4bit = True  # where PEFT looks before it wraps a Linear4bit
    return names


def from_bitsandbytes(layer) -> NF4Linear:
    """Our layer over the very tensors of a Linear4bit: codes, absmax and all."""
    state = layer.weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = QuantizedAbsmax(state.absmax, state.state2.absmax, state.offset, state.state2.blocksize)
    packed = layer.weight.data.view(-1)
    weight = NF4Weight(packed, absmax, torch.Size(state.shape), state.dtype, state.blocksize)
    return NF4Linear(weight, layer.bias, layer.compute_dtype)


def build(code: str, double_quant: bool, compute_dtype: torch.dtype):
    """The adapted model of one run, and its tokenizer; A is the same in all."""
    model, tokenizer = load_base_model(SETTINGS["model"], dtype=compute_dtype)
    if code == "ours":
        quantize_base(model, double_quant=double_quant, compute_dtype=compute_dtype)
    else:
        names = quantize_with_bitsandbytes(model, double_quant, compute_dtype)
    if code in ("shared", "twice"):
        for name in names:
            model.set_submodule(name, from_bitsandbytes(model.get_submodule(name)))
    if code == "upcast":
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if code in ("ours", "shared", "twice"):
        torch.manual_seed(0)
        add_lora(model, "all-linear", SETTINGS["rank"], SETTINGS["alpha"])
        for layer in lora_layers(model).values() if code == "twice" else ():
            layer.__class__ = RoundsTwice
        return model, tokenizer
    with TemporaryDirectory() as directory:
        twin, _ = load_base_model(SETTINGS["model"], dtype=compute_dtype)
        torch.manual_seed(0)
        add_lora(twin, "all-linear", SETTINGS["rank"], SETTINGS["alpha"])
        save_adapter(twin, directory)
        return PeftModel.from_pretrained(model, directory, is_trainable=True), tokenizer


def run(code: str, double_quant: bool, compute_dtype: str, threads: int) -> dict:
    """The loss of every step of one run."""
    torch.set_num_threads(threads)
    model, tokenizer = build(code, double_quant, getattr(torch, compute_dtype))
    batches = make_batches(load_task(SETTINGS["task"]), tokenizer, SETTINGS["batch_size"])
    records = train(model, batches, SETTINGS["steps"], SETTINGS["learning_rate"])
    return {"losses": [record.loss for record in records]}


def main(arguments: list[str] | None = None) -> None:
    """Make the runs that have no record yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.parse_args(arguments)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    for code, double_quant, compute_dtype, threads in RUNS:
        configuration = SETTINGS | {"code": code, "double_quant": double_quant}
        configuration |= {"compute_dtype": compute_dtype, "threads": threads}
        if measured.is_recorded("qlora_parity", configuration, 0):
            continue
        figures = run(code, double_quant, compute_dtype, threads)
        measured.record("qlora_parity", configuration, figures, 0)
        print(f"{code} {double_quant=} {compute_dtype} {threads=}: {figures['losses'][-1]:.6f}", flush=True)


if __name__ == "__main__":
    main()
