"""Chapter 18: is there something better than LoRA? Seven methods on equal terms.

Every method adapts the same layers with the same rank, so that as many parameters train (DoRA has one more a
row). For each method and task the learning rate climbs a grid of √10 until both neighbours of the best have
been tried (lowest validation loss, seed 0); the best rate and its two neighbours are then run with further
seeds, and so on until the best mean lies between two neighbours. Forgetting is the perplexity of other text,
whose baseline is the base before any method started. A run is one record in records/variants.jsonl: cut it
anywhere, start it again, and it goes on where it was.

    python companion/experiments/variants.py --bases nf4 --methods lora dora
"""

import argparse
import copy
import gc
import math
import statistics
import time

import torch
from lora2qlora.adapters import count_parameters
from lora2qlora.fast import use_fast
from lora2qlora.lab import measured
from lora2qlora.lab.models import load_base_model
from lora2qlora.lab.tasks import load_text
from lora2qlora.lab.training import make_batches, mean_loss, perplexity, train
from lora2qlora.lora import LoRALinear
from lora2qlora.qlora import NF4Linear, quantize_base
from lora2qlora.variants import (
    DoRALinear,
    adapt,
    eva_start,
    loftq,
    lora_plus_groups,
    pissa,
    rslora_alpha,
)
from rank_sweep import GRID, load_swept_task, next_exponent

TASKS = ("wordnet", "cmudict", "spam")
BASES = ("nf4", "16 bits")  # in float32 arithmetic both; the second base is the model as it was published
SETTINGS = {"model": "smollm2-135m", "rank": 8, "alpha": 16, "steps": 32, "batch_size": 8}
ROWS = {"validation": 32, "test": 64, "text_tokens": 256}
EVA_BATCHES = 8
RATIO = 16.0  # LoRA+, the paper's
# In order of worth, with log10 of the first learning rate that is tried.
METHODS = {"lora": -2.5, "dora": -2.5, "pissa": -3.5, "lora+": -3.5, "rslora": -3.0, "loftq": -2.5}
METHODS |= {"eva": -2.5, "lora, rank 64": -2.5, "rslora, rank 64": -3.5}


def rank_of(method: str) -> int:
    """The rank that a method's name says, or that of all."""
    return int(method.partition(", rank ")[2] or SETTINGS["rank"])


def quantized(layer):
    """The same adapter, over its base in NF4."""
    if not isinstance(layer.base, NF4Linear):
        layer.base = NF4Linear.from_linear(layer.base, compute_dtype=torch.float32)
    return layer


def prepare(original, method: str, base: str, batches: list[dict], seed: int):
    """A copy of the original model under a method, ready to train."""
    rank, alpha, kind = rank_of(method), SETTINGS["alpha"], method.partition(",")[0]
    makers = {
        "rslora": lambda linear: LoRALinear(linear, rank, rslora_alpha(rank, alpha)),
        "dora": lambda linear: DoRALinear(linear, rank, alpha),
        "pissa": lambda linear: pissa(linear, rank, alpha),
        "loftq": lambda linear: loftq(linear, rank, alpha, compute_dtype=torch.float32),
    }
    make = makers.get(kind, lambda linear: LoRALinear(linear, rank, alpha))
    model, in_nf4 = copy.deepcopy(original), base == "nf4"
    torch.manual_seed(seed)
    if in_nf4 and kind not in ("pissa", "loftq"):
        quantize_base(model, compute_dtype=torch.float32)
    adapt(model, "all-linear", (lambda linear: quantized(make(linear))) if in_nf4 else make)
    if any(isinstance(module, NF4Linear) for module in model.modules()):
        use_fast(model)
    if kind == "eva":
        eva_start(model, [{k: b[k] for k in ("input_ids", "attention_mask")} for b in batches[:EVA_BATCHES]])
    return model


def score(model, tokenizer, task) -> dict[str, float]:
    """Loss on the validation and the test split, and perplexity on text of another kind."""
    text = load_text("sotu").select([0])
    return {
        "validation_loss": mean_loss(model, task, tokenizer, limit=ROWS["validation"]),
        "test_loss": mean_loss(model, task, tokenizer, split="test", limit=ROWS["test"]),
        "perplexity": perplexity(model, text, tokenizer, max_tokens=ROWS["text_tokens"]),
    }


def run(original, tokenizer, task, asked: dict, seed: int) -> dict[str, float]:
    """Train one copy of the base, and score it before and after."""
    steps, rate = asked["steps"], 10 ** asked["log10_learning_rate"]
    batches = make_batches(task, tokenizer, SETTINGS["batch_size"], seed=seed)
    batches = [batch for _, batch in zip(range(max(steps, EVA_BATCHES)), batches, strict=False)]
    began = time.process_time()
    model = prepare(original, asked["method"], asked["base"], batches, seed)
    figures = {"seconds_to_start": time.process_time() - began}
    figures |= {"trainable": count_parameters(model).trainable}
    groups = lora_plus_groups(model, rate, RATIO) if asked["method"] == "lora+" else None
    began = time.process_time()
    try:
        history = train(model, batches, steps, rate, seed=seed, groups=groups)
    except ValueError as error:
        if "lower the learning rate" not in str(error):
            raise
        return figures | {"diverged": 1.0}
    figures |= {"seconds_a_step": (time.process_time() - began) / steps, "first_loss": history[0].loss}
    return figures | score(model, tokenizer, task)


def tried(asked: dict, seed: int = 0) -> dict[float, float]:
    """Validation loss by exponent of the learning rate; diverged is infinite."""
    try:
        records = measured.load("variants")
    except FileNotFoundError:
        return {}
    losses = {}
    for record in records:
        exponent = record.configuration.get("log10_learning_rate")
        if record.seed == seed and record.configuration == asked | {"log10_learning_rate": exponent}:
            losses[exponent] = record.figures.get("validation_loss", math.inf)
    return losses


def best_exponent(asked: dict, seeds: int) -> float:
    """log10 of the rate with the lowest mean validation loss over the seeds, of those that all have run.

    Raises KeyError where there is none yet.
    """
    by_seed = [tried(asked, seed) for seed in range(seeds)]
    shared = set.intersection(*map(set, by_seed))
    if not shared:
        raise KeyError(f"run variants.py first: {asked['method']} on {asked['task']} has no best rate yet")
    return min(sorted(shared), key=lambda e: statistics.mean(losses[e] for losses in by_seed))


def sweep(asked: dict, record, seeds: int) -> None:
    """The climb with seed 0; then all seeds, until the best mean has run neighbours on both sides."""
    while (exponent := next_exponent(tried(asked), METHODS[asked["method"]])) is not None:
        record(asked | {"log10_learning_rate": exponent}, 0)
    losses, best = tried(asked), None
    chosen = min(losses, key=losses.get)
    while chosen != best:
        best = chosen
        for exponent in (best, best - GRID, best + GRID):
            for seed in range(seeds):
                record(asked | {"log10_learning_rate": exponent}, seed)
        chosen = best_exponent(asked, seeds)


def main(arguments: list[str] | None = None) -> None:
    """Run what has no record yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--bases", nargs="+", default=BASES, choices=BASES)
    parser.add_argument("--methods", nargs="+", default=tuple(METHODS), choices=tuple(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"])
    options = parser.parse_args(arguments)
    original, tokenizer = load_base_model(SETTINGS["model"])
    tasks = {name: load_swept_task(name) for name in options.tasks}

    def record(asked: dict, seed: int) -> None:
        if measured.is_recorded("variants", asked, seed):
            return
        figures = run(original, tokenizer, tasks[asked["task"]], asked, seed)
        measured.record("variants", asked, figures, seed)
        gc.collect()
        shown = {key: round(value, 3) for key, value in figures.items()}
        print(
            {k: asked[k] for k in ("base", "method", "task", "log10_learning_rate")}, seed, shown, flush=True
        )

    for base in options.bases:
        for method in options.methods:
            for name in options.tasks:
                if (base, method) == ("16 bits", "loftq"):
                    continue  # there is nothing that it could correct
                asked = SETTINGS | ROWS | {"steps": options.steps, "base": base, "method": method}
                sweep(asked | {"task": name, "rank": rank_of(method)}, record, options.seeds)


if __name__ == "__main__":
    main()
