"""What goes wrong in a recipe without a word, measured: chapter 13's findings, one record each.

A record's `configuration` has the recipe's settings (recipe.py), the name of the finding, and the batches
it was taken on: the first rows of the training set, in order. Where a figure was taken on several batches
it is a list, batch by batch, so that differences can be paired. What the formats of numbers and activation
checkpointing do is in recipe_precision.py. Left out: whether any of it holds for other models or on a GPU.
Appends to records/recipe_mistakes.jsonl; a finding that has a record is skipped.

    python companion/experiments/recipe_mistakes.py
"""

import argparse
import copy
import io
import shutil
import tempfile
from contextlib import redirect_stderr
from pathlib import Path

import torch
from lora2qlora.lab import measured
from lora2qlora.lab.models import load_base_model
from lora2qlora.lab.tasks import load_task
from lora2qlora.lab.training import IGNORED, answer_loss
from lora2qlora.memory import storage_bytes
from recipe import MAIN, SETTINGS, answers, encode_rows, held_out_loss, make_trainer, train
from recipe_precision import checkpointing, chunks, precision
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq

STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")  # what `save_only_model=True` leaves out


def base_of(asked: dict):
    """The untouched base and its tokenizer."""
    return load_base_model(asked["model"], quantization=asked["quantization"])


def padded(tokenizer, rows: list[dict], side: str = "left") -> dict[str, torch.Tensor]:
    """One batch of rows that have labels already, padded on a side by transformers."""
    tokenizer.padding_side = side
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)(rows)


@torch.no_grad()
def loss_of(model, batch: dict[str, torch.Tensor]) -> float:
    """Loss on a batch [nats per token that counts]."""
    return answer_loss(model, {key: tensor.to(model.device) for key, tensor in batch.items()}).item()


# Masking by the padding token ---------------------------------------------------------------------


def lost_ends(tokenizer, rows: list[dict]) -> int:
    """How many end tokens of a batch train if labelled by position, and no more if masked by token."""
    by_position = padded(tokenizer, rows)["labels"]
    bare = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in rows]
    by_token = DataCollatorForLanguageModeling(tokenizer, mlm=False)(bare)["labels"]
    end = tokenizer.eos_token_id
    return int(((by_position == end) & (by_token != end)).sum())


def padding_token(asked: dict, seed: int) -> dict:
    """End tokens that each batch loses; and with padding that has a token of its own, for comparison."""
    _, tokenizer = base_of(asked)
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"pad_token": "<|padding|>"})  # the model never meets it: only labels are made
    batches = chunks(asked, tokenizer)
    ends = [sum(row["labels"].count(tokenizer.eos_token_id) for row in rows) for rows in batches]
    return {
        "padding": tokenizer.pad_token,
        "end": tokenizer.eos_token,
        "end_tokens": ends,
        "lost": [lost_ends(tokenizer, rows) for rows in batches],
        "lost_with_own_padding": [lost_ends(own, rows) for rows in batches],
    }


# The side of the padding --------------------------------------------------------------------------


def padding_side(asked: dict, seed: int) -> dict:
    """The base's loss on each batch by side, and how many of its free answers the right side changes."""
    base, tokenizer = base_of(asked)
    batches = chunks(asked, tokenizer)
    losses = {
        side: [loss_of(base, padded(tokenizer, rows, side)) for rows in batches] for side in ("left", "right")
    }
    changed = []
    for rows in batches:
        left, right = (answers(base, tokenizer, rows, side=side) for side in ("left", "right"))
        changed.append(sum(a != b for a, b in zip(left, right, strict=True)))
    relative = [right / left - 1 for left, right in zip(losses["left"], losses["right"], strict=True)]
    return {"losses": losses, "relative_change": relative, "answers_changed": changed}


# Five batches -------------------------------------------------------------------------------------


def double_start(row: dict) -> dict:
    """A row with its first token twice, as from a tokenizer that adds its start to a rendered chat.

    Here it is put in by hand: this tokenizer adds none.
    """
    return {
        "input_ids": [row["input_ids"][0], *row["input_ids"]],
        "attention_mask": [1, *row["attention_mask"]],
        "labels": [IGNORED, *row["labels"]],
    }


def five_batches(asked: dict, seed: int) -> dict:
    """Tokens that count in each batch, and the base's loss on them, as it should be and with a mistake.

    Where the prompt trains, so does the first token of a row with padding before it.
    """
    base, tokenizer = base_of(asked)
    by_labels = {name: chunks(asked, tokenizer, name) for name in ("answer", "no end", "everything")}
    doubled = [[double_start(row) for row in rows] for rows in by_labels["answer"]]
    table = {
        "as it should be": (by_labels["answer"], "left"),
        "padding on the other side": (by_labels["answer"], "right"),
        "a second start token": (doubled, "left"),
        "end masked with the padding": (by_labels["no end"], "left"),
        "prompt and template trained": (by_labels["everything"], "left"),
    }
    found = {}
    for name, (batches, side) in table.items():
        made = [padded(tokenizer, rows, side) for rows in batches]
        tokens = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in made]
        found[name] = {"tokens": tokens, "losses": [loss_of(base, batch) for batch in made]}
    return found


# Resuming -----------------------------------------------------------------------------------------


def history(trainer, key: str, after: int) -> list[float]:
    """What the Trainer logged at each step after some."""
    return [e[key] for e in trainer.state.log_history if key in e and e["step"] > after]


def resume(asked: dict, seed: int) -> dict:
    """Losses and learning rates of the steps after a checkpoint: at first, and taken again from the disk.

    "whole" resumes from the whole checkpoint, "adapter alone" without the files in STATES. Both begin with
    other adapters, so what agrees came from the disk. `test_loss` is the held-out loss at the end.
    """
    test = load_task(asked["task"]).test.select(range(4 * asked["test_rows"]))
    found = {}
    with tempfile.TemporaryDirectory() as directory, redirect_stderr(io.StringIO()):
        whole = Path(directory) / "run" / f"checkpoint-{asked['save']}"
        alone = Path(directory) / "alone" / whole.name
        for name, checkpoint in (("first", None), ("whole", whole), ("adapter alone", alone)):
            run = str(Path(directory) / ("run" if checkpoint is None else "resumed"))
            saves = {"save_strategy": "no" if checkpoint else "steps", "save_steps": asked["save"]}
            trainer, tokenizer = make_trainer(asked, asked, seed, run, **saves)
            if checkpoint:
                for parameter in filter(lambda p: p.requires_grad, trainer.model.parameters()):
                    torch.nn.init.ones_(parameter)
            train(trainer, checkpoint and str(checkpoint))
            rows = encode_rows(tokenizer, asked, test)[0][: asked["test_rows"]]
            found[name] = {
                "losses": history(trainer, "loss", asked["save"]),
                "learning_rates": history(trainer, "learning_rate", asked["save"]),
                "test_loss": held_out_loss(trainer.model.eval(), tokenizer, rows),
            }
            if checkpoint is None:
                shutil.copytree(whole, alone)
                for file in STATES:
                    (alone / file).unlink()
    return found


# Eight-bit AdamW ----------------------------------------------------------------------------------


def in_32_bits(optimizer) -> int:
    """Trained numbers whose states the optimizer keeps in 32 bits."""
    found = 0
    for parameter, state in optimizer.state.items():
        full = (t for t in state.values() if torch.is_tensor(t) and t.numel() == parameter.numel() > 1)
        found += parameter.numel() * any(t.dtype == torch.float32 for t in full)
    return found


def state_bytes(asked: dict, seed: int) -> dict:
    """Bytes of the optimizer's states after one step: the recipe's optimizer, and torch's AdamW."""
    found = {}
    for optim in (asked["optim"], "adamw_torch"):
        with tempfile.TemporaryDirectory() as directory, redirect_stderr(io.StringIO()):
            trainer, _ = make_trainer(asked | {"steps": 1}, asked | {"optim": optim}, seed, directory)
            train(trainer)
        numbers = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        size = storage_bytes(trainer.optimizer)
        found[optim] = {
            "trained_numbers": numbers,
            "numbers_in_32_bits": in_32_bits(trainer.optimizer),
            "state_bytes": size,
            "bytes_per_number": size / numbers,
        }
    return found


# What a finding is taken on: so many batches of so many rows, or with a checkpoint at a step. The formats
# of numbers take more batches, since the verdict there is about a difference within noise.
FINDINGS = {
    "padding token": (padding_token, {"batches": 4, "rows": 8}),
    "padding side": (padding_side, {"batches": 4, "rows": 8}),
    "five batches": (five_batches, {"batches": 4, "rows": 8}),
    "state bytes": (state_bytes, {}),
    "resume": (resume, {"save": 12}),
    "checkpointing": (checkpointing, {"batches": 3, "rows": 2, "flop_tokens": 64}),
    "precision": (precision, {"batches": 6, "rows": 2}),
}


def main(arguments: list[str] | None = None) -> None:
    """Measure what has no record yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--findings", nargs="+", default=list(FINDINGS), choices=list(FINDINGS))
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args(arguments)
    for seed in range(options.seeds):
        for name in options.findings:
            measure, own = FINDINGS[name]
            asked = SETTINGS | MAIN | own | {"finding": name}
            if measured.is_recorded("recipe_mistakes", asked, seed):
                print(f"{name}, seed {seed}: recorded already", flush=True)
                continue
            figures = measure(asked, seed)
            measured.record("recipe_mistakes", asked, figures, seed)
            print(f"{name}, seed {seed}: {figures}", flush=True)


if __name__ == "__main__":
    main()
