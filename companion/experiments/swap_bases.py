"""Chapter 19: an adapter over the base that it was trained over, and over the other one.

LoRA is trained over the original weights, with the tasks, seeds, steps and rate of merging.py, whose records
hold QLoRA's half: its adapter over NF4 ("apart") and over the original weights ("original"). An adapter is
one record in records/swap_bases.jsonl: cut it anywhere, start it again, and it goes on.

    python companion/experiments/swap_bases.py --seeds 3
"""

import argparse
import copy
from tempfile import TemporaryDirectory

import torch
from lora2qlora.adapters import add_lora, load_adapter, save_adapter
from lora2qlora.lab import measured
from lora2qlora.lab.models import load_base_model
from lora2qlora.lab.training import make_batches, train
from lora2qlora.qlora import quantize_base
from merging import SETTINGS, TASKS, compute_fast, predictions, score, task_batches
from rank_sweep import load_swept_task

RATE = -3.0  # log10, as most of merging.py's records


def bases(original) -> dict:
    """Fresh copies without an adapter: the original weights, and these in NF4; both compute in float32."""
    rounded = copy.deepcopy(original)
    quantize_base(rounded, compute_dtype=torch.float32)
    compute_fast(rounded)
    return {"original": copy.deepcopy(original), "nf4": rounded}


def run(original, tokenizer, settings: dict, seed: int) -> dict:
    """Train LoRA over the original weights; scores of its adapter over either base."""
    task = load_swept_task(settings["task"])
    model = bases(original)["original"]
    torch.manual_seed(seed)
    add_lora(model, "all-linear", settings["rank"], settings["alpha"])
    batches = make_batches(task, tokenizer, settings["batch_size"], seed=seed)
    rate = 10 ** settings["log10_learning_rate"]
    history = train(model, batches, settings["steps"], rate, seed=seed)
    last = [record.loss for record in history[-10:]]
    on_task = task_batches(tokenizer, task, settings["test_rows"])
    reference = [predictions(model, batch) for batch in on_task]  # what was trained
    found = {}
    with TemporaryDirectory() as folder:
        save_adapter(model, folder)
        for name, base in bases(original).items():
            load_adapter(base, folder)
            found[name] = score(on_task, [predictions(base, batch) for batch in on_task], reference)
    return {"train_loss": sum(last) / len(last), "over": found}


def main(arguments: list[str] | None = None) -> None:
    """Measure what has no record yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"])
    options = parser.parse_args(arguments)
    original, tokenizer = load_base_model(SETTINGS["model"])
    for seed in range(options.seeds):
        for task in options.tasks:
            asked = SETTINGS | {"steps": options.steps, "task": task, "log10_learning_rate": RATE}
            if measured.is_recorded("swap_bases", asked, seed):
                print(f"{task}, seed {seed}: recorded already", flush=True)
                continue
            figures = run(original, tokenizer, asked, seed)
            measured.record("swap_bases", asked, figures, seed)
            print(f"{task}, seed {seed}: {figures}", flush=True)


if __name__ == "__main__":
    main()
