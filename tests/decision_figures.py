"""The figures of book/decision.md, each from a record, a chapter's output, or a chapter's own settings."""

import math
import re
from functools import cache
from pathlib import Path

import cheat_sheet_page
from book_notebook import read_chapter
from lora2qlora.lab import measured
from lora2qlora.lab.noise import relative_effect

ROOT = Path(__file__).resolve().parents[1]
# A figure by the chapter that prints it, and the words around it there; the group is what is taken.
PRINTED = {
    "small_model": ("00_quickstart", r"([\d.]+ million) parameters: \d+ MB in 16 bits"),
    "prompt_before": ("19_lora_versus_qlora", r"a prompt \| WordNet \| (\d+%) right"),
    "prompt_after": ("19_lora_versus_qlora", r"a prompt \| WordNet \| \d+% right; (\d+%) after training"),
    "facts_rank": ("02_updates_are_low_rank", r"all 64 recalled from rank (\d+) on"),
    "targets": ("04_adapters", r"Attention alone ends with ([\d.]+) times the loss"),
    "names": ("04_adapters", r"bytes, ([\d.]+%) more than the numbers"),
    "rate_low": ("05_rank_across_tasks", r"one step below, the loss is ([\d.]+) "),
    "rate_high": ("05_rank_across_tasks", r"one step above, the loss is ([\d.]+) "),
    "full_gain": ("05_rank_across_tasks", r"cmudict: LoRA has ([\d.]+) \([^)]*\) times the loss of full"),
    "forget": ("05_rank_across_tasks", r"after LoRA, ([\d.]+ \([^)]*\)) times that after full"),
    "peak_share": ("05_rank_across_tasks", r"\| rank 8 \| 2\.4 M \| 39 MB \| (\d+%)"),
    "q_text": ("09_quantization_quality", r"after pronunciation, other text has ([\d.]+) "),
    "adam_moves": ("12_optimizers", r"in each run some weight moves (over \d+ times) Adam's bound"),
    "adam_8bit": ("12_optimizers", r"raise the adapters' loss by (less than [\d.]+ nats)"),
    "full_torch": ("12_optimizers", r"torch's, 16 bits \| ([\d.]+)"),
    "full_8bit": ("12_optimizers", r"\| 8 bits \| ([\d.]+) \|"),
    "bf16_merge": ("15_merging", r"summed in bfloat16: \d+% of the weights unchanged, (\d+%) of ΔW kept"),
    "original": ("15_merging", r"task: \+([\d.]+ ± [\d.]+) nats, other text"),
    "gguf_f32": ("16_serving", r"\| F32 \| 32 \| \d+ of 50 \| (\d+) of 50"),
    "gguf_f16": ("16_serving", r"\| F16 \| 16 \| \d+ of 50 \| (\d+) of 50"),
    "gguf_q8": ("16_serving", r"\| Q8_0 \| 8\.5 \| \d+ of 50 \| (\d+) of 50"),
    "gguf_q4": ("16_serving", r"\| Q4_0 \| 4\.5 \| \d+ of 50 \| (\d+) of 50"),
    "many_merged": ("16_serving", r"100 merged: ([\d.]+) GB"),
    "many_apart": ("16_serving", r"one base and 100 adapters: ([\d.]+) GB"),
    "gathered": ("16_serving", r"the gathered batch takes ([\d.]+) times"),
    "ddp": ("17_many_gpus", r"and ([\d.]+) GB more with DDP"),
    "link_lora": ("17_many_gpus", r"break-even link[\s\S]*?3.3-70B, LoRA \| [\d.]+ \| ([\d.]+) "),
    "link_qlora": ("17_many_gpus", r"break-even link[\s\S]*?3.3-70B, QLoRA \| [\d.]+ \| ([\d.]+) "),
    "dora": ("18_variants", r"DoRA against LoRA: (\+\d+% ± \d+%)"),
    "pissa": ("18_variants", r"PiSSA against LoRA: (\+\d+% ± \d+%)"),
    "full_time": ("19_lora_versus_qlora", r"a full step takes ([\d.]+) times as long"),
    "swap": ("19_lora_versus_qlora", r"LoRA's adapter has \+(\d+%) loss"),
    "q_worse": ("19_lora_versus_qlora", r"pronunciation: \+([\d.]+%)"),
    "q_pairs": ("19_lora_versus_qlora", r"at this spread (\d+) would decide it"),
    "prompt_loss": ("20a_faq_training", r"prompt and answer: \+([\d.]+) ± [\d.]+ nats"),
    "bf16_sum": ("20b_faq_memory", r"bfloat16: 1 \+ 100 × 0.001 = ([\d.]+)"),
    "fp16_square": ("20b_faq_memory", r"float16: .*?300² = (inf)"),
    "torchtune": ("14_fast", r"torchtune, .*: (\d+%) longer"),
    "litgpt": ("14_fast", r"LitGPT, Llama-2-7B, NF4 over bf16: (\d+%) longer"),
}  # fmt: skip
# The same of the settings of chapter 13's recipe.
RECIPE = {
    "rank": r"RATE, RANK = \(.*?\)\[NUMBER\], (\d+)",
    "alpha_ranks": r"lora_alpha=(\d+) \* RANK",
    "rate_seven": r"RATE, RANK = \([\de-]+, ([\de-]+),",
    "rate_large": r"RATE, RANK = \([\de-]+, [\de-]+, ([\de-]+)\)",
    "held_out": r"HELD_OUT = ([\d.]+) ",
    "held_few": r"with few chats take ([\d.]+)",
    "step_rows": r"BATCH, ACCUMULATE = \(.*\((\d+), 1\)\)\[NUMBER\]",
}


@cache
def printed(chapter: str) -> str:
    """All that a chapter's cells show."""
    cells = read_chapter(ROOT / "book" / f"{chapter}.ipynb").code
    return "\n".join(text for cell in cells for text in cell.output_texts)


def only(pattern: str, text: str, name: str) -> str:
    """The group of a pattern; ValueError where it is not there, or says two things."""
    found = set(re.findall(pattern, text))
    if len(found) != 1:
        raise ValueError(f"{name}: {pattern!r} gives {sorted(found) or 'nothing'}; mend the pattern")
    return found.pop()


def called(chapter: str) -> str:
    """A chapter's name in prose."""
    return "chapter " + re.match(r"\d\d[a-c]?", chapter).group()


def of_chapters() -> dict[str, dict]:
    """What chapters print."""
    return {
        name: {"text": only(pattern, printed(chapter), name), "from": f"{called(chapter)}, output"}
        for name, (chapter, pattern) in PRINTED.items()
    }


def of_recipe() -> dict[str, dict]:
    """The settings of chapter 13."""
    chapter = "13_qlora_on_a_gpu"
    code = "\n".join(cell.source for cell in read_chapter(ROOT / "book" / f"{chapter}.ipynb").code)
    found = {name: float(only(pattern, code, name)) for name, pattern in RECIPE.items()}
    found["alpha"] = found.pop("alpha_ranks") * found["rank"]
    shares = {name: f"{found[name]:.0%}" for name in ("held_out", "held_few")}
    texts = {name: f"{value:.4f}".rstrip("0").rstrip(".") for name, value in found.items()} | shares
    source = f"{called(chapter)}, settings"
    return {name: {"text": texts[name], "value": value, "from": source} for name, value in found.items()}


def of_records() -> dict[str, dict]:
    """What records say, by the cheat sheet's own sums."""
    runs = measured.matching("rank_sweep", steps=48)
    (rows,) = {r.configuration["steps"] * r.configuration["batch_size"] for r in runs}
    sheet = cheat_sheet_page
    return {
        "rank_ratio": {"text": sheet.rank_ratio(), "from": "record rank_sweep"},
        "few_rows": {"text": str(rows), "value": rows, "from": "record rank_sweep"},
        "rate_small": {"text": f"{sheet.best_rate(8):.4f}", "from": "record rank_sweep"},
        "rate_full": {"text": f"{sheet.best_rate('full'):.4f}", "from": "record rank_sweep"},
        "q_loss": {"text": sheet.base_ratio(), "from": "records quantization_atlas and rank_sweep"},
        "slower_cpu": {"text": sheet.slower(), "from": "record speed"},
        "merge16": {"text": sheet.gain_kept("dequantized, float16"), "from": "record merging"},
        "merge4": {"text": sheet.gain_kept("PEFT on bitsandbytes"), "from": "record merging"},
    }


def of_gpu(reports: dict[str, str]) -> dict[str, dict]:
    """QLoRA's step against LoRA's on a GPU: two reports, until there is a record."""
    text = f"{reports['torchtune']} to {reports['litgpt']}"
    basis, source = (
        "Two reports, of torchtune and of LitGPT; this book measured it on no GPU.",
        f"{called('14_fast')}, output",
    )
    for r in measured.on_gpu("speed", "step of 7B, 512"):
        effect = relative_effect(*[r.figures[name]["rounds"] for name in ("qlora-peft", "lora")])
        text, source = f"{math.expm1(effect.mean):.0%}", "record gpu"
        basis = f"Measured with a 7B model on one card, {r.configuration['device']}."
    return {"slower_gpu": {"text": text, "from": source}, "slower_gpu_basis": {"text": basis, "from": source}}


def of_conformance() -> dict[str, dict]:
    """What vLLM does with two kinds of adapter, the last column of the second table."""
    page = (ROOT / "book" / "conformance.md").read_text(encoding="utf-8")
    table = page[page.index("**In PEFT and vLLM**") :].split("\n\n")[1] + "\n"
    kinds = {"vllm_lora": "plain LoRA", "vllm_dora": "DoRA"}
    return {
        name: {"text": only(rf"\| {kind} \|.* (\w+) \|\n", table, name), "from": "Adapter conformance"}
        for name, kind in kinds.items()
    }


def figures() -> dict[str, dict]:
    """Every figure by name: its text, its value where the page computes with it, and where it is from."""
    chapters = of_chapters()
    reports = {name: chapters.pop(name)["text"] for name in ("torchtune", "litgpt")}
    return chapters | of_recipe() | of_records() | of_gpu(reports) | of_conformance()
