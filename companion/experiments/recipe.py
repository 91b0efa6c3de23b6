"""A recipe like chapter 13's over seeds, for LoRA and QLoRA, and with one thing changed at a time.

One run is transformers' Trainer, PEFT and bitsandbytes on a task of chapter 00 in a chat template, with the
loss on the answer. The arms change the base (32 bits or NF4), the learning rate, the
labels, or the optimizer. Appends to records/recipe.jsonl and resumes where it was cut.

    python companion/experiments/recipe.py --seeds 3
"""

import argparse
import io
import itertools
import tempfile
import warnings
from contextlib import redirect_stderr

import torch
from datasets import Dataset
from lora2qlora.lab import measured
from lora2qlora.lab.models import load_base_model
from lora2qlora.lab.tasks import load_task
from lora2qlora.lab.training import IGNORED, answer_loss, collate
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments

# Short enough for a CPU; chapter 13 shows what these runs found.
SETTINGS = {
    "model": "smollm2-135m",
    "task": "wordnet",
    "system": "Name the category.",
    "max_length": 32,
    "train_rows": 1000,
    "test_rows": 32,
    "rank": 8,
    "alpha": 16,
    "dropout": 0.05,
    "steps": 24,
    "batch_size": 8,
    "warmup": 0.1,
}
RATES = (2e-3, 7e-4, 6e-3, 4e-3)
# The recipe itself comes first, then what differs from it in one point.
MAIN = {"quantization": "nf4", "learning_rate": RATES[0], "labels": "answer", "optim": "paged_adamw_8bit"}
ARMS = [
    MAIN,
    MAIN | {"quantization": None},
    MAIN | {"labels": "everything"},
    MAIN | {"labels": "no end"},
    MAIN | {"optim": "adamw_torch"},
    *(MAIN | {"quantization": q, "learning_rate": rate} for rate in RATES[1:] for q in ("nf4", None)),
    MAIN | {"labels": "everything", "learning_rate": RATES[2]},
]


def encode_row(tokenizer, settings: dict, row: dict, labels: str = "answer") -> dict[str, list[int]]:
    """One training row through the chat template, cut after the answer's end, with labels by hand."""
    chat = [
        {"role": "system", "content": settings["system"]},
        {"role": "user", "content": row["input"]},
        {"role": "assistant", "content": row["target"]},
    ]
    prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    ids = ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]
    answer = ids[len(prompt) :]
    if labels == "no end":
        answer = [IGNORED if token == tokenizer.pad_token_id else token for token in answer]
    hidden = prompt if labels == "everything" else [IGNORED] * len(prompt)
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": hidden + answer}


def encode_rows(tokenizer, settings: dict, rows, labels: str = "answer") -> tuple[list[dict], list[str]]:
    """The rows of at most `max_length` tokens, encoded, and their answers."""
    pairs = [(encode_row(tokenizer, settings, row, labels), row["target"]) for row in rows]
    pairs = [(e, target) for e, target in pairs if len(e["input_ids"]) <= settings["max_length"]]
    return [e for e, _ in pairs], [target for _, target in pairs]


@torch.no_grad()
def answers(
    model, tokenizer, rows: list[dict], new_tokens: int = 8, side: str = "left"
) -> list[tuple[str, bool]]:
    """Greedy answers to the rows' prompts: the text before the end token, and whether that came.

    `side` is where the prompts are padded; on the right, a model goes on after the padding.
    """
    found = []
    for start in range(0, len(rows), 16):
        prompts = [
            {
                "input_ids": [
                    i for i, label in zip(r["input_ids"], r["labels"], strict=True) if label == IGNORED
                ]
            }
            for r in rows[start : start + 16]
        ]
        inputs = tokenizer.pad(prompts, padding_side=side, return_tensors="pt").to(model.device)
        new = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        for tokens in new[:, inputs["input_ids"].shape[1] :].tolist():
            stopped = tokenizer.eos_token_id in tokens
            tokens = tokens[: tokens.index(tokenizer.eos_token_id)] if stopped else tokens
            found.append((tokenizer.decode(tokens).strip(), stopped))
    return found


@torch.no_grad()
def held_out_loss(model, tokenizer, rows: list[dict]) -> float:
    """Mean loss [nats per answer token] over rows."""
    total, count = 0.0, 0
    for start in range(0, len(rows), 16):
        batch = collate(rows[start : start + 16], tokenizer.pad_token_id)
        n = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += n * answer_loss(model, {k: v.to(model.device) for k, v in batch.items()}).item()
        count += n
    return total / count


def training_rows(settings: dict, tokenizer, labels: str = "answer") -> list[dict]:
    """The rows that the recipe trains on, encoded, in the order of the task."""
    rows = load_task(settings["task"]).train.select(range(settings["train_rows"]))
    return encode_rows(tokenizer, settings, rows, labels)[0]


def make_trainer(settings: dict, arm: dict, seed: int, directory: str, **changes):
    """The recipe before its first step: (Trainer, tokenizer). `changes` go into its TrainingArguments."""
    model, tokenizer = load_base_model(settings["model"], quantization=arm["quantization"])
    torch.manual_seed(seed)
    lora = LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)
    encoded = training_rows(settings, tokenizer, arm["labels"])
    options = {
        "max_steps": settings["steps"],
        "per_device_train_batch_size": settings["batch_size"],
        "learning_rate": arm["learning_rate"],
        "warmup_steps": settings["warmup"],
        "optim": arm["optim"],
        "seed": seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    arguments = TrainingArguments(output_dir=directory, **(options | changes))
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    trainer = Trainer(model, arguments, data_collator=collator, train_dataset=Dataset.from_list(encoded))
    trainer.remove_callback(PrinterCallback)
    return trainer, tokenizer


def train(trainer, checkpoint: str | None = None) -> list[float]:
    """Train to the end, from a checkpoint's directory if one is given; the loss of each step."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        trainer.train(resume_from_checkpoint=checkpoint)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def fine_tune(settings: dict, arm: dict, seed: int, directory: str):
    """The whole recipe: (model in eval mode, tokenizer, loss of each step)."""
    trainer, tokenizer = make_trainer(settings, arm, seed, directory)
    losses = train(trainer)
    return trainer.model.eval(), tokenizer, losses


def run(settings: dict, arm: dict, seed: int) -> dict:
    """Fine-tune once, and score the answers to held-out rows."""
    with tempfile.TemporaryDirectory() as directory, redirect_stderr(io.StringIO()):
        model, tokenizer, losses = fine_tune(settings, arm, seed, directory)
    task = load_task(settings["task"])
    rows, targets = encode_rows(tokenizer, settings, task.test.select(range(4 * settings["test_rows"])))
    rows, targets = rows[: settings["test_rows"]], targets[: settings["test_rows"]]
    found = answers(model, tokenizer, rows)
    return {
        "accuracy": task.metric([text for text, _ in found], targets)["accuracy"],
        "stopped": sum(stopped for _, stopped in found) / len(found),
        "test_loss": held_out_loss(model, tokenizer, rows),
        "losses": losses,
    }


def main(arguments: list[str] | None = None) -> None:
    """Run what has no record yet, arm by arm within a seed, so that a cut leaves all arms equally far."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"])
    parser.add_argument("--arms", type=int, nargs="+", default=range(len(ARMS)), help="numbers in ARMS")
    options = parser.parse_args(arguments)
    settings = SETTINGS | {"steps": options.steps}
    for seed, number in itertools.product(range(options.seeds), options.arms):
        arm = ARMS[number]
        if measured.is_recorded("recipe", settings | arm, seed):
            continue
        figures = run(settings, arm, seed)
        measured.record("recipe", settings | arm, figures, seed)
        shown = {key: value for key, value in figures.items() if key != "losses"}
        print(f"seed {seed}, {arm}: {shown}", flush=True)


if __name__ == "__main__":
    main()
