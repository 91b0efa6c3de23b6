"""Rows become token ids, and token ids become batches. The prompt is context, never a target."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from .guards import check_ends, check_pads, check_text, checked_rows, guarded

IGNORED = -100  # the label that torch.nn.functional.cross_entropy skips


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


def _check_example(tokenizer, prompt, answer) -> None:
    check_text(prompt, "a prompt")
    check_text(answer, "an answer")
    check_ends(tokenizer)
    if not tokenizer(" " + answer, add_special_tokens=False)["input_ids"]:
        raise ValueError(f"the answer {answer!r} gives no token, nothing is left to train: leave it out")


encode = guarded(encode, _check_example)


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


def _check_examples(examples, pad_token_id) -> None:
    check_pads(pad_token_id)
    if not examples:
        raise ValueError("a batch needs at least one example, got none")
    for index, example in enumerate(examples):
        if len(example["input_ids"]) != len(example["labels"]):
            raise ValueError(
                f"example {index} must have as many labels as input_ids, "
                f"got {len(example['labels'])} and {len(example['input_ids'])}"
            )


collate = guarded(collate, _check_examples)


def encode_rows(task, tokenizer, split: str, limit: int | None = None) -> list[dict[str, list[int]]]:
    """A split's rows, or its first `limit`, each as `encode` gives it.

    Raises ValueError naming the row that cannot be trained on, or the token that the tokenizer lacks.
    """
    check_ends(tokenizer)
    check_pads(tokenizer.pad_token_id)
    encoded = []
    for index, (text, target) in enumerate(checked_rows(task, split, limit)):
        try:
            encoded.append(encode(tokenizer, task.prompt(text), target))
        except ValueError as error:
            raise ValueError(f"row {index} of {task.name}'s {split} split: {error}") from error
    return encoded


def make_batches(task, tokenizer, batch_size: int, seed: int = 0, split: str = "train") -> Iterator[dict]:
    """Endless batches of a task's rows, reshuffled every epoch; the same seed gives the same batches.

    Rows of like length share a batch, so that little is padded: of every 16 batches' worth of shuffled
    rows, neighbours in length are put together. Rows that fill no batch are left out.
    Raises ValueError where the split holds less than a batch, or as `encode_rows`.
    """
    encoded = encode_rows(task, tokenizer, split)
    if not 1 <= batch_size <= len(encoded):
        raise ValueError(
            f"batch_size must lie in 1..{len(encoded)}, the rows of {task.name}'s {split} split, "
            f"got {batch_size}"
        )
    return _shuffled(encoded, batch_size, tokenizer.pad_token_id, random.Random(seed))


def _shuffled(encoded, batch_size, pad_token_id, generator):
    while True:
        order = generator.sample(encoded, len(encoded))
        for start in range(0, len(order), 16 * batch_size):
            pool = sorted(order[start : start + 16 * batch_size], key=lambda e: len(e["input_ids"]))
            batches = [pool[i : i + batch_size] for i in range(0, len(pool) - batch_size + 1, batch_size)]
            for batch in generator.sample(batches, len(batches)):
                yield collate(batch, pad_token_id)
