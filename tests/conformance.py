"""What becomes of an adapter of each kind in each way of using it: equal, refused by name, or wrong.

A cell is measured as the largest difference of log-probabilities [nats] to the model that was trained, over
all positions and tokens; for llama.cpp and vLLM over those tokens that they say. Over a base in four bits the
trained model is the adapter kept apart over that same base.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from conformance_kinds import KINDS, Kind, base_model, prompts, trained
from llama_cpp import judged, llama_cpp
from lora2qlora.adapters import load_adapter, merge_lora, merge_quantized
from lora2qlora.lab.models import keep_trainable
from lora2qlora.qlora import quantize_base
from lora2qlora.serving import export_adapter, export_model, load_adapters, use_adapters
from peft import PeftModel
from served import small_lm
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

BOUND = 1e-4  # what float32 may differ by: 2e-5 was the largest measured
WRONG = 1e-2  # what is no rounding any more; nothing may lie between
TOKENS = 8
LONGEST = 160  # characters of what a tool says


class Case:
    """A kind's base, its adapter saved in a folder, and what the trained model says."""

    def __init__(self, kind: Kind, place: Path):
        self.kind, self.place, self.folder = kind, place, place / "adapter"
        base = base_model(kind)
        self.model = trained(kind, base, self.folder)
        trained(kind, base, place / "other", seed=1)
        self.prompts = prompts(kind)
        self.wanted, of_base = self.says(self.model), self.says(base)
        self.effect = apart(of_base, self.wanted)
        self.mixed = torch.stack([self.wanted[0], of_base[1], self.wanted[2]])

    def base(self) -> nn.Module:
        """The base as a reader loads it; if it is resized, its new rows are not those of the training."""
        return base_model(self.kind, rows=1)

    def four_bits(self) -> nn.Module:
        """A fresh base in bitsandbytes' NF4, float32 beside it."""
        folder = self.place / "base"
        if not folder.exists():
            self.base().save_pretrained(folder)
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
        keep_trainable(model)
        return model.eval()

    @torch.no_grad()
    def says(self, model: nn.Module, **options) -> Tensor:
        """Log-probabilities [row, position, token]."""
        return model(torch.tensor(self.prompts), **options).logits.log_softmax(-1)

    @torch.no_grad()
    def of_answer(self, ids: list[int], answer: list[int]) -> Tensor:
        """What the trained model gives the tokens of an answer."""
        logits = self.model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference."""
    return (one - other).abs().max().item()


def ours(case: Case) -> float:
    model = case.base()
    load_adapter(model, case.folder)
    return apart(case.says(model), case.wanted)


def peft(case: Case) -> float:
    return apart(case.says(PeftModel.from_pretrained(case.base(), str(case.folder)).eval()), case.wanted)


def our_merge(case: Case) -> float:
    model = case.base()
    load_adapter(model, case.folder)
    return apart(case.says(merge_lora(model)), case.wanted)


def peft_merge(case: Case) -> float:
    return apart(case.says(merged_and_saved(case, case.base())), case.wanted)


def merged_and_saved(case: Case, base: nn.Module) -> nn.Module:
    """The adapter merged into this base by PEFT, saved and loaded again."""
    merged = PeftModel.from_pretrained(base, str(case.folder)).merge_and_unload()
    merged.save_pretrained(case.place / "merged")
    return AutoModelForCausalLM.from_pretrained(case.place / "merged", dtype=torch.float32).eval()


def our_merge_nf4(case: Case) -> float:
    model = case.base()
    quantize_base(model, compute_dtype=torch.float32)
    load_adapter(model, case.folder)
    return apart(case.says(merge_quantized(model, into=torch.float32)), case.says(model))


def peft_merge_nf4(case: Case) -> float:
    model = PeftModel.from_pretrained(case.four_bits(), str(case.folder)).eval()
    before = case.says(model)
    return apart(case.says(model.merge_and_unload()), before)


def weighted(case: Case) -> float:
    return apart(case.says(summed(case)), case.wanted)


def summed(case: Case) -> nn.Module:
    """PEFT's sum of this adapter and another of its kind, with weights 1 and 0."""
    model = PeftModel.from_pretrained(case.base(), str(case.folder), adapter_name="one").eval()
    model.load_adapter(str(case.place / "other"), "other")
    model.add_weighted_adapter(["one", "other"], [1.0, 0.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    return model.eval()


def peft_batched(case: Case) -> float:
    model = PeftModel.from_pretrained(case.base(), str(case.folder), adapter_name="one").eval()
    model.load_adapter(str(case.place / "other"), "other")
    return apart(case.says(model, adapter_names=["one", "__base__", "one"]), case.mixed)


def batched(case: Case) -> float:
    model = case.base()
    load_adapters(model, {"one": case.folder, "other": case.place / "other"})
    use_adapters(model, ["one", None, "one"])
    return apart(case.says(model), case.mixed)


def gguf(case: Case) -> float:
    base = case.base()
    export_adapter(case.folder, base.config, case.place / "adapter.gguf")
    return in_llama_cpp(case, base, case.place / "adapter.gguf")


def in_llama_cpp(case: Case, model: nn.Module, *adapters: Path) -> float:
    """What llama.cpp says through a model's GGUF and these adapters, against the trained model."""
    export_model(model, small_lm()[1], case.place / "model.gguf", "F32")
    with llama_cpp(case.place / "model.gguf", *adapters) as ask:
        said = [judged(ask, ids, TOKENS, [1.0] * len(adapters)) for ids in case.prompts]
    pairs = zip(case.prompts, said, strict=True)
    return max(apart(logs, case.of_answer(ids, answer)) for ids, (answer, logs) in pairs)


OURS: dict[str, Callable[[Case], float]] = {
    "`load_adapter`": ours,
    "`merge_lora`": our_merge,
    "`merge_quantized` over NF4": our_merge_nf4,
    "`load_adapters`, mixed batch": batched,
    "`export_adapter`, llama.cpp": gguf,
}
THEIRS: dict[str, Callable[[Case], float]] = {
    "PEFT, loaded again": peft,
    "PEFT's merge, saved": peft_merge,
    "PEFT's merge over 4 bits": peft_merge_nf4,
    "PEFT's sum, weights 1 and 0": weighted,
    "PEFT's mixed batch": peft_batched,
}
WAYS = OURS | THEIRS


def cell(way: Callable[[Case], float], case: Case) -> dict:
    """One way's result: result (equal, refused, wrong) with words, largest and warned."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            largest = way(case)
        except (ValueError, KeyError) as error:  # what else there may be is no refusal, but a fault
            return refused(error.args[0].replace(f"{case.folder}/", ""))
    said = [str(one.message) for one in heard if issubclass(one.category, UserWarning)]
    return judge(largest, said[-1] if said else "")


def shortened(words: str) -> str:
    """What a tool says, on one line."""
    words = " ".join(words.split())
    return words if len(words) <= LONGEST else f"{words[:LONGEST]}…"


def refused(words: str) -> dict:
    return {"result": "refused", "words": shortened(words)}


def judge(largest: float, warned: str = "") -> dict:
    """The cell of this difference; AssertionError where it is neither rounding nor an error."""
    if BOUND < largest < WRONG:
        raise AssertionError(f"{largest} is neither equal nor wrong")
    if largest <= BOUND:
        return {"result": "equal", "largest": float(f"{largest:.2g}")}
    return {"result": "wrong", "largest": float(f"{largest:.2g}"), "warned": shortened(warned)}


@contextmanager
def case_of(name: str) -> Iterator[Case]:
    """A kind's case, in a folder that is there for the block."""
    with tempfile.TemporaryDirectory() as folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the training: each cell hears its own
            case = Case(KINDS[name], Path(folder))
        yield case


def measure(name: str, ways: Iterable[str] = tuple(WAYS)) -> dict:
    """{"effect": what the adapter changes [nats], "cells": way -> cell} of a kind."""
    with case_of(name) as case:
        return {"effect": float(f"{case.effect:.2g}"), "cells": {way: cell(WAYS[way], case) for way in ways}}
