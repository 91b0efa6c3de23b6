"""What a model is worth: the loss on answers, the answers themselves, perplexity of a text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .batches import IGNORED, collate, encode, encode_rows
from .guards import check_pads, check_text, checked_rows, guarded
from .terminal import progress


@dataclass(frozen=True)
class Metrics:
    """What `evaluate` found: `values` by metric name, and the answers in the order of the rows."""

    values: dict[str, float]
    predictions: tuple[str, ...]
    targets: tuple[str, ...]


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


def _check_batch(model, batch) -> None:
    if not (batch["labels"][:, 1:] != IGNORED).any():
        raise ValueError("the batch has no answer token to predict, nothing is left to train: all is prompt")


answer_loss = guarded(answer_loss, _check_batch)


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


def _check_labels(tokenizer, labels, **_) -> None:
    for label in labels:
        check_text(label, "a label")
        if not tokenizer(" " + label, add_special_tokens=False)["input_ids"]:
            raise ValueError(f"the label {label!r} gives no token to choose by")


choose = guarded(choose, _check_labels)


def _alike(tokenizer, prompts: list[str], batch_size: int) -> list[list[int]]:
    """Indices of the prompts in batches of like length, shortest first, so that little is padded."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    check_pads(tokenizer.pad_token_id)
    for index, prompt in enumerate(prompts):
        check_text(prompt, f"prompt {index}")
    lengths = [len(ids) for ids in tokenizer(prompts)["input_ids"]] if prompts else []
    order = sorted(range(len(prompts)), key=lengths.__getitem__)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def evaluate(model, task, tokenizer, *, split: str = "test", limit: int | None = None, batch_size: int = 16):
    """Metrics of greedy answers on a task's split, or on its first `limit` rows.

    Raises ValueError where there are no rows to evaluate, or a row has no text.
    """
    rows = list(checked_rows(task, split, limit))
    if len(rows) == 0:
        raise ValueError(f"nothing to evaluate: {task.name}'s {split} split gives no rows (limit={limit})")
    prompts = [task.prompt(text) for text, _ in rows]
    predictions = generate(model, tokenizer, prompts, task.max_answer_tokens, batch_size)
    targets = [target for _, target in rows]
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


def _check_mean_loss(task, tokenizer, split, limit, batch_size, **_) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    encode_rows(task, tokenizer, split, limit)


mean_loss = guarded(mean_loss, _check_mean_loss)


@torch.no_grad()
def perplexity(model, text, tokenizer, *, max_tokens: int = 1024, window: int = 1024) -> float:
    """exp of the mean loss per token over the first `max_tokens` tokens, in windows that do not overlap.

    `text` is a string, or a Dataset with a column "text". A window's first token has no context and is
    not scored. Raises ValueError below two tokens, or where a row of "text" is no text.
    """
    text = text if isinstance(text, str) else _joined(text)
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


def _joined(rows) -> str:
    """The column "text" of a Dataset as one text."""
    if "text" not in getattr(rows, "column_names", ()):
        raise ValueError(f'perplexity takes a string, or a Dataset with a column "text", got {rows!r}')
    texts = list(rows["text"])
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f'row {index}: its column "text" must be text, got {text!r}')
    return "\n\n".join(texts)
