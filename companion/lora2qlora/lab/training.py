"""Train, evaluate and measure perplexity: the loops that every experiment of the book shares.

Losses are in nats per answer token. The prompt is context, never a target: its labels are -100, which
torch's cross entropy skips. Everything is seeded, and runs on whatever device the model is on.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from tqdm import tqdm

IGNORED = -100  # the label that torch.nn.functional.cross_entropy skips


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step: `loss` [nats per answer token], `learning_rate`, `tokens` answered in it."""

    step: int
    loss: float
    learning_rate: float
    tokens: int


@dataclass(frozen=True)
class Metrics:
    """What `evaluate` found: `values` by metric name, and the answers in the order of the rows."""

    values: dict[str, float]
    predictions: tuple[str, ...]
    targets: tuple[str, ...]


def encode(tokenizer, prompt: str, answer: str) -> dict[str, list[int]]:
    """Token ids of prompt + " " + answer + end-of-text, labels on the answer alone.

    Prompt and answer are tokenized apart, so that the model meets at evaluation
    the very prompt tokens that it was trained on. Returns `input_ids` and `labels`,
    equally long.
    """
    context = tokenizer(prompt)["input_ids"]
    target = [
        *tokenizer(" " + answer, add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
    ]
    return {"input_ids": context + target, "labels": [IGNORED] * len(context) + target}


def collate(examples: list[dict[str, list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad examples on the right: `input_ids`, `labels`, `attention_mask`, int64 [batch, longest]."""
    longest = max(len(example["input_ids"]) for example in examples)

    def padded(key, value):
        return torch.tensor([e[key] + [value] * (longest - len(e[key])) for e in examples])

    mask = [[1] * len(e["input_ids"]) + [0] * (longest - len(e["input_ids"])) for e in examples]
    return {
        "input_ids": padded("input_ids", pad_token_id),
        "labels": padded("labels", IGNORED),
        "attention_mask": torch.tensor(mask),
    }


def make_batches(task, tokenizer, batch_size: int, seed: int = 0, split: str = "train") -> Iterator[dict]:
    """Endless batches of a task's rows, reshuffled every epoch; the same seed gives the same batches.

    Rows of like length share a batch, so that little is padded: of every 16 batches' worth of shuffled
    rows, neighbours in length are put together. Rows that fill no batch are left out.
    Raises ValueError where the split holds less than a batch.
    """
    rows = getattr(task, split)
    if not 1 <= batch_size <= len(rows):
        raise ValueError(
            f"batch_size must lie in 1..{len(rows)}, the rows of {task.name}'s {split} split, "
            f"got {batch_size}"
        )
    encoded = [encode(tokenizer, task.prompt(row["input"]), row["target"]) for row in rows]
    return _shuffled(encoded, batch_size, tokenizer.pad_token_id, random.Random(seed))


def _shuffled(encoded, batch_size, pad_token_id, generator):
    while True:
        order = generator.sample(encoded, len(encoded))
        for start in range(0, len(order), 16 * batch_size):
            pool = sorted(order[start : start + 16 * batch_size], key=lambda e: len(e["input_ids"]))
            batches = [pool[i : i + batch_size] for i in range(0, len(pool) - batch_size + 1, batch_size)]
            for batch in generator.sample(batches, len(batches)):
                yield collate(batch, pad_token_id)


def train_every_linear(model) -> dict[str, torch.nn.Parameter]:
    """Full fine-tuning of what LoRA would adapt: freeze a model but for its linear layers' weights.

    The LM head stays frozen, as it often is the embedding. Returns the weights by their layers' names;
    what is in them now is the start, to be cloned by whoever wants ΔW.
    """
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    weights = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    for weight in weights.values():
        weight.requires_grad_(True)
    return weights


def compute_in_bfloat16(model):
    """The model, in place, with its forward passes in bfloat16 and its weights as they are.

    Mixed precision: float32 weights take the small steps of training, bfloat16 products are twice as fast.
    Attention runs without the fused kernel, which on a CPU is slow for the tasks' short rows.
    """
    device = model.get_input_embeddings().weight.device.type
    model.forward = torch.autocast(device, dtype=torch.bfloat16)(model.forward)
    model.set_attn_implementation("eager")
    return model


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
) -> list[StepRecord]:
    """Train what requires a gradient, with AdamW: linear warm-up (a tenth of the steps), then linear decay.

    Leaves the model in eval mode. Raises ValueError: steps < 1, nothing to train, batches that end
    early, or a loss that is no longer finite (the message names the step and the learning rate).
    """
    from transformers import get_linear_schedule_with_warmup

    parameters = [p for p in model.parameters() if p.requires_grad]
    if steps < 1 or not parameters:
        raise ValueError(
            f"train needs steps >= 1 and at least one parameter that requires a gradient, "
            f"got steps={steps} and {len(parameters)} such parameters"
        )
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
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


def answer_loss(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross entropy [nats per answer token] of a batch from `collate`: what transformers calls `loss`.

    Logits are computed only at positions where some row of the batch answers: over a vocabulary of
    49,152 they cost as much as eight of SmolLM2's layers, and the prompts' would be thrown away.
    """
    following = batch["labels"][:, 1:]
    answered = (following != IGNORED).any(dim=0).nonzero()[:, 0]
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits = model(**inputs, logits_to_keep=answered).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), following[:, answered].flatten(), ignore_index=IGNORED
    )


@torch.no_grad()
def generate(model, tokenizer, prompts: list[str], max_new_tokens: int, batch_size: int = 16) -> list[str]:
    """Greedy continuations of the prompts, each cut at its first line break and stripped.

    The answers keep the prompts' order.
    """
    device = model.get_input_embeddings().weight.device
    answers: list[str] = [""] * len(prompts)
    for rows in progress(_alike(tokenizer, prompts, batch_size), "generate"):
        inputs = tokenizer([prompts[i] for i in rows], return_tensors="pt", padding=True, padding_side="left")
        output = model.generate(
            input_ids=inputs["input_ids"].to(device),
            attention_mask=inputs["attention_mask"].to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        for row, text in zip(rows, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            lines = text.strip().splitlines()
            answers[row] = lines[0].strip() if lines else ""
    return answers


@torch.no_grad()
def choose(
    model,
    tokenizer,
    prompts: list[str],
    labels: tuple[str, ...],
    batch_size: int = 16,
) -> list[str]:
    """For each prompt, the label likeliest to come next, by its first token.

    It measures what a model knows apart from whether it knows the form of the
    answer. Raises ValueError where two labels begin with the same token.
    """
    first = [tokenizer(" " + label, add_special_tokens=False)["input_ids"][0] for label in labels]
    if len(set(first)) < len(labels) or not labels:
        raise ValueError(f"labels must begin with different tokens, got {labels}: {first}")
    device = model.get_input_embeddings().weight.device
    chosen: list[str] = [""] * len(prompts)
    for rows in progress(_alike(tokenizer, prompts, batch_size), "choose"):
        inputs = tokenizer([prompts[i] for i in rows], return_tensors="pt", padding=True, padding_side="left")
        logits = model(**inputs.to(device), logits_to_keep=1).logits[:, -1]
        for row, label in zip(rows, logits[:, first].argmax(dim=1).tolist(), strict=True):
            chosen[row] = labels[label]
    return chosen


def _alike(tokenizer, prompts: list[str], batch_size: int) -> list[list[int]]:
    """Indices of the prompts in batches of like length, shortest first, so that little is padded."""
    lengths = [len(ids) for ids in tokenizer(prompts)["input_ids"]] if prompts else []
    order = sorted(range(len(prompts)), key=lengths.__getitem__)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def evaluate(model, task, tokenizer, *, split: str = "test", limit: int | None = None, batch_size: int = 16):
    """Metrics of greedy answers on a task's split, or on its first `limit` rows.

    Raises ValueError where there are no rows to evaluate.
    """
    rows = getattr(task, split)
    rows = rows.select(range(min(limit, len(rows)))) if limit is not None else rows
    if len(rows) == 0:
        raise ValueError(f"nothing to evaluate: {task.name}'s {split} split gives no rows (limit={limit})")
    prompts = [task.prompt(text) for text in rows["input"]]
    predictions = generate(model, tokenizer, prompts, task.max_answer_tokens, batch_size)
    targets = list(rows["target"])
    return Metrics(task.metric(predictions, targets), tuple(predictions), tuple(targets))


@torch.no_grad()
def mean_loss(
    model, task, tokenizer, *, split: str = "validation", limit: int | None = None, batch_size: int = 8
) -> float:
    """Mean loss [nats per answer token] over a task's split, or over its first `limit` rows.

    Finer than a metric: it moves before an answer changes. Raises ValueError where there are no rows.
    """
    rows = getattr(task, split)
    rows = rows.select(range(min(limit, len(rows)))) if limit is not None else rows
    if len(rows) == 0:
        raise ValueError(f"no loss without rows: {task.name}'s {split} split gives none (limit={limit})")
    encoded = [encode(tokenizer, task.prompt(row["input"]), row["target"]) for row in rows]
    encoded.sort(key=lambda example: len(example["input_ids"]))
    device = model.get_input_embeddings().weight.device
    total, answered = 0.0, 0
    for start in range(0, len(encoded), batch_size):
        batch = collate(encoded[start : start + batch_size], tokenizer.pad_token_id)
        batch = {key: value.to(device) for key, value in batch.items()}
        count = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += answer_loss(model, batch).item() * count
        answered += count
    return total / answered


@torch.no_grad()
def perplexity(model, text, tokenizer, *, max_tokens: int = 1024, window: int = 1024) -> float:
    """exp of the mean loss per token over the first `max_tokens` tokens, in windows that do not overlap.

    `text` is a string, or a Dataset with a column "text". A window's first token has no context and is
    not scored. Raises ValueError below two tokens.
    """
    text = text if isinstance(text, str) else "\n\n".join(text["text"])
    ids = tokenizer(text)["input_ids"][:max_tokens]
    if len(ids) < 2 or window < 2:
        raise ValueError(
            f"perplexity needs at least two tokens a window, got {len(ids)} in windows of {window}"
        )
    device = model.get_input_embeddings().weight.device
    total, scored = 0.0, 0
    for start in range(0, len(ids) - 1, window):
        piece = torch.tensor([ids[start : start + window]], device=device)
        count = piece.shape[1] - 1
        total += model(input_ids=piece, labels=piece).loss.item() * count
        scored += count
    return math.exp(total / scored)


def progress(iterable, description: str):
    """A progress bar on a terminal, nothing elsewhere (stored outputs must not change from run to run)."""
    return tqdm(iterable, desc=description, disable=not sys.stderr.isatty(), leave=False)
