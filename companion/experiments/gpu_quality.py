"""gpu.py, part 4: the rank sweep of chapter 05 and the atlas of chapter 09, with more seeds and steps.

The work is done by `rank_sweep.py` and `quantization_atlas.py`; a job here holds all its runs in one
record, since on a GPU a run takes seconds.
"""

import gc
import math
from functools import cache, partial

import quantization_atlas as atlas
import rank_sweep as sweep
from lora2qlora.lab.models import load_base_model

SIZES = {
    "full": {"steps": 240, "seeds": 8, "windows": 32, "ranks": (1, 8, 64, "full"), "tasks": sweep.TASKS},
    "toy": {"steps": 2, "seeds": 1, "windows": 1, "ranks": (8,), "tasks": ("wordnet",)},
}
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


def jobs(device: str, size: str) -> dict:
    """The part's runs by name, each without an argument: perplexities, LoRA on formats, the rank sweep."""
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
    return found
