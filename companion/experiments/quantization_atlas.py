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
import gc
import hashlib
import itertools
from functools import cache, partial

from atlas_formats import settings
from atlas_runs import (
    LORA,
    TASKS,
    load_encoder,
    run_encoder,
    run_lora,
    run_perplexity,
    run_small,
    run_tasks,
    run_times,
)
from lora2qlora.lab import measured
from lora2qlora.lab.models import SMALL_LM, load_base_model, load_small_lm
from rank_sweep import best_exponent

MODEL = "smollm2-135m"
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
