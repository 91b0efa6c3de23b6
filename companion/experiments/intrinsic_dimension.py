"""Chapter 02: fine-tune inside a random subspace of d dimensions (Aghajanyan et al., 2020).

All weights of the linear layers move together: w = w₀ + P z, where only z [d] is trained. P is drawn
once: every weight belongs to one of the d coordinates, with a random sign, scaled so that ‖P z‖ ≈ ‖z‖.
(The paper uses a Fastfood transform, which is dense; this P is as random and costs one lookup a weight.)
The learning rate climbs a grid for every d, as in rank_sweep.py, whose runs on all weights are the
reference. Then the best rate, and any other whose loss is within an eighth of it, is run with further
seeds: each draws its own P. Dimension 0 is the base model, scored as it is. Appends to
records/intrinsic_dimension.jsonl, and resumes where it was cut.

    python companion/experiments/intrinsic_dimension.py
"""

import argparse
import math

import torch
from lora2qlora.lab import measured
from lora2qlora.lab.models import load_base_model
from lora2qlora.lab.tasks import load_task
from lora2qlora.lab.training import compute_in_bfloat16, make_batches, mean_loss, train, train_every_linear
from rank_sweep import ROWS, SETTINGS, near_best, next_exponent, score
from torch import nn
from torch.nn.utils import parametrize

DIMENSIONS = (0, 1024, 65536, 8192, 64)  # in order of worth; LoRA of rank 1 trains 305,280


class InSubspace(nn.Module):
    """A parametrization w = w₀ + P z of one weight; `z` is shared by all weights of the model."""

    def __init__(self, weight: torch.Tensor, z: nn.Parameter, scale: float, generator: torch.Generator):
        super().__init__()
        self.z = z
        index = torch.randint(0, len(z), (weight.numel(),), generator=generator, dtype=torch.int32)
        sign = torch.randint(0, 2, (weight.numel(),), generator=generator, dtype=torch.int8)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("sign", (2 * sign - 1).view(weight.shape), persistent=False)
        self.scale = scale

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.z.index_select(0, self.index).view(weight.shape) * self.sign * self.scale


def confine(model: nn.Module, dimension: int, seed: int) -> nn.Parameter:
    """Let a model's linear layers move in one random subspace; returns its coordinates z, zero at first."""
    weights = train_every_linear(model)
    total = sum(weight.numel() for weight in weights.values())
    z = nn.Parameter(torch.zeros(dimension))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in weights.items():
        weight.requires_grad_(False)
        subspace = InSubspace(weight, z, math.sqrt(dimension / total), generator)
        parametrize.register_parametrization(model.get_submodule(name), "weight", subspace)
    return z


def run(task, dimension: int, learning_rate: float, seed: int, settings: dict, leader: float) -> dict:
    """Train z alone; score the model if its validation loss is at most `leader`."""
    model, tokenizer = load_base_model(settings["model"])
    if dimension == 0:
        compute_in_bfloat16(model)
        return score(model, tokenizer, task)
    z = confine(model, dimension, seed)
    compute_in_bfloat16(model)
    batches = make_batches(task, tokenizer, settings["batch_size"], seed=seed)
    train(model, batches, settings["steps"], learning_rate, seed=seed)
    figures = {"update_norm": z.norm().item()}
    with parametrize.cached():
        figures["validation_loss"] = mean_loss(model, task, tokenizer, limit=ROWS["validation"])
        if figures["validation_loss"] <= leader:
            figures |= score(model, tokenizer, task)
    return figures


def main(arguments: list[str] | None = None) -> None:
    """Run what has no record yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--task", default="wordnet")
    parser.add_argument("--dimensions", type=int, nargs="+", default=DIMENSIONS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"])
    options = parser.parse_args(arguments)
    settings = {key: SETTINGS[key] for key in ("model", "batch_size")} | {"steps": options.steps}
    task = load_task(options.task)

    def record(dimension, exponent, seed, leader=math.inf):
        configuration = settings | ROWS | {"task": options.task, "dimension": dimension}
        configuration["log10_learning_rate"] = exponent
        if measured.is_recorded("intrinsic_dimension", configuration, seed):
            return
        rate = 0.0 if exponent is None else 10**exponent
        figures = run(task, dimension, rate, seed, settings, leader)
        measured.record("intrinsic_dimension", configuration, figures, seed)
        print(f"dimension {dimension}, rate 1e{exponent}, seed {seed}: {figures}", flush=True)

    for dimension in options.dimensions:
        if dimension == 0:
            record(0, None, 0)
            continue
        wanted = settings | ROWS | {"task": options.task, "dimension": dimension}
        start = round(4 - math.log10(dimension)) / 2  # a step in w of about the same size for every d
        while (exponent := next_exponent(losses := tried(wanted), start)) is not None:
            record(dimension, exponent, 0, leader=min(losses.values(), default=math.inf))
        for exponent in near_best(losses):
            for seed in range(1, options.seeds):
                record(dimension, exponent, seed)


def tried(wanted: dict) -> dict[float, float]:
    """Validation loss by exponent of the learning rate, of the runs with seed 0 of a configuration."""
    try:
        records = measured.load("intrinsic_dimension")
    except FileNotFoundError:
        return {}
    exponents = [(r.configuration["log10_learning_rate"], r) for r in records if r.seed == 0]
    return {
        e: r.figures["validation_loss"]
        for e, r in exponents
        if r.configuration == wanted | {"log10_learning_rate": e}
    }


if __name__ == "__main__":
    main()
