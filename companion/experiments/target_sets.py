"""Chapter 04: which layers to adapt? Four choices of targets that train equally many numbers.

Rank 8 on all linear layers sets the budget, and the other choices get the rank that spends it. The learning
rate climbs the grid of rank_sweep.py for each choice and task; the best rate, and any other whose loss is
within an eighth of it, is run with further seeds. The base is `load_small_lm`, whose weights nobody has
rounded. A run is one record in records/target_sets.jsonl: cut it anywhere, start it again, and it goes on.

    python companion/experiments/target_sets.py --tasks wordnet cmudict
"""

import argparse
import copy
import math

import torch
from lora2qlora.adapters import add_lora, count_parameters
from lora2qlora.lab import measured
from lora2qlora.lab.models import load_small_lm
from lora2qlora.lab.tasks import load_task
from lora2qlora.lab.training import make_batches, mean_loss, train
from rank_sweep import near_best, next_exponent

TASKS = ("wordnet", "cmudict")
CHOICES = {  # targets and the rank that spends the budget; only the MLP's cannot be met, by 1.3 %
    "all linear": ("all-linear", 8),
    "attention": (["q_proj", "k_proj", "v_proj", "o_proj"], 19),
    "MLP": (["gate_proj", "up_proj", "down_proj"], 14),
    "q, v": (["q_proj", "v_proj"], 38),
}
SETTINGS = {"model": "small_lm", "alpha": 16, "steps": 48, "batch_size": 8, "validation": 96, "test": 192}
START = -2.5  # log10 of the first learning rate tried


def configuration(task: str, choice: str, exponent: float, steps: int) -> dict:
    """What identifies a run, beside its seed."""
    rank = CHOICES[choice][1]
    learning = {"log10_learning_rate": exponent, "steps": steps}
    return SETTINGS | {"task": task, "targets": choice, "rank": rank} | learning


def tried(task: str, choice: str, steps: int) -> dict[float, float]:
    """Validation loss by exponent of the learning rate, for the runs with seed 0; diverged is infinite."""
    try:
        records = measured.load("target_sets")
    except FileNotFoundError:
        return {}
    losses = {}
    for record in records:
        exponent = record.configuration["log10_learning_rate"]
        if record.seed == 0 and record.configuration == configuration(task, choice, exponent, steps):
            losses[exponent] = record.figures.get("validation_loss", math.inf)
    return losses


def run(base, tokenizer, task, choice: str, learning_rate: float, seed: int, steps: int) -> dict[str, float]:
    """Train a copy of the base; its validation and its test loss."""
    model = copy.deepcopy(base)
    targets, rank = CHOICES[choice]
    torch.manual_seed(seed)
    add_lora(model, targets, rank, SETTINGS["alpha"])
    batches = make_batches(task, tokenizer, SETTINGS["batch_size"], seed=seed)
    try:
        train(model, batches, steps, learning_rate, seed=seed)
    except ValueError as error:
        if "lower the learning rate" not in str(error):
            raise
        return {"diverged": 1.0}
    figures = {"trainable": count_parameters(model).trainable}
    for split in ("validation", "test"):
        figures[f"{split}_loss"] = mean_loss(model, task, tokenizer, split=split, limit=SETTINGS[split])
    return figures


def main(arguments: list[str] | None = None) -> None:
    """Run what has no record yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"])
    options = parser.parse_args(arguments)
    base, tokenizer = load_small_lm()

    for name in options.tasks:
        task = load_task(name)

        def record(choice, exponent, seed, name=name, task=task):
            wanted = configuration(name, choice, exponent, options.steps)
            if not measured.is_recorded("target_sets", wanted, seed):
                figures = run(base, tokenizer, task, choice, 10**exponent, seed, options.steps)
                measured.record("target_sets", wanted, figures, seed)
                print(f"{name}, {choice}, rate 1e{exponent}, seed {seed}: {figures}", flush=True)

        for choice in CHOICES:
            while (exponent := next_exponent(tried(name, choice, options.steps), START)) is not None:
                record(choice, exponent, 0)
            for exponent in near_best(tried(name, choice, options.steps)):
                for seed in range(1, options.seeds):
                    record(choice, exponent, seed)


if __name__ == "__main__":
    main()
