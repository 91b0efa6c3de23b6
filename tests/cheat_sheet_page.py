"""book/cheat_sheet.md: every figure comes from the ledger or from a record; `make cheat-sheet` writes it.

`python tests/cheat_sheet_page.py` writes the page. test_cheat_sheet.py holds the page to what it would write.
"""

import math
import statistics
from pathlib import Path

from lora2qlora.double_quantization import bits_per_parameter
from lora2qlora.lab import measured
from lora2qlora.lab.noise import relative_effect
from lora2qlora.memory import (
    ADAMW_8BIT,
    ADAMW_32,
    SHAPES,
    Full,
    LoRA,
    QLoRA,
    static_memory,
    training_memory,
)

ROOT = Path(__file__).resolve().parents[1]
PAGE = "book/cheat_sheet.md"
MODELS = ("Llama-3.2-1B", "Llama-3.1-8B", "Llama-3.3-70B")
METHODS = {"full": Full(), "LoRA": LoRA(16), "QLoRA": QLoRA(16)}
TASKS = ("wordnet", "cmudict", "spam")


def peak(model: str, method, **changes) -> str:
    """[GB] of a training step, one sequence of 512 tokens, with checkpointing."""
    setting = {"batch": 1, "length": 512, "checkpointing": True} | changes
    return f"{training_memory(SHAPES[model], method, **setting).total / 1e9:.1f}"


def of_runs(name: str, **wanted) -> dict[tuple[str, int], float]:
    """Test loss by task and seed."""
    runs = measured.matching(name, **wanted)
    return {(r.configuration["task"], r.seed): r.figures["test_loss"] for r in runs if r.seed < 3}


def ratio(some: dict, others: dict) -> str:
    """The mean ratio of two sets of losses, with two standard errors on either side."""
    pairs = sorted(set(some) & set(others))
    effect = relative_effect([some[p] for p in pairs], [others[p] for p in pairs])
    low, middle, high = (math.exp(effect.mean + k * effect.error) for k in (-2, 0, 2))
    return f"{middle:.2f} ({low:.2f} to {high:.2f}, {effect.pairs} pairs)"


def rank_ratio() -> str:
    """Rank 1 against rank 64 on three tasks."""
    setting = {"log10_learning_rate": -2.5, "steps": 48}
    return ratio(*(of_runs("rank_sweep", rank=rank, **setting) for rank in (1, 64)))


def best_rate(rank) -> float:
    """The rate with the lowest mean validation loss over tasks and seeds, of those that all have run."""
    by_rate = {}
    for r in measured.matching("rank_sweep", rank=rank, steps=48):
        loss = math.log(r.figures["validation_loss"])
        by_rate.setdefault(r.configuration["log10_learning_rate"], {})[r.configuration["task"], r.seed] = loss
    whole = {e: found for e, found in by_rate.items() if len(found) == 3 * len(TASKS)}
    return 10 ** min(whole, key=lambda e: statistics.mean(whole[e].values()))


def base_ratio() -> str:
    """QLoRA against LoRA at LoRA's best rate."""
    setting = {"rank": 8, "log10_learning_rate": -2.5, "steps": 48}
    over_nf4 = of_runs("quantization_atlas", format="nf4+dq", block_size=64, **setting)
    return ratio(over_nf4, of_runs("rank_sweep", **setting))


def slower() -> str:
    """QLoRA's step against LoRA's, on a CPU."""
    step = measured.matching("speed", part="step")[-1].figures["seconds"]
    rounds = [q / p for q, p in zip(step["peft_bnb"], step["peft_lora"], strict=True)]
    return f"{statistics.median(rounds) - 1:.0%}"


def gain_kept(way: str) -> str:
    """The range over the adapters of the share of the training's gain that a merge keeps."""
    shares = []
    for r in measured.load("merging"):
        gone, end = (r.figures["ways"][w]["loss"] for w in ("base alone", "apart"))
        shares.append((gone - r.figures["ways"][way]["loss"]) / (gone - end))
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return low if low == high else f"{low} to {high}"


def states(method, optimizer) -> str:
    """[GB] of optimizer states for the 8B model."""
    return f"{static_memory(SHAPES['Llama-3.1-8B'], method, optimizer).optimizer / 1e9:.1f} GB"


def memory_table() -> str:
    """Peaks by model and method."""
    lines = [f"| [GB] | {' | '.join(METHODS)} | QLoRA, 4,096 tokens |", "|:--|" + "--:|" * 4]
    for model in MODELS:
        cells = [peak(model, method) for method in METHODS.values()]
        cells.append(peak(model, METHODS["QLoRA"], length=4096))
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page() -> str:
    """The page's text."""
    return TEMPLATE.format(
        bits=f"{bits_per_parameter():.3f}",
        plain_bits=f"{4 + 32 / 64:.1f}",
        memory=memory_table(),
        rank=rank_ratio(),
        lora_rate=f"{best_rate(8):.4f}",
        full_rate=f"{best_rate('full'):.4f}",
        base=base_ratio(),
        slower=slower(),
        half=gain_kept("dequantized, float16"),
        original=gain_kept("original, then NF4"),
        again=gain_kept("PEFT on bitsandbytes"),
        adapter32=states(METHODS["QLoRA"], ADAMW_32),
        adapter8=states(METHODS["QLoRA"], ADAMW_8BIT),
        full32=states(METHODS["full"], ADAMW_32),
        full8=states(METHODS["full"], ADAMW_8BIT),
    )


TEMPLATE = (Path(__file__).parent / "cheat_sheet_template.txt").read_text(encoding="utf-8")


if __name__ == "__main__":
    (ROOT / PAGE).write_text(page(), encoding="utf-8")
