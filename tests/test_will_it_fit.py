"""The page "Will it fit?": its script counts what the Python ledger counts, with the same constants."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from lora2qlora import memory
from lora2qlora.memory import COMPONENTS, LINEARS, SHAPES, Full, LlamaShape, LoRA, Optimizer, QLoRA, forecast
from lora2qlora.memory.families import FORMS
from lora2qlora.nf4 import PIECE

quickjs = pytest.importorskip("quickjs", reason="quickjs has no wheel for this Python or this machine")
ROOT = Path(__file__).resolve().parents[1]
STATIC = ROOT / "book" / "_static"
HEAD = "/* Written by tests/test_will_it_fit.py from lora2qlora.memory; the test compares. */\n"
OPTIMIZERS = {
    "AdamW, 32-bit states": memory.ADAMW_32,
    "AdamW, as torch has it": memory.ADAMW_FOREACH,
    "AdamW, fused": memory.ADAMW_FUSED,
    "AdamW, 8-bit states": memory.ADAMW_8BIT,
    "SGD": memory.SGD,
    "SGD with momentum": memory.SGD_MOMENTUM,
}


SCRIPTS = ("will_it_fit_data.js", "will_it_fit.js", "will_it_fit_page.js")


def shape_data(shape: LlamaShape) -> dict:
    """A shape with nothing left open."""
    data = dataclasses.asdict(shape) | {"kv_heads": shape.kv_heads or shape.heads, "head_dim": shape.head_dim}
    del data["head_size"]
    return data | {"biases": list(shape.biases)}


def method_data(method) -> dict:
    """A method as the script takes it: dtypes are their bytes."""
    data = {"kind": type(method).__name__.lower(), "width": method.dtype.itemsize}
    if isinstance(method, LoRA):
        data |= {"rank": method.rank, "targets": list(method.targets), "own": method.adapter_dtype.itemsize}
    if isinstance(method, QLoRA):
        data |= {"block_size": method.block_size, "group_size": method.group_size}
        data |= {"compute": method.compute_dtype.itemsize}
    return data


def constants() -> str:
    """What will_it_fit_data.js must hold."""
    defaults = {"full": Full(), "lora": LoRA(), "qlora": QLoRA(dtype=torch.float32)}
    data = {
        "components": list(COMPONENTS),
        "linears": list(LINEARS),
        "forms": {name: dataclasses.asdict(form) for name, form in FORMS.items()},
        "piece": PIECE,
        "shapes": {name: shape_data(shape) for name, shape in SHAPES.items()},
        "methods": {name: method_data(method) for name, method in defaults.items()},
        "optimizers": {name: dataclasses.asdict(optimizer) for name, optimizer in OPTIMIZERS.items()},
    }
    return f"{HEAD}var WILL_IT_FIT_DATA = {json.dumps(data, indent=1)};\n"


@pytest.fixture(scope="module")
def script() -> quickjs.Context:
    """The page's script, in an engine without a page."""
    context = quickjs.Context()
    for name in SCRIPTS:
        context.eval((STATIC / name).read_text(encoding="utf-8"))
    return context


def test_the_constants_are_the_packages():
    assert (STATIC / "will_it_fit_data.js").read_text(encoding="utf-8") == constants()


# The families, as far as a shape tells them apart: a form, and what else is theirs.
FAMILIES = {
    "Llama": {},
    "Llama with biases": {"biases": LINEARS},
    "Qwen2.5": {"biases": LINEARS[:3]},
    "SmolLM3": {"unturned": 3},
    "Qwen3": {"form": "qwen3", "biases": LINEARS[:4]},
    "Gemma 3": {"form": "gemma3"},
    "Phi-3": {"form": "phi3"},
    "OLMo 2": {"form": "olmo2"},
    "Granite": {"form": "granite", "biases": LINEARS[4:]},
}
DTYPES = (torch.bfloat16, torch.float32)


def random_shape(choose: random.Random, family: str) -> LlamaShape:
    """A small shape of a family, with and without what not all of its models have."""
    extras = FAMILIES[family] if choose.random() < 0.8 else {"form": FAMILIES[family].get("form", "llama")}
    kv_heads = choose.choice([1, 2, 4])
    heads = kv_heads * choose.choice([1, 2, 3])
    hidden, head_size = choose.choice([2, 6, 16, 50]) * heads, choose.choice([None, 2, 16, 38])
    sizes = [hidden, choose.randint(1, 13), heads, choose.randint(1, 900)]
    return LlamaShape(
        *sizes, choose.randint(1, 3000), kv_heads, head_size, tied=choose.random() < 0.3, **extras
    )


def random_method(choose: random.Random, shape: LlamaShape) -> Full | LoRA:
    """A method that the shape admits."""
    names = tuple(shape.linears)
    targets = tuple(name for name in names if choose.random() < 0.6) or LINEARS
    rank, dtype, own = choose.randint(1, 64), choose.choice(DTYPES), choose.choice(DTYPES)
    quantized = (choose.choice([32, 64, 100]), choose.choice([256, None]), choose.choice(DTYPES))
    return choose.choice(
        [Full(dtype), LoRA(rank, targets, dtype, own), QLoRA(rank, targets, dtype, own, *quantized)]
    )


def random_setting(choose: random.Random, family: str) -> tuple:
    """A setting of this family: small, of a published size, or of few tokens and a large layer."""
    shape, batch, length = random_shape(choose, family), choose.randint(1, 20), choose.randint(1, 3000)
    if choose.random() < 0.1:
        form = FAMILIES[family].get("form", "llama")
        shape = choose.choice([s for s in SHAPES.values() if s.form == form])
        length = min(length, (shape.window or 3001) - 1)
    elif choose.random() < 0.1:  # so few tokens that dequantizing a large layer decides
        shape = dataclasses.replace(LlamaShape(512, 2, 4, 1376, 100), **FAMILIES[family])
        batch, length = 1, choose.randint(1, 8)
    optimizer = choose.choice([*OPTIMIZERS.values(), memory.ADAMW, Optimizer(3, 2, 8, 1, 2)])
    return shape, random_method(choose, shape), batch, length, choose.random() < 0.5, optimizer


def arguments_of(setting: tuple) -> str:
    """A setting as the script takes it."""
    shape, method, batch, length, checkpointing, optimizer = setting
    found = [shape_data(shape), method_data(method), batch, length, checkpointing]
    return json.dumps([*found, dataclasses.asdict(optimizer)])


def disagreements(script, family: str, count: int) -> tuple[list, set]:
    """Settings in which script and ledger differ by a byte, and the phases that were fullest."""
    choose, wrong, fullest = random.Random(family), [], set()
    for _ in range(count):
        setting = random_setting(choose, family)
        found = json.loads(script.eval(f"JSON.stringify(WillItFit.forecast(...{arguments_of(setting)}))"))
        peaks = forecast(*setting).peaks
        expected = [dataclasses.asdict(ledger) | {"total": ledger.total} for ledger in peaks.values()]
        if found != expected:
            wrong.append(setting)
        fullest.add(max(range(3), key=lambda phase, found=found: found[phase]["total"]))
    return wrong, fullest


@pytest.mark.parametrize("family", FAMILIES)
def test_the_script_is_the_ledger_to_the_byte(script, family):
    wrong, _ = disagreements(script, family, 60)
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_thousand_settings_agree_to_the_byte(script, family):
    assert disagreements(script, family, 1000) == ([], {0, 1, 2})


@pytest.mark.parametrize("name", SHAPES)
def test_every_model_named_has_the_packages_parameters(script, name):
    found = script.eval(f"WillItFit.parameters(WILL_IT_FIT_DATA.shapes[{json.dumps(name)}])")
    assert found == SHAPES[name].parameters


def test_a_window_is_refused_where_the_ledger_refuses_it(script):
    for length in (511, 512):
        setting = (SHAPES["Gemma-3-1B"], QLoRA(), 1, length, True, memory.ADAMW)
        if length == 511:
            script.eval(f"WillItFit.forecast(...{arguments_of(setting)})")
        else:
            with pytest.raises(quickjs.JSException, match="window of 512 tokens"):
                script.eval(f"WillItFit.forecast(...{arguments_of(setting)})")


def test_the_page_has_what_the_script_asks_for():
    page = (ROOT / "book" / "will_it_fit.md").read_text(encoding="utf-8")
    for name in SCRIPTS:
        assert f'src="../_static/{name}"' in page
    for name in (
        "model",
        "method",
        "optimizer",
        "rank",
        "batch",
        "length",
        "checkpointing",
        "card",
        "adapters",
    ):
        assert f'id="fit-{name}"' in page, name
        assert f'for="fit-{name}"' in page, name


if __name__ == "__main__":
    (STATIC / "will_it_fit_data.js").write_text(constants(), encoding="utf-8")
