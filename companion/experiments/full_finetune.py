"""Chapter 02: fully fine-tune, and look at the update ΔW of every matrix.

One run trains all linear layers of SmolLM2 on a task, records the energy of every ΔW by rank, then cuts
all of them to rank r and scores the model again, for each r. Appends to records/full_finetune.jsonl and
resumes where it was cut: a run that has a record is skipped. With two seeds of a task done, --compare
records how far their updates share directions.

    python companion/experiments/full_finetune.py --tasks wordnet --seeds 3 --compare
    python companion/experiments/full_finetune.py --tasks wordnet cmudict --seeds 1 --compare

The chapter repeats the first steps of the first run, which have a record of their own:

    python companion/experiments/full_finetune.py --tasks wordnet --seeds 1 --steps 12 --test-rows 64 \\
        --cuts 8 --rests 8
"""

import argparse
import math
import statistics
from pathlib import Path

import torch
import writing
from lora2qlora.lab import measured
from lora2qlora.lab.models import cache_directory, load_base_model
from lora2qlora.lab.tasks import load_task, load_text
from lora2qlora.lab.training import (
    choose,
    compute_in_bfloat16,
    make_batches,
    mean_loss,
    perplexity,
    train,
    train_every_linear,
)
from lora2qlora.low_rank import subspace_similarity
from safetensors.torch import load_file, save_file

SETTINGS = {
    "model": "smollm2-135m",
    "steps": 96,
    "batch_size": 8,
    "learning_rate": 1e-4,
    "test_rows": 128,
}
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 576)  # at which the energy of each ΔW is recorded
CUTS = (1, 2, 4, 8, 16, 32, 64, 128)  # ranks at which the whole model is scored
COMPARED = 8  # leading directions compared between seeds


def run(settings: dict, task_name: str, seed: int) -> dict:
    """Train once; the energies of every ΔW, and scores of the model with ΔW whole, cut, or beheaded."""
    model, tokenizer = load_base_model(settings["model"])
    task = load_task(task_name)
    weights = train_every_linear(model)
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    compute_in_bfloat16(model)
    figures = {"base": score(model, tokenizer, task, settings)}
    batches = make_batches(task, tokenizer, settings["batch_size"], seed=seed)
    history = train(model, batches, settings["steps"], settings["learning_rate"], seed=seed)
    figures["train_loss"] = statistics.mean(record.loss for record in history[-10:])
    figures["full"] = score(model, tokenizer, task, settings)
    updates = {name: weight.detach() - start[name] for name, weight in weights.items()}
    parts = {name: torch.linalg.svd(update, full_matrices=False) for name, update in updates.items()}
    figures["matrices"] = {name: describe(parts[name].S, start[name]) for name in updates}
    keep_directions(task_name, seed, parts, settings["steps"])

    def with_update(chosen):
        """Scores of the base plus, for every matrix, the singular triplets in the slice `chosen`."""
        with torch.no_grad():
            for name, (U, sigma, Vh) in parts.items():
                part = (U[:, chosen] * sigma[chosen]) @ Vh[chosen]
                weights[name].copy_(start[name] + part)
        return score(model, tokenizer, task, settings)

    figures["cut"] = {str(rank): with_update(slice(rank)) for rank in settings["cuts"]}
    figures["rest"] = {str(rank): with_update(slice(rank, None)) for rank in settings["rests"]}
    return figures


def score(model, tokenizer, task, settings: dict) -> dict[str, float]:
    """Loss on test rows, perplexity on another text, and accuracy where the task is a choice."""
    figures = {
        "loss": mean_loss(model, task, tokenizer, split="test", limit=settings["test_rows"]),
        "perplexity": perplexity(model, load_text("sotu").select([0]), tokenizer, max_tokens=512),
    }
    if task.labels:
        rows = task.test.select(range(settings["test_rows"]))
        prompts = [task.prompt(text) for text in rows["input"]]
        chosen = choose(model, tokenizer, prompts, task.labels)
        figures["accuracy"] = task.metric(chosen, rows["target"][:])["accuracy"]
    return figures


def describe(sigma: torch.Tensor, weight: torch.Tensor) -> dict:
    """Of one ΔW: ‖ΔW‖ / ‖W‖, and the energy that each of `RANKS` keeps, up to the full rank."""
    energy = sigma.double().square().cumsum(0)
    kept = {
        str(rank): round((energy[rank - 1] / energy[-1]).item(), 5) for rank in RANKS if rank <= len(sigma)
    }
    return {"relative_norm": round(math.sqrt(energy[-1].item()) / weight.norm().item(), 6), "energy": kept}


def directions_file(task: str, seed: int, steps: int) -> Path:
    """Where a run leaves the leading directions of its updates, for `compare`."""
    return cache_directory() / "full_finetune" / f"{task}-{steps}-{seed}.safetensors"


def keep_directions(task: str, seed: int, parts: dict, steps: int) -> None:
    """Save the leading singular vectors of every update: U [out, 8] and V [in, 8]."""
    tensors = {}
    for name, (U, _, Vh) in parts.items():
        tensors[name + ".U"] = U[:, :COMPARED].contiguous()
        tensors[name + ".V"] = Vh[:COMPARED].T.contiguous()
    with writing.whole(directions_file(task, seed, steps)) as partial:
        save_file(tensors, partial)


def compare(first: tuple[str, int], second: tuple[str, int], steps: int) -> dict:
    """φ between the leading directions of two runs' updates, and what random subspaces would have."""
    one, other = (load_file(directions_file(task, seed, steps)) for task, seed in (first, second))
    similarity = {name: round(subspace_similarity(one[name], other[name]), 5) for name in one}
    random = {name: COMPARED / one[name].shape[0] for name in one}
    return {
        side: {
            "mean": statistics.mean(v for name, v in similarity.items() if name.endswith(side)),
            "random": statistics.mean(v for name, v in random.items() if name.endswith(side)),
            "by_matrix": {n.removesuffix("." + side): v for n, v in similarity.items() if n.endswith(side)},
        }
        for side in ("U", "V")
    }


def main(arguments: list[str] | None = None) -> None:
    """Run what has no record yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["wordnet", "cmudict"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"])
    parser.add_argument("--cuts", type=int, nargs="*", default=CUTS)
    parser.add_argument("--rests", type=int, nargs="*", default=(1, 8, 64))
    parser.add_argument("--test-rows", type=int, default=SETTINGS["test_rows"])
    parser.add_argument("--compare", action="store_true")
    options = parser.parse_args(arguments)
    settings = SETTINGS | {
        "steps": options.steps,
        "test_rows": options.test_rows,
        "cuts": list(options.cuts),
        "rests": list(options.rests),
    }
    for seed in range(options.seeds):
        for task in options.tasks:
            configuration = settings | {"task": task}
            if measured.is_recorded("full_finetune", configuration, seed):
                continue
            figures = run(settings, task, seed)
            measured.record("full_finetune", configuration, figures, seed)
            brief = {key: value for key, value in figures.items() if key != "matrices"}
            print(f"{task}, seed {seed}: {brief}", flush=True)
    if options.compare:
        record_comparisons(options.tasks, options.seeds, options.steps)


def record_comparisons(tasks: list[str], seeds: int, steps: int) -> None:
    """Two seeds of one task, and one seed of two tasks."""
    pairs = [((task, 0), (task, seed)) for task in tasks for seed in range(1, seeds)]
    pairs += [((tasks[0], 0), (task, 0)) for task in tasks[1:]]
    for first, second in pairs:
        configuration = {"compared": [list(first), list(second)], "steps": steps, "directions": COMPARED}
        if not measured.is_recorded("full_finetune", configuration, 0):
            measured.record("full_finetune", configuration, compare(first, second, steps), 0)


if __name__ == "__main__":
    main()
