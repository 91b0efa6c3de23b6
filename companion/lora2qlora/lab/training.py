"""Train, evaluate and measure perplexity: the loops that every experiment of the book shares.

Losses are in nats per answer token. The prompt is context, never a target: its labels are -100, which
torch's cross entropy skips. Everything is seeded, and runs on whatever device the model is on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .batches import IGNORED, collate, encode, make_batches
from .in_place import compute_in_bfloat16, train_every_linear
from .scores import Metrics, answer_loss, choose, evaluate, generate, mean_loss, perplexity
from .terminal import progress

__all__ = [
    "IGNORED",
    "Metrics",
    "StepRecord",
    "answer_loss",
    "choose",
    "collate",
    "compute_in_bfloat16",
    "encode",
    "evaluate",
    "generate",
    "make_batches",
    "mean_loss",
    "perplexity",
    "progress",
    "train",
    "train_every_linear",
]


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step: `loss` [nats per answer token], `learning_rate`, `tokens` answered in it."""

    step: int
    loss: float
    learning_rate: float
    tokens: int


def train(
    model,
    batches: Iterable[dict[str, torch.Tensor]],
    steps: int,
    learning_rate: float,
    *,
    warmup_steps: int | None = None,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    seed: int = 0,
    groups: list[dict] | None = None,
) -> list[StepRecord]:
    """Train what requires a gradient, with AdamW: linear warm-up (a tenth of the steps), then linear decay.

    `groups` are those of an optimizer, with rates of their own, such as LoRA+'s; without them all that trains
    has `learning_rate`, and a record names the first group's. Leaves the model in eval mode.

    Raises ValueError: steps < 1, nothing to train, batches that end early, or a loss that is no longer finite
    (the message names the step and the learning rate).
    """
    from transformers import get_linear_schedule_with_warmup

    parameters = [p for p in model.parameters() if p.requires_grad]
    if steps < 1 or not parameters:
        raise ValueError(
            f"train needs steps >= 1 and at least one parameter that requires a gradient, "
            f"got steps={steps} and {len(parameters)} such parameters"
        )
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(groups or parameters, lr=learning_rate, weight_decay=weight_decay)
    warmup = steps // 10 if warmup_steps is None else warmup_steps
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, steps)
    iterator, records = iter(batches), []
    model.train()
    try:
        for step in progress(range(steps), "train"):
            batch = next(iterator, None)
            if batch is None:
                raise ValueError(f"the batches ended after {step} of {steps} steps")
            rate = optimizer.param_groups[0]["lr"]
            records.append(_step(model, batch, optimizer, parameters, max_grad_norm, step, rate))
            schedule.step()
    finally:
        model.eval()
    return records


def _step(model, batch, optimizer, parameters, max_grad_norm, step, rate) -> StepRecord:
    """One forward, backward and update."""
    device = parameters[0].device
    batch = {key: value.to(device) for key, value in batch.items()}
    loss = answer_loss(model, batch)
    if not torch.isfinite(loss):
        raise ValueError(
            f"the loss is {loss.item()} at step {step} with learning rate {rate:.2e}: "
            "lower the learning rate or lengthen the warm-up"
        )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    answered = int((batch["labels"][:, 1:] != IGNORED).sum())
    return StepRecord(step=step, loss=loss.item(), learning_rate=rate, tokens=answered)
