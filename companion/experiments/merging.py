"""Chapter 15: which way do I merge? Every way, on the same trained adapters.

QLoRA is trained on three tasks with three seeds, at three learning rates for updates of three sizes. Each
adapter is then merged in every way of merging_ways.py, and each model is held to what was trained: loss
and answers on its task, perplexity on other text, and the KL divergence on both. A trained adapter with
all its ways is one record in records/merging.jsonl: cut it anywhere, start it again, and it goes on.

    python companion/experiments/merging.py --rates -3.0 --seeds 3
"""

import argparse
import copy
import gc
import math

import torch
from lora2qlora.adapters import add_lora, lora_layers, merge_cost
from lora2qlora.fast import use_fast
from lora2qlora.lab import measured
from lora2qlora.lab.batches import encode_rows
from lora2qlora.lab.models import load_base_model
from lora2qlora.lab.tasks import load_text
from lora2qlora.lab.training import IGNORED, collate, make_batches, train
from lora2qlora.nf4 import dequantize_nf4
from lora2qlora.qlora import NF4Linear, quantize_base
from merging_ways import WAYS, Trained, make, same_codes, stored_bytes
from rank_sweep import load_swept_task

TASKS = ("wordnet", "cmudict", "spam")
RATES = (-3.0, -2.5, -3.5)  # log10 of the learning rate; the middle size of update first
SETTINGS = {
    "model": "smollm2-135m",
    "rank": 8,
    "alpha": 16,
    "steps": 24,
    "batch_size": 8,
    "test_rows": 64,
    "text": "sotu",
    "text_tokens": 384,
}


def train_adapter(original, tokenizer, task, settings: dict, rate: float, seed: int):
    """QLoRA on every linear layer, in float32; (the model, the mean loss of the last ten steps)."""
    model = copy.deepcopy(original)
    quantize_base(model, compute_dtype=torch.float32)
    torch.manual_seed(seed)
    add_lora(model, "all-linear", settings["rank"], settings["alpha"])
    compute_fast(model)
    batches = make_batches(task, tokenizer, settings["batch_size"], seed=seed)
    history = train(model, batches, settings["steps"], 10**rate, seed=seed)
    last = [record.loss for record in history[-10:]]
    return model, sum(last) / len(last)


def compute_fast(model) -> None:
    """The compiled dequantizer in a model's NF4 layers, if it has any: the same bits, sooner."""
    if any(isinstance(module, NF4Linear) for module in model.modules()):
        use_fast(model)


def task_batches(tokenizer, task, rows: int) -> list[dict]:
    """The first test rows in batches of like length."""
    encoded = sorted(encode_rows(task, tokenizer, "test", rows), key=lambda e: len(e["input_ids"]))
    return [collate(encoded[i : i + 16], tokenizer.pad_token_id) for i in range(0, len(encoded), 16)]


def text_batch(tokenizer, settings: dict) -> dict:
    """The first tokens of the oldest text, as one row."""
    text = load_text(settings["text"])["text"][0]
    ids = torch.tensor([tokenizer(text)["input_ids"][: settings["text_tokens"]]])
    labels = ids.clone()
    labels[:, 0] = IGNORED  # it has no context
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def predictions(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities [n, vocabulary] before each answer token, the tokens [n], and their rows [n]."""
    following = batch["labels"][:, 1:]
    answered = (following != IGNORED).any(dim=0).nonzero()[:, 0]
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits = model(**inputs, logits_to_keep=answered).logits
    kept = following[:, answered] != IGNORED
    rows = torch.arange(len(following))[:, None].expand_as(kept)[kept]
    return logits[kept].float().log_softmax(-1), following[:, answered][kept], rows


def score(batches: list[dict], found: list, references: list) -> dict[str, float]:
    """Loss [nats a token], shares of answers and tokens that greedy decoding gets right, and KL [nats].

    Both are lists of what `predictions` gives. An answer is right where each of its tokens is the likeliest
    after those before it: then greedy decoding writes it. KL is the mean over tokens of
    KL(reference ‖ model).
    """
    nats = kl = right = tokens = answers = whole = 0
    for batch, (logs, targets, rows), (reference, *_) in zip(batches, found, references, strict=True):
        hits = logs.argmax(-1) == targets
        nats -= logs.gather(1, targets[:, None]).sum().item()
        kl += (reference.exp() * (reference - logs)).sum().item()
        right, tokens = right + hits.sum().item(), tokens + len(targets)
        answers += len(batch["labels"])
        whole += len(batch["labels"]) - len(set(rows[~hits].tolist()))
    shares = {"tokens_right": right / tokens, "right": whole / answers}
    return {"loss": nats / tokens, "kl": kl / tokens, **shares}


@torch.no_grad()
def sizes(trained: Trained) -> dict[str, float]:
    """‖ΔW‖ / ‖W‖, ‖Ŵ - W‖ / ‖W‖ and their ratio, over all adapted layers together."""
    update = error = whole = 0.0
    for name, layer in lora_layers(trained.model).items():
        W = trained.original.get_submodule(name).weight
        update += layer.delta_weight().square().sum().item()
        error += (dequantize_nf4(layer.base.weight, torch.float32) - W).square().sum().item()
        whole += W.square().sum().item()
    return {
        "update_over_weights": math.sqrt(update / whole),
        "error_over_weights": math.sqrt(error / whole),
        "error_over_update": math.sqrt(error / update) if update else 0.0,
    }


def measure(way: str, trained: Trained, on_task, on_text, references: dict) -> dict[str, float]:
    """What one way stores, keeps, costs and answers."""
    model, seconds = make(way, trained)
    figures = {"seconds": seconds, "bytes": stored_bytes(way, trained)}
    if way not in ("apart", "base alone", "PEFT on bitsandbytes"):
        cost = merge_cost(trained.model, model)
        figures |= {"kept": cost.kept, "error": cost.error, "unchanged": cost.unchanged}
    if way in ("dequantized, NF4 again", "original, then NF4", "PEFT on bitsandbytes"):
        figures["same_codes"] = same_codes(model, trained)
    model = model if way == "PEFT on bitsandbytes" else model.float()
    compute_fast(model)
    found = {
        "task": [predictions(model, b) for b in on_task],
        "text": [predictions(model, b) for b in on_text],
    }
    references |= references or found  # the first way is what the others are held to
    text = score(on_text, found["text"], references["text"])
    figures |= score(on_task, found["task"], references["task"])
    return figures | {"perplexity": math.exp(text["loss"]), "text_kl": text["kl"]}


def run(original, tokenizer, settings: dict, seed: int, ways=tuple(WAYS)) -> dict:
    """Train one adapter and measure every way on it; "apart" comes first, and the others are held to it."""
    task = load_swept_task(settings["task"])
    rate = settings["log10_learning_rate"]
    model, train_loss = train_adapter(original, tokenizer, task, settings, rate, seed)
    trained = Trained(model, original, settings["model"], settings["rank"])
    on_task = task_batches(tokenizer, task, settings["test_rows"])
    on_text, references, found = [text_batch(tokenizer, settings)], {}, {}
    for way in ways:
        found[way] = measure(way, trained, on_task, on_text, references)
        gc.collect()
        shown = {k: float(f"{v:.4g}") for k, v in found[way].items()}
        print(f"  {way}: {shown}", flush=True)
    return {"train_loss": train_loss, **sizes(trained), "ways": found}


def main(arguments: list[str] | None = None) -> None:
    """Measure what has no record yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"])
    options = parser.parse_args(arguments)
    original, tokenizer = load_base_model(SETTINGS["model"])
    for rate in options.rates:
        for seed in range(options.seeds):
            for task in options.tasks:
                asked = SETTINGS | {"steps": options.steps, "task": task, "log10_learning_rate": rate}
                if measured.is_recorded("merging", asked, seed):
                    print(f"{task}, rate 1e{rate}, seed {seed}: recorded already", flush=True)
                    continue
                print(f"{task}, rate 1e{rate}, seed {seed}:", flush=True)
                measured.record("merging", asked, run(original, tokenizer, asked, seed), seed)


if __name__ == "__main__":
    main()
