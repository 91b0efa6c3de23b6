"""speed.py, a training step of the real model: its time, and the bytes a process of its own holds at most."""

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import torch
from lora2qlora import fast
from lora2qlora.adapters import add_lora
from lora2qlora.lab.models import keep_trainable, load_base_model
from lora2qlora.qlora import quantize_base
from peft import LoraConfig, get_peft_model
from speed_rounds import profile_ops, speedups, take_turns
from torch import nn

SCRIPT = Path(__file__).with_name("speed.py")
STEP = {"model": "smollm2-135m", "batch": 4, "length": 128, "rank": 16, "alpha": 16, "dtype": "bfloat16"}
STEP_VARIANTS = ["peft_bnb", "fast", "plain", "lora", "peft_lora"]


def step_part(rounds: int, variants: list[str]):
    """A training step of the real model: every variant's time in one run, each one's peak in its own."""
    yield STEP | {"variants": variants}, lambda: time_step(variants, rounds)


def build_model(variant: str):
    """SmolLM2 in bfloat16 that trains as `variant` says, and its optimizer."""
    nf4_by_theirs = "nf4" if variant == "peft_bnb" else None
    model, _ = load_base_model(STEP["model"], torch.bfloat16, nf4_by_theirs, "cpu")
    if variant in ("peft_bnb", "peft_lora"):
        config = LoraConfig(r=STEP["rank"], lora_alpha=STEP["alpha"], target_modules="all-linear")
        model = get_peft_model(model, config)
    if variant == "peft_bnb":
        keep_trainable(model)
    if variant in ("fast", "plain"):
        quantize_base(model)
    if variant == "fast":
        fast.use_fast(model)
    if not variant.startswith("peft"):
        add_lora(model, "all-linear", STEP["rank"], STEP["alpha"])
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            nn.init.normal_(p, std=0.01)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model.train(), torch.optim.AdamW(trained, lr=1e-5)


def train_step(model, optimizer, tokens) -> float:
    """One step; the loss."""
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def step_tokens() -> torch.Tensor:
    return torch.randint(49152, (STEP["batch"], STEP["length"]), generator=torch.Generator().manual_seed(0))


def time_step(names, rounds):
    tokens = step_tokens()
    built = {name: build_model(name) for name in names}
    losses = {name: train_step(*pair, tokens) for name, pair in built.items()}
    if {"fast", "plain"} <= set(names):
        assert losses["fast"] == losses["plain"], losses  # bit for bit
    if {"fast", "peft_bnb"} <= set(names):
        assert abs(losses["fast"] / losses["peft_bnb"] - 1) < 0.01, losses  # bfloat16
    variants = {name: lambda p=pair: train_step(*p, tokens) for name, pair in built.items()}
    seconds = take_turns(variants, rounds)
    figures = {"seconds": seconds, "losses": losses, "speedup": speedups(seconds, names[0])}
    figures["profile"] = {name: profile_ops(variants[name], 1) for name in names}
    peaks = {}
    for name in names:
        command = [sys.executable, str(SCRIPT), "--weigh", name]
        peaks[name] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return figures | {"peak_bytes": peaks}


def weigh(variant: str) -> int:
    """Bytes that a process holds at most during a step, less what it held before it loaded the model."""
    tokens, before = step_tokens(), resident("VmRSS")
    model, optimizer = build_model(variant)
    for _ in range(2):
        train_step(model, optimizer, tokens)
    ctypes.CDLL(None).malloc_trim(0)  # gives back what loading and quantizing needed and freed
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is held now
    train_step(model, optimizer, tokens)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes of memory this process holds now (VmRSS), or has held at most (VmHWM); Linux."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
