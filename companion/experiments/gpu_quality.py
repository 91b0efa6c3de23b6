"""gpu.py, part 4: the sweep of chapter 05, the atlas of chapter 09 and the recipe of chapter 13, with more
seeds and steps.

The work is done by `rank_sweep.py`, `quantization_atlas.py` and `recipe.py`; a job here holds all its runs
in one record, since on a GPU a run takes seconds.
"""

import gc
import math
from functools import cache, partial

import atlas_runs as atlas
import rank_sweep as sweep
import recipe
import torch
from lora2qlora.lab.models import load_base_model

SIZES = {
    "full": {"steps": 240, "seeds": 8, "windows": 32, "ranks": (1, 8, 64, "full"), "tasks": sweep.TASKS},
    "toy": {"steps": 2, "seeds": 1, "windows": 1, "ranks": (8,), "tasks": ("wordnet",)},
}
# The recipe's own length, so that its runs on a CPU are comparable; more rows to score.
RECIPE = {"full": {"test_rows": 300}, "toy": {"steps": 2, "train_rows": 60, "test_rows": 4}}
FORMATS = ("bf16", "int8", "nf4", "nf4+dq", "int4", "fp4", "l1-fit", "int3")


@cache
def base(device: str):
    """SmolLM2 and its tokenizer, loaded once."""
    return load_base_model(sweep.SETTINGS["model"], device=device)


def climb(device: str, name: str, rank: int | str, steps: int, seeds: int) -> dict:
    """The learning rates tried with seed 0, and every seed at the best: all figures of each run."""
    task, tried = sweep.load_swept_task(name), {}
    start = sweep.START["full" if rank == "full" else "lora"]
    run = partial(sweep.run, *base(device), task, rank)
    while (exponent := sweep.next_exponent({e: loss(f) for e, f in tried.items()}, start)) is not None:
        tried[exponent] = run(10**exponent, 0, steps, math.inf)
        gc.collect()
    best = min(tried, key=lambda e: loss(tried[e]))
    runs = [tried[best]] + [run(10**best, seed, steps, math.inf) for seed in range(1, seeds)]
    return {
        "task": name,
        "rank": rank,
        "steps": steps,
        "log10_learning_rate": best,
        "tried": {str(e): figures for e, figures in tried.items()},
        "runs": runs,
    }


def loss(figures: dict) -> float:
    """Validation loss of a run; infinite where it diverged."""
    return figures.get("validation_loss", math.inf)


def lora_on(device: str, form: str, name: str, steps: int, seeds: int) -> dict:
    """LoRA on a rounded base: the figures of each seed, at the rate that chapter 05 chose for rank 8."""
    exponent = sweep.best_exponent(name, atlas.LORA["rank"], atlas.LORA["steps"], seeds=3)
    runs = []
    for seed in range(seeds):
        runs.append(atlas.run_lora(*base(device), form, 64, name, 10**exponent, seed, steps))
        gc.collect()
    return {"task": name, "format": form, "steps": steps, "log10_learning_rate": exponent, "runs": runs}


def follow_recipe(device: str, size: str, quantization: str | None, seeds: int) -> dict:
    """Chapter 13's recipe over a base in 32 bits or in NF4: scores, and on CUDA the peak, of each seed."""
    settings = recipe.SETTINGS | RECIPE[size]
    arm, runs, on_cuda = recipe.MAIN | {"quantization": quantization}, [], device.startswith("cuda")
    for seed in range(seeds):
        gc.collect()
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        runs.append(recipe.run(settings, arm, seed))
        if on_cuda:
            runs[-1]["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return settings | arm | {"runs": runs}


def jobs(device: str, size: str) -> dict:
    """The part's runs by name, each without an argument: perplexities, LoRA on formats, sweep, recipe."""
    asked = SIZES[size]
    steps, seeds = asked["steps"], asked["seeds"]
    forms = FORMATS if size == "full" else FORMATS[:1]
    found = {
        f"perplexity of {form}": lambda f=form: atlas.run_perplexity(*base(device), f, 64, asked["windows"])
        for form in forms
    }
    for name in asked["tasks"]:
        for form in forms:
            found[f"LoRA on {form}: {name}"] = partial(lora_on, device, form, name, steps, seeds)
    for name in asked["tasks"]:
        for rank in asked["ranks"]:
            found[f"rank {rank}: {name}"] = partial(climb, device, name, rank, steps, seeds)
    for method, quantization in (("LoRA", None), ("QLoRA", "nf4")):
        found[f"recipe of {method}"] = partial(follow_recipe, device, size, quantization, seeds)
    return found
