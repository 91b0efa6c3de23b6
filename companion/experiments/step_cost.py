"""Chapters 04 and 05: what a training step costs, by rank, against PEFT's and against full fine-tuning.

Times are taken in interleaved rounds, each variant once a round, and recorded as ratios to our LoRA of
rank 8 in the same round: run this on a machine that does nothing else. Peak memory is the high-water
mark of a process of its own during a step, less what the process held before it loaded the model.
Appends to records/step_cost.jsonl; a variant that has a record is skipped.

    python companion/experiments/step_cost.py
"""

import argparse
import copy
import itertools
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from lora2qlora.adapters import add_lora, save_adapter
from lora2qlora.lab import measured
from lora2qlora.lab.models import load_base_model
from lora2qlora.lab.tasks import load_task
from lora2qlora.lab.training import answer_loss, make_batches, train_every_linear
from peft import LoraConfig, get_peft_model

SETTINGS = {"model": "smollm2-135m", "task": "wordnet", "batch_size": 8, "alpha": 16, "precision": "float32"}
VARIANTS = ("ours-8", "peft-8", "ours-1", "ours-64", "ours-2", "ours-4", "ours-16", "ours-32", "full")
REFERENCE = "ours-8"


def build(base, variant: str):
    """A copy of the base that trains as `variant` says, and its optimizer."""
    method, _, rank = variant.partition("-")
    model = copy.deepcopy(base)
    torch.manual_seed(0)
    if method == "full":
        train_every_linear(model)
    elif method == "ours":
        add_lora(model, "all-linear", int(rank), SETTINGS["alpha"])
    else:
        config = LoraConfig(r=int(rank), lora_alpha=SETTINGS["alpha"], target_modules="all-linear")
        model = get_peft_model(model, config)
    model.train()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def step(model, optimizer, batch) -> float:
    """One training step; the loss."""
    loss = answer_loss(model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return loss.item()


def time_rounds(variants: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of one step a round, variants in turn; the first two rounds warm up and are dropped."""
    base, tokenizer = load_base_model(SETTINGS["model"])
    built = {variant: build(base, variant) for variant in variants}
    batches = make_batches(load_task(SETTINGS["task"]), tokenizer, SETTINGS["batch_size"])
    seconds = {variant: [] for variant in variants}
    for batch in itertools.islice(batches, rounds + 2):
        for variant, (model, optimizer) in built.items():
            started = time.perf_counter()
            step(model, optimizer, batch)
            seconds[variant].append(time.perf_counter() - started)
    return {variant: times[2:] for variant, times in seconds.items()}


def weigh(variant: str) -> dict[str, int]:
    """Bytes of a variant: weights, gradients and optimizer states to the byte; the peak as measured."""
    before = resident("VmRSS")
    base, tokenizer = load_base_model(SETTINGS["model"])
    model, optimizer = build(base, variant)
    del base
    batches = make_batches(load_task(SETTINGS["task"]), tokenizer, SETTINGS["batch_size"])
    step(model, optimizer, next(batches))
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is held now
    step(model, optimizer, next(batches))
    trained = [p for p in model.parameters() if p.requires_grad]
    states = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    sizes = {
        "frozen_bytes": sum(p.nbytes for p in model.parameters() if not p.requires_grad),
        "trained_bytes": sum(p.nbytes for p in trained),
        "gradient_bytes": sum(p.grad.nbytes for p in trained),
        "optimizer_bytes": sum(t.nbytes for t in states),
        "peak_bytes": resident("VmHWM") - before,
    }
    if variant.startswith("ours"):
        with TemporaryDirectory() as directory:
            save_adapter(model, directory)
            sizes["file_bytes"] = (Path(directory) / "adapter_model.safetensors").stat().st_size
    return sizes


def resident(field: str) -> int:
    """Bytes of memory this process holds now (VmRSS), or has held at most (VmHWM); Linux."""
    kibibytes = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kibibytes[1])


def main(arguments: list[str] | None = None) -> None:
    """Time and weigh what has no record yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--weigh", metavar="VARIANT", help="print the bytes of one variant and stop")
    options = parser.parse_args(arguments)
    if options.weigh:
        print(weigh(options.weigh))
        return
    wanted = {v: SETTINGS | {"rounds": options.rounds, "variant": v} for v in options.variants}
    if all(measured.is_recorded("step_cost", configuration, 0) for configuration in wanted.values()):
        return
    seconds = time_rounds(list(wanted), options.rounds)
    for variant, configuration in wanted.items():
        ratios = [a / b for a, b in zip(seconds[variant], seconds[REFERENCE], strict=True)]
        command = [sys.executable, __file__, "--weigh", variant]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        sizes = {key: int(value) for key, value in re.findall(r"'(\w+)': (\d+)", output)}
        figures = {"time_over_rank_8": statistics.median(ratios), "ratios": ratios, **sizes}
        measured.record("step_cost", configuration, figures, 0)
        print(f"{variant}: {figures['time_over_rank_8']:.3f}, {sizes}", flush=True)


if __name__ == "__main__":
    main()
