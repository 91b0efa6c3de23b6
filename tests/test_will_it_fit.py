"""The page "Will it fit?": its script counts what the Python ledger counts, with the same constants."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from lora2qlora import memory
from lora2qlora.memory import COMPONENTS, LINEARS, SHAPES, Full, LlamaShape, LoRA, Optimizer, QLoRA, forecast
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


# What a family does otherwise than a Llama, the page's script does not count: such shapes are not on it.
OTHERWISE = ("form", "biases", "unturned", "window")
PRESETS = {
    name: shape
    for name, shape in SHAPES.items()
    if all(getattr(shape, field) == getattr(LlamaShape, field) for field in OTHERWISE)
}


def shape_data(shape: LlamaShape) -> dict:
    """A shape with nothing left open."""
    data = dataclasses.asdict(shape) | {"kv_heads": shape.kv_heads or shape.heads, "head_dim": shape.head_dim}
    for field in ("head_size", *OTHERWISE):
        del data[field]
    return data


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
    defaults = {"full": Full(), "lora": LoRA(), "qlora": QLoRA()}
    data = {
        "components": list(COMPONENTS),
        "linears": list(LINEARS),
        "piece": PIECE,
        "shapes": {name: shape_data(shape) for name, shape in PRESETS.items()},
        "methods": {name: method_data(method) for name, method in defaults.items()},
        "optimizers": {name: dataclasses.asdict(optimizer) for name, optimizer in OPTIMIZERS.items()},
    }
    return f"{HEAD}var WILL_IT_FIT_DATA = {json.dumps(data, indent=1)};\n"


@pytest.fixture(scope="module")
def script() -> quickjs.Context:
    """The page's script, in an engine without a page."""
    context = quickjs.Context()
    for name in ("will_it_fit_data.js", "will_it_fit.js"):
        context.eval((STATIC / name).read_text(encoding="utf-8"))
    return context


def test_the_constants_are_the_packages():
    assert (STATIC / "will_it_fit_data.js").read_text(encoding="utf-8") == constants()


def settings(count: int):
    """Random settings, small ones and presets."""
    choose = random.Random(0)
    dtypes = (torch.bfloat16, torch.float32)
    for _ in range(count):
        kv_heads = choose.choice([1, 2, 4])
        heads = kv_heads * choose.choice([1, 2, 3])
        sizes = [choose.choice([2, 6, 16, 50]) * heads, choose.randint(1, 4), heads, choose.randint(1, 900)]
        shape = LlamaShape(*sizes, choose.randint(1, 3000), kv_heads, None, choose.random() < 0.3)
        if choose.random() < 0.1:
            shape = choose.choice(list(PRESETS.values()))
        targets = tuple(name for name in LINEARS if choose.random() < 0.6) or LINEARS
        rank, dtype, own = choose.randint(1, 64), choose.choice(dtypes), choose.choice(dtypes)
        quantized = (choose.choice([32, 64, 100]), choose.choice([256, None]), choose.choice(dtypes))
        method = choose.choice(
            [Full(dtype), LoRA(rank, targets, dtype, own), QLoRA(rank, targets, dtype, own, *quantized)]
        )
        optimizer = choose.choice([*OPTIMIZERS.values(), memory.ADAMW, Optimizer(3, 2, 8, 1, 2)])
        batch, length = choose.randint(1, 20), choose.randint(1, 3000)
        if choose.random() < 0.1:  # so few tokens that dequantizing a large layer decides
            shape, batch, length = LlamaShape(512, 2, 4, 1376, 100), 1, choose.randint(1, 8)
        yield shape, method, batch, length, choose.random() < 0.5, optimizer


def test_a_thousand_settings_agree_to_the_byte(script):
    fullest = set()
    for shape, method, batch, length, checkpointing, optimizer in settings(1000):
        arguments = [shape_data(shape), method_data(method), batch, length, checkpointing]
        arguments.append(dataclasses.asdict(optimizer))
        found = json.loads(script.eval(f"JSON.stringify(WillItFit.forecast(...{json.dumps(arguments)}))"))
        peaks = forecast(shape, method, batch, length, checkpointing, optimizer).peaks
        expected = [dataclasses.asdict(ledger) | {"total": ledger.total} for ledger in peaks.values()]
        assert found == expected, (shape, method, batch, length, checkpointing, optimizer)
        fullest.add(max(range(3), key=lambda phase, found=found: found[phase]["total"]))
    assert fullest == {0, 1, 2}


def test_the_page_has_what_the_script_asks_for():
    page = (ROOT / "book" / "will_it_fit.md").read_text(encoding="utf-8")
    for name in ("will_it_fit_data.js", "will_it_fit.js"):
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
