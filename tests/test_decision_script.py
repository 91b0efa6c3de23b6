"""The page "What should I do?": its script answers with the bytes of the Python ledger."""

import json
import re

import pytest
import torch
from decision_page import PAGE, RULES, STATIC, rules
from lora2qlora import memory
from lora2qlora.memory import SHAPES, Full, LoRA, QLoRA, training_memory
from test_will_it_fit import OPTIMIZERS, UNSAFE
from test_will_it_fit import SCRIPTS as LEDGER

SCRIPTS = (*LEDGER, *RULES, "decision_figures.js", "decision.js", "decision_page.js")
OUTPUTS = rules()[1]


@pytest.fixture(scope="module")
def script():
    """The page's scripts, in an engine without a page."""
    quickjs = pytest.importorskip("quickjs", reason="quickjs has no wheel for this Python or this machine")
    context = quickjs.Context()
    for name in SCRIPTS:
        context.eval((STATIC / name).read_text(encoding="utf-8"))
    return context


def called(script, function: str, *arguments):
    """What a function of the script returns."""
    return json.loads(script.eval(f"JSON.stringify(Decision.{function}(...{json.dumps(arguments)}))"))


def method_of(question: dict, name: str):
    """The package's method for the page's setting."""
    dtype = torch.float32 if question["chip"] == "cpu" else torch.bfloat16
    if name == "full":
        return Full(dtype if question["chip"] == "bf16" else torch.float32)
    if name == "lora":
        return LoRA(8, dtype=dtype)
    return QLoRA(8, dtype=torch.float32, compute_dtype=dtype)


def bytes_of(question: dict, name: str, divided: bool) -> int:
    """The Python ledger's bytes."""
    states = "AdamW, as torch has it"
    if name == "full":
        states = "AdamW, 32-bit states" if divided else "AdamW, 8-bit states"
    cards = question["cards"] if divided else 1
    setting = (1, question["length"], True, OPTIMIZERS[states], cards)
    return training_memory(SHAPES[question["model"]], method_of(question, name), *setting).total


# Every method in every place, and each kind of every input at least once; not too deep for a slow engine.
BASE = {"chip": "bf16", "rows": 1000, "length": 512, "task": "classify", "deploy": "apart", "aim": "cost"}
BASE |= {"keep": "no", "cards": 1, "card": 8}
QUESTIONS = {
    "lora one": {"model": "SmolLM2-135M", "chip": "cpu", "rows": 1},
    "lora one, of two": {"model": "Qwen3-1.7B", "card": 24, "cards": 2, "deploy": "vllm", "rows": 383},
    "lora one, though full": {"model": "Qwen3-0.6B", "card": 80, "aim": "loss", "rows": 10**9},
    "qlora one": {"model": "Qwen3-8B", "card": 16, "chip": "fp16", "deploy": "many", "keep": "yes"},
    "qlora one, to serve": {"model": "Phi-4", "card": 80, "deploy": "four", "rows": 384, "task": "style"},
    "qlora one, on a CPU": {"model": "LLaMA-7B", "chip": "cpu", "length": 64, "deploy": "four"},
    "lora divided": {"model": "LLaMA-13B", "cards": 8, "rows": 3840},
    "lora divided, qlora no": {"model": "Llama-3.1-8B", "cards": 16, "length": 64},
    "qlora divided": {"model": "LLaMA-13B", "cards": 2, "deploy": "gguf", "task": "facts"},
    "full one": {"model": "Qwen2.5-3B", "card": 80, "deploy": "merged", "aim": "loss", "rows": 3841},
    "full divided": {"model": "Llama-3.2-3B", "card": 16, "cards": 4, "deploy": "gguf", "aim": "loss"},
    "qlora no": {"model": "Llama-3.2-1B", "length": 4096, "deploy": "four"},
}
QUESTIONS = {name: BASE | changes for name, changes in QUESTIONS.items()}


def decided(script, question: dict) -> dict:
    shape = f"WILL_IT_FIT_DATA.shapes[{json.dumps(question['model'])}]"
    return json.loads(script.eval(f"JSON.stringify(Decision.decide({json.dumps(question)}, {shape}))"))


def fits_of(question: dict) -> dict:
    """Where each method fits, by the Python ledger."""
    most, found = 0.9 * question["card"] * 2**30, {}
    for name in ("full", "lora", "qlora"):
        alone = bytes_of(question, name, divided=False)
        each = bytes_of(question, name, divided=True) if question["cards"] > 1 else None
        place = "one" if alone <= most else "divided" if each and each <= most else "no"
        found[name] = {"alone": alone, "each": each, "place": place}
    return found


def method_said(question: dict, fits: dict) -> str:
    """The method by the sentences of chapters 05, 17 and 19, without the table of rules."""
    if (
        question["aim"] == "loss"
        and question["deploy"] in ("merged", "gguf", "vllm")
        and fits["full"]["place"] != "no"
    ):
        return "full"
    if question["deploy"] == "four" or fits["lora"]["place"] == "no":
        return "qlora"
    return "lora" if fits["lora"]["place"] == "one" or fits["qlora"]["place"] != "one" else "qlora"


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_is_answered_with_the_ledgers_bytes(script, name):
    question = QUESTIONS[name]
    found, fits = decided(script, question), fits_of(question)
    assert found["fits"] == fits
    method = found["kinds"]["method"]
    fit = fits[method]
    assert f"{method} {fit['place']}" == name.split(",")[0]
    assert method == method_said(question, fits)
    alone = fit["place"] == "one" or question["cards"] == 1
    assert found["ledger"]["total"] == (fit["alone"] if alone else fit["each"])
    assert [a["output"] for a in found["answers"]] == list(OUTPUTS)
    assert all(a["say"] and a["why"] and a["link"] for a in found["answers"])
    assert not [a for a in found["answers"] for text in a.values() if re.search(r"[{}]|undefined|NaN", text)]
    assert bool(found["ladder"]) == (fit["place"] == "no")
    assert found["kinds"]["rows"] == (
        "few" if question["rows"] < 384 else "like" if question["rows"] <= 3840 else "many"
    )


def test_the_ladder_keeps_a_tenth_of_the_card_free(script):
    question = called(script, "start") | {
        "model": "Llama-3.2-1B",
        "length": 4096,
        "card": 8,
        "deploy": "four",
    }
    found = decided(script, question)
    assert found["kinds"]["place"] == "no"
    assert {rung["fits"] for rung in found["ladder"]} == {True, False}
    assert all(rung["fits"] == (rung["total"] <= 0.9 * 8 * 2**30) for rung in found["ladder"])
    (first,) = [rung for rung in found["ladder"] if rung["first"]]
    assert f"down to: {first['words']}." in next(
        a["say"] for a in found["answers"] if a["output"] == "memory"
    )


def test_the_adapters_file_and_what_8_bits_save_are_the_ledgers(script):
    found = decided(script, called(script, "start"))
    said = {a["output"]: f"{a['say']} {a['why']}" for a in found["answers"]}
    method = LoRA(8)
    ledger = memory.static_memory(SHAPES["Llama-3.1-8B"], method)
    assert f"takes {ledger.adapters / 1e6:.1f} MB" in said["disk"]
    assert f"GB of {0.9 * 24 * 2**30 / 1e9:.1f} GB." in said["memory"]
    both = [training_memory(SHAPES["Llama-3.1-8B"], method, 1, 512, True, OPTIMIZERS[name]).total
            for name in ("AdamW, as torch has it", "AdamW, 8-bit states")]  # fmt: skip
    assert f"would save {(both[0] - both[1]) / 1e9:.2f} GB" in said["optimizer"]


@pytest.mark.parametrize(
    ("name", "size"),
    [("SmolLM2-135M", "small"), ("Llama-3.2-1B", "middle"), ("LLaMA-7B", "seven"), ("LLaMA-65B", "large")],
)
def test_the_rate_depends_on_the_size(script, name, size):
    found = decided(script, called(script, "start") | {"model": name, "card": 80})
    assert found["kinds"]["size"] == size
    rate = {"small": "0.0032 ", "middle": "0.0002, and", "seven": "0.0002, with", "large": "0.0001, with"}[
        size
    ]
    assert next(a["say"] for a in found["answers"] if a["output"] == "rate").startswith(rate)


def test_a_pasted_config_is_answered(script):
    config = {"model_type": "qwen2", "hidden_size": 256, "num_hidden_layers": 3, "intermediate_size": 512}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 999}
    script.set("text", json.dumps(config))
    start = "Object.assign(Decision.start(), {model: 'own'})"
    found = json.loads(script.eval(f"JSON.stringify(Decision.decide({start}, WillItFit.config.read(text)))"))
    shape = memory.shape_of(dict(config))
    setting = (1, 512, True, OPTIMIZERS["AdamW, as torch has it"])
    assert found["fits"]["lora"]["alone"] == training_memory(shape, LoRA(8), *setting).total


# --- the address ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUESTIONS)
def test_an_address_brings_a_question_back(script, name):
    question = QUESTIONS[name]
    address = called(script, "writeAddress", question)
    assert called(script, "readAddress", address, called(script, "start")) == question
    assert "model" not in called(script, "writeAddress", question | {"model": "own"})


@pytest.mark.parametrize(
    "address",
    ["", "#all-rules", "#model=own", "#model=__proto__", "#rows=0", "#rows=1e3", "#rows=-5", "#rows=2.5",
     "#rows=1000000001", "#rows=01", "#task=constructor", "#deploy=%", "#chip=toString", "#aim=",
     "#keep=maybe", "#card=24.0", "#cards=3", "#__proto__=1", "#model=<img src=x onerror=alert(1)>"],
)  # fmt: skip
def test_what_makes_no_sense_in_an_address_is_ignored(script, address):
    assert called(script, "readAddress", address, called(script, "start")) == called(script, "start")
    found = called(script, "readAddress", f"{address}&rows=7", called(script, "start"))
    assert found == called(script, "start") | {"rows": 7}


def test_the_page_has_what_the_script_asks_for_and_no_text_becomes_markup():
    page, script = PAGE.read_text(encoding="utf-8"), (STATIC / "decision_page.js").read_text(encoding="utf-8")
    for name in (*re.findall(r'find\("([\w-]+)"\)', script), "card", "cards", "chip", "length"):
        assert f'id="decision-{name}"' in page, name
    for name in SCRIPTS:
        assert f'src="../_static/{name}"' in page
        text = (STATIC / name).read_text(encoding="utf-8")
        for way in UNSAFE:
            assert way not in text, (name, way)
