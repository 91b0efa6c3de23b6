"""The page "Will it fit?": its script counts what the Python ledger counts, with the same constants."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from lora2qlora import memory
from lora2qlora.memory import (
    COMPONENTS,
    LINEARS,
    SHAPES,
    Full,
    LlamaShape,
    LoRA,
    Optimizer,
    QLoRA,
    forecast,
    shape_of,
)
from lora2qlora.memory.families import FAMILIES as FAMILY_OF_TYPE
from lora2qlora.memory.families import FORMS
from lora2qlora.memory.methods import trained_tensors
from lora2qlora.memory.step import Step
from lora2qlora.memory.tape import Tape
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


SCRIPTS = ("will_it_fit_data.js", "will_it_fit.js", "will_it_fit_config.js", "will_it_fit_page.js")
# Ways by which a text becomes markup or code, and the addresses of other hosts.
UNSAFE = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "http:", "https:")


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
        "families": FAMILY_OF_TYPE,
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


def arguments_of(setting: tuple, ranks: int = 1) -> str:
    """A setting as the script takes it."""
    shape, method, batch, length, checkpointing, optimizer = setting
    found = [shape_data(shape), method_data(method), batch, length, checkpointing]
    return json.dumps([*found, dataclasses.asdict(optimizer), False, ranks])


def disagreements(script, family: str, count: int) -> tuple[list, set]:
    """Settings in which the two differ by a byte after any allocation, and the phases that were fullest."""
    choose, wrong, fullest = random.Random(family), [], set()
    for _ in range(count):
        setting, ranks = random_setting(choose, family), choose.choice([1, 1, 2, 3, 8])
        arguments = arguments_of(setting, ranks)
        found = json.loads(script.eval(f"JSON.stringify(WillItFit.rehearse(...{arguments}))"))
        expected = forecast(*setting, ranks=ranks)
        peaks = [list(dataclasses.astuple(ledger)) for ledger in expected.peaks.values()]
        if found != {"curve": list(expected.curve), "peaks": peaks}:
            wrong.append(setting)
        fullest.add(max(range(3), key=lambda phase, peaks=peaks: sum(peaks[phase])))
    return wrong, fullest


@pytest.mark.parametrize("family", FAMILIES)
def test_the_script_is_the_ledger_to_the_byte(script, family):
    wrong, _ = disagreements(script, family, 60)
    assert wrong == []


@pytest.mark.long
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


# --- a config.json ---------------------------------------------------------------------------------

PUBLISHED = json.loads(Path(__file__).with_name("published_configs.json").read_text(encoding="utf-8"))


def random_config(choose: random.Random, family: str) -> dict:
    """A config.json of a model type, with and without what the type has defaults for."""
    kv_heads, head_dim, layers = choose.choice([1, 2]), choose.choice([16, 64]), choose.randint(1, 12)
    config = {
        "hidden_size": 192 * choose.randint(1, 9),  # heads of an even size, 6 of them or the default
        "num_hidden_layers": layers,
        "num_attention_heads": 6,
        "num_key_value_heads": kv_heads,
        "intermediate_size": choose.randint(1, 999),
        "vocab_size": choose.randint(300, 9999),
        "head_dim": head_dim,
        "tie_word_embeddings": choose.random() < 0.5,
        "attention_bias": choose.random() < 0.5,
        "mlp_bias": choose.random() < 0.5,
        "sliding_window": choose.choice([None, 99, 4096]),
        "use_sliding_window": choose.random() < 0.5,
        "max_window_layers": choose.randint(0, 12),
        "no_rope_layer_interval": choose.randint(1, 12),
        "sliding_window_pattern": choose.choice([1, 2, 6]),
        "layer_types": [choose.choice(["full_attention", "sliding_attention"]) for _ in range(layers)],
        "no_rope_layers": [int((i + 1) % 2 > 0) for i in range(layers)],
        "pad_token_id": 0,
    }
    dropped = [
        key for key in list(config)[1:] if choose.random() < (0.8 if key[-5:] in ("types", "ayers") else 0.3)
    ]
    if "num_key_value_heads" in dropped:  # the default divides the default alone
        dropped.append("num_attention_heads")
    if family in ("llama", "phi3", "olmo2", "granite") and choose.random() < 0.3:
        config["num_key_value_heads"] = None  # the other types take none
    if family in ("gemma3_text", "cwm") and config["sliding_window"] is None:
        dropped.append("sliding_window")
    if "num_hidden_layers" in dropped:  # as many as the type has: lists of another length are refused
        dropped += ["layer_types", "no_rope_layers"]
    return {"model_type": family} | {key: config[key] for key in config if key not in dropped}


def shape_on_the_page(script, config) -> dict:
    text = config if isinstance(config, str) else json.dumps(config)
    return json.loads(script.eval(f"JSON.stringify(WillItFit.config.read({json.dumps(text)}))"))


@pytest.mark.parametrize("family", FAMILY_OF_TYPE)
def test_a_config_gives_the_shape_that_the_package_reads(script, family):
    choose, windows, unturned = random.Random(family), set(), set()
    for _ in range(100):
        config = random_config(choose, family)
        shape = shape_of(dict(config))
        assert shape_on_the_page(script, config) == shape_data(shape), config
        windows.add(shape.window is None)
        unturned.add(shape.unturned is None)
    assert (False in windows) == (family not in ("llama", "olmo2", "granite"))
    assert True in windows or family == "cwm"
    assert family != "smollm3" or unturned == {True, False}


@pytest.mark.parametrize("name", PUBLISHED)
def test_so_does_a_published_one(script, name):
    config = {key: value for key, value in PUBLISHED[name].items() if key != "parameters"}
    assert shape_on_the_page(script, config) == shape_data(SHAPES[name])
    if "text_config" in config:
        del config["text_config"]["model_type"]
        assert shape_on_the_page(script, config) == shape_data(SHAPES[name])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "no object"),
        ("null", "no object"),
        ("{}", "names no model_type"),
        ({"model_type": "cohere"}, "type cohere are not known.*It knows the types llama.*simulate_step"),
        ({"model_type": "constructor"}, "type constructor are not known"),
        ({"model_type": "mixtral"}, "type mixtral is a mixture of experts.*simulate_step"),
        ({"model_type": "qwen3_moe"}, "qwen3_moe is a mixture of experts"),
        ({"model_type": "deepseek_v3", "n_routed_experts": 256}, "deepseek_v3 is a mixture"),
        ({"model_type": "llama4", "text_config": {"model_type": "llama4_text", "num_local_experts": 16}},
         "llama4_text is a mixture"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "t5 has an encoder"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.75}, "partial_rotary_factor, which is 0.75"),
        ({"model_type": "llama", "attention_dropout": 0.1}, "attention_dropout, which is 0.1"),
        ({"model_type": "llama", "hidden_act": "relu"}, 'hidden_act, which is "relu"'),
        ({"model_type": "gemma3_text", "final_logit_softcapping": 30}, "final_logit_softcapping"),
        ({"model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layers": [1, 0, 0, 1]}, "come evenly"),
        ({"model_type": "llama", "hidden_size": -1}, "hidden_size must be a whole number from 1"),
        ({"model_type": "llama", "hidden_size": 4096.5}, "hidden_size must be"),
        ({"model_type": "llama", "hidden_size": "4096"}, 'hidden_size must be .* is "4096"'),
        ({"model_type": "llama", "num_hidden_layers": 1e9}, "num_hidden_layers must be .* to 1000"),
        ({"model_type": "llama", "num_key_value_heads": 3}, "must divide"),
        ({"model_type": "llama", "head_dim": 3}, "even size"),
    ],
)  # fmt: skip
def test_other_configs_are_refused_with_the_reason(script, config, words):
    with pytest.raises(quickjs.JSException, match=words):
        shape_on_the_page(script, config)


# --- the page --------------------------------------------------------------------------------------


def on_the_page(script, call: str):
    """What a function of the page gives."""
    return json.loads(script.eval(f"JSON.stringify(WillItFit.page.{call})"))


def setting_of(script, **changes) -> dict:
    """The setting that the page starts with, changed."""
    return on_the_page(script, "start()") | changes


@pytest.mark.parametrize("cards", [1, 2, 8])
@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_the_page_counts_one_of_several_cards(script, method, cards):
    setting = setting_of(script, method=method, cards=cards)
    found = on_the_page(script, f"measure({json.dumps(setting)}, WILL_IT_FIT_DATA.shapes['LLaMA-7B'])")
    assert found["ledger"]["total"] == total_of(setting)


def test_accumulation_over_several_cards_holds_a_part_of_the_gradients(script):
    def total(**changes):
        setting = json.dumps(setting_of(script, method="full") | changes)
        call = f"measure({setting}, WILL_IT_FIT_DATA.shapes['LLaMA-7B'])"
        return on_the_page(script, call)["ledger"]["total"]

    one, several = ([total(cards=n, accumulates=adds) for adds in (False, True)] for n in (1, 8))
    assert one[1] >= one[0]
    assert 0 <= several[1] - several[0] <= 2 * SHAPES["LLaMA-7B"].parameters / 8 * 1.01


def total_of(setting: dict, accumulates: bool = False) -> int:
    """The Python ledger's bytes of a setting of the page."""
    shape, bits = SHAPES[setting["model"]], {2: torch.bfloat16, 4: torch.float32}
    targets = LINEARS
    if setting["targets"] == "qv":
        targets = ("qkv_proj",) if shape.traits.fused else ("q_proj", "v_proj")
    method = Full()
    if setting["method"] != "full":
        kind, dtype = {"lora": (LoRA, torch.bfloat16), "qlora": (QLoRA, bits[setting["outside"]])}[
            setting["method"]
        ]
        method = kind(setting["rank"], targets, dtype, bits[setting["adapters"]])
    chosen = (setting["batch"], setting["length"], setting["checkpointing"], OPTIMIZERS[setting["optimizer"]])
    if not accumulates:
        return memory.training_memory(shape, method, *chosen, setting["cards"]).total
    return accumulated(shape, method, *chosen)


def accumulated(shape, method, batch, length, checkpointing, optimizer) -> int:
    """The fullest moment of a step that finds gradients, by the curve of the Python tape.

    Every gradient is there from the start; a new one is added to it, and gone when the next one is made.
    """
    tape = AccumulatingTape(memory.static_memory(shape, method, optimizer))
    tape.kept = int(shape.tied and isinstance(method, Full))
    sizes = [size for _, size in trained_tensors(shape, method)]
    tape.new(sum(sizes))
    step = Step(tape, shape, method, batch, length, checkpointing)
    step.forward_and_backward()
    tape.settle()
    step.update(optimizer)
    return max(tape.curve)


class AccumulatingTape(Tape):
    """A tape on which a gradient lives until the next one."""

    late, kept = None, 0  # a tied head's waits for the embedding's, and is dropped by the step itself

    def new(self, size, kind="transient", needs=False):
        if kind != "gradients":
            return super().new(size, kind, needs)
        if not size:  # the bias that a layer lacks
            return super().new(0)
        made = super().new(size)
        self.settle()
        self.late = None if self.kept else made
        self.kept = 0
        return made

    def settle(self):
        if self.late:
            self.drop(self.late)
        self.late = None


BIG = {"batch": 4, "length": 1024, "card": 8, "checkpointing": False}


def test_embedding_norms_and_head_are_in_32_bits_unless_told(script):
    bytes_by_width = {}
    for changes in ({}, {"outside": 2}):
        setting = setting_of(script, **changes)
        found = on_the_page(script, f"measure({json.dumps(setting)}, WILL_IT_FIT_DATA.shapes['LLaMA-7B'])")
        assert found["ledger"]["total"] == total_of(setting)
        bytes_by_width[setting["outside"]] = found["ledger"]["weights"]
    method = on_the_page(
        script, f"methodOf({json.dumps(setting_of(script))}, WILL_IT_FIT_DATA.shapes['Phi-4'])"
    )
    assert (method["kind"], method["width"], method["compute"]) == ("qlora", 4, 2)
    outside = 2 * 32000 * 4096 + 65 * 4096
    assert bytes_by_width[4] - bytes_by_width[2] == 2 * outside


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
@pytest.mark.parametrize("model", ["LLaMA-7B", "Phi-4", "Qwen3-8B"])
def test_the_ladder_changes_one_thing_more_on_every_rung(script, model, method):
    setting = setting_of(script, model=model, method=method, **BIG)
    rungs = on_the_page(
        script, f"ladder({json.dumps(setting)}, WILL_IT_FIT_DATA.shapes[{json.dumps(model)}])"
    )
    steps = [{"batch": 1}, {"checkpointing": True}, {"optimizer": "AdamW, 8-bit states"}, {"length": 512}]
    steps += [] if method == "full" else [{"targets": "qv"}, {"rank": 8}]
    assert len(rungs) == len(steps) + 1
    for rung, change in zip(rungs, steps, strict=False):
        setting |= change
        assert rung["total"] == total_of(setting, accumulates=True), rung["words"]
    smaller = rungs[-1]["words"].removeprefix("a smaller model, ")
    assert SHAPES[smaller].parameters < SHAPES[model].parameters
    assert rungs[-1]["total"] == total_of(setting | {"model": smaller}, accumulates=True)
    card = setting["card"] * 2**30
    assert [rung["fits"] for rung in rungs] == [rung["total"] <= card for rung in rungs]
    firsts = [rung["fits"] for rung in rungs].index(True) if any(r["fits"] for r in rungs) else None
    assert [i for i, rung in enumerate(rungs) if rung["first"]] == ([] if firsts is None else [firsts])


def test_the_ladder_leaves_out_what_is_so_already(script):
    changes = {"batch": 1, "checkpointing": True, "optimizer": "SGD", "targets": "qv", "rank": 1, "card": 8}
    setting = setting_of(script, model="Llama-3.3-70B", **changes)
    rungs = on_the_page(script, f"ladder({json.dumps(setting)}, WILL_IT_FIT_DATA.shapes['Llama-3.3-70B'])")
    assert [rung["words"][:8] for rung in rungs] == ["half the", "a smalle"]
    assert rungs[-1]["words"].startswith("a smaller model, Llama-")  # of the same name
    assert rungs[-1]["fits"]


def test_an_address_brings_a_setting_back(script):
    changes = {
        "model": "Qwen2.5-7B",
        "method": "lora",
        "card": 80,
        "cards": 4,
        "optimizer": "AdamW, 8-bit states",
    }
    changes |= {"length": 4096, "batch": 32, "rank": 256, "targets": "qv", "adapters": 2, "outside": 2}
    setting = setting_of(script, **changes, checkpointing=False)
    address = on_the_page(script, f"writeAddress({json.dumps(setting)})")
    assert address.startswith(
        "#model=Qwen2.5-7B&method=lora&card=80&cards=4&optimizer=AdamW%2C%208-bit%20states&length=4096"
    )
    assert on_the_page(script, f"readAddress({json.dumps(address)}, WillItFit.page.start())") == setting
    own = on_the_page(script, f"writeAddress({json.dumps(setting | {'model': 'own'})})")
    assert "model" not in own


@pytest.mark.parametrize(
    "address",
    [
        "", "#", "#what-is-counted", "#model=GPT-2", "#model=own", "#model=constructor", "#model", "#=",
        "#&&", "#method=sgd", "#method=__proto__", "#card=17", "#cards=3",
        "#cards=0", "#card=24.0", "#card=-8", "#optimizer=%",
        "#optimizer=%E0%A4%A", "#length=500", "#length=65536", "#length=5e2", "#batch=0", "#batch=33",
        "#batch=1.5", "#batch=NaN", "#rank=512", "#rank=3", "#targets=all%00", "#adapters=8",
        "#outside=3", "#checkpointing=true", "#checkpointing=constructor", "#hidden=1", "#__proto__=1",
        "#model=<img src=x onerror=alert(1)>",
    ],
)  # fmt: skip
def test_what_makes_no_sense_in_an_address_is_ignored(script, address):
    found = on_the_page(script, f"readAddress({json.dumps(address)}, WillItFit.page.start())")
    assert found == setting_of(script)
    found = on_the_page(script, f"readAddress({json.dumps(address + '&rank=64')}, WillItFit.page.start())")
    assert found == setting_of(script, rank=64)


def test_no_text_becomes_markup():
    for name in SCRIPTS:
        text = (STATIC / name).read_text(encoding="utf-8")
        for way in UNSAFE:
            assert way not in text, (name, way)


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
        "cards",
        "adapters",
        "outside",
        "targets",
        "config",
        "file",
    ):
        assert f'id="fit-{name}"' in page, name
        assert f'for="fit-{name}"' in page, name


if __name__ == "__main__":
    (STATIC / "will_it_fit_data.js").write_text(constants(), encoding="utf-8")
