"""Families of models in the ledger: against simulated steps, at small shapes and at published ones."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lora2qlora.memory import (
    PHASES,
    SGD,
    SHAPES,
    Full,
    LoRA,
    QLoRA,
    forecast,
    shape_of,
    simulate_step,
    training_memory,
)
from lora2qlora.memory.families import FAMILIES, FORMS
from transformers import CONFIG_MAPPING, AutoConfig

BF16, FP32 = torch.bfloat16, torch.float32
PUBLISHED = json.loads(Path(__file__).with_name("published_configs.json").read_text(encoding="utf-8"))
SMALL = {
    "hidden_size": 96,
    "num_hidden_layers": 6,  # Gemma's sixth is another than those before
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "intermediate_size": 200,
    "vocab_size": 500,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NEW = [family for family in FAMILIES if family not in ("llama", "mistral", "ministral", "cwm")]
SETTINGS = [
    (LoRA(4), 2, 40, False),
    (LoRA(4, dtype=FP32), 1, 60, True),
    (QLoRA(4, targets=("o_proj", "down_proj")), 2, 30, True),
    (Full(), 2, 40, True, SGD),
    (Full(FP32), 3, 17, False),
]


def small(family, **changes):
    return AutoConfig.for_model(family, **(SMALL | changes))


def differences(source, setting):
    """Bytes of the ledger above those of the simulation: at the start, in each phase, at the end."""
    found, predicted = simulate_step(source, *setting), forecast(shape_of(source), *setting)
    ids = 8 * setting[1] * setting[2]  # there before a simulated step, part of one in the ledger
    phases = [ledger.total - peak for ledger, peak in zip(predicted.peaks.values(), found.peaks, strict=True)]
    return predicted.curve[0] + ids - found.start_bytes, phases, predicted.end_bytes - found.end_bytes


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"{type(s[0]).__name__}-{s[3]}")
@pytest.mark.parametrize("family", NEW)
def test_the_ledger_is_the_simulation_to_the_byte(family, setting):
    config = small(family)
    start, phases, end = differences(config, setting)
    assert (start, end) == (0, 0)
    tied_twice = 2 * config.vocab_size * config.hidden_size * setting[0].dtype.itemsize
    for phase, apart in zip(PHASES, phases, strict=True):
        if isinstance(setting[0], Full) and config.tie_word_embeddings and phase == "backward":
            # Watched, autograd adds the two gradients of a tied weight into a third tensor.
            assert -tied_twice <= apart <= 0
        else:
            assert apart == 0, phase


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"attention_bias": True}),
        ("smollm3", {"no_rope_layer_interval": 2}),
        ("granite", {"tie_word_embeddings": True, "attention_bias": True}),
        ("gemma3_text", {"num_hidden_layers": 3}),
    ],
)
def test_so_are_variants_of_a_family(family, changes):
    for setting in ((Full(), 2, 30, False), (QLoRA(3), 2, 30, True)):
        start, phases, end = differences(small(family, **changes), setting)
        assert (start, phases[0], phases[2], end) == (0, 0, 0, 0)
        assert phases[1] == 0 or isinstance(setting[0], Full)


@pytest.mark.parametrize("family", ["olmo2", "gemma3_text", "granite"])  # others: up to 4 kB too much
def test_so_is_a_block_whose_branches_are_all_there_is(family):
    """With next to no MLP and vocabulary the most memory is taken within a block, where branches end."""
    narrow = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    narrow |= {"head_dim": 8, "intermediate_size": 16, "vocab_size": 16}
    start, phases, end = differences(small(family, **narrow), (Full(FP32), 1, 64, True))
    assert (start, *phases, end) == (0, 0, 0, 0, 0)


def test_every_form_is_some_familys():
    assert set(FAMILIES.values()) == set(FORMS)
    assert {shape.form for shape in SHAPES.values()} == set(FORMS)


# --- published sizes -------------------------------------------------------------------------------

# Parameters as the Hub counts them in each model's safetensors, a tied head once. (Of Gemma 3's models that
# also see, those of the text, plus 64 rows of the embedding that their configs have beyond it.)
PARAMETERS = {
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
    "SmolLM3-3B": 3_075_098_624,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.3-70B": 70_553_706_496,
    "LLaMA-7B": 6_738_415_616,
    "LLaMA-13B": 13_015_864_320,
    "LLaMA-33B": 32_528_943_616,
    "LLaMA-65B": 65_285_660_672,
    "Llama-2-70B": 68_976_648_192,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Gemma-3-1B": 999_885_952,
    "Gemma-3-4B": 3_880_099_328 + 64 * 2560,
    "Gemma-3-12B": 11_765_788_416 + 64 * 3840,
    "Phi-3-mini": 3_821_079_552,
    "Phi-4": 14_659_507_200,
    "OLMo-2-1B": 1_484_916_736,
    "OLMo-2-7B": 7_298_617_344,
    "OLMo-2-13B": 13_716_198_400,
    "Granite-3.3-2B": 2_533_539_840,
    "Granite-3.3-8B": 8_170_864_640,
}


def test_every_preset_has_the_published_number_of_parameters():
    assert set(SHAPES) - set(PARAMETERS) == {"175B"}  # no published model
    assert {name: SHAPES[name].parameters for name in PARAMETERS} == PARAMETERS


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_gives_the_preset_and_the_published_count(name, tmp_path):
    published = {key: value for key, value in PUBLISHED[name].items() if key != "parameters"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(published), encoding="utf-8")
    shape = shape_of(published)
    assert shape == shape_of(path) == shape_of(str(tmp_path))
    assert shape == shape_of(CONFIG_MAPPING[published["model_type"]].from_dict(published))
    assert shape.parameters == SHAPES[name].parameters == PUBLISHED[name]["parameters"]
    assert replace(shape, head_size=shape.head_dim) == replace(
        SHAPES[name], kv_heads=SHAPES[name].kv_heads or shape.kv_heads, head_size=shape.head_dim
    )


FULL_SHAPE = [
    (LoRA(16), 1, 512, False),
    (QLoRA(64), 4, 384, True),
    (QLoRA(8, targets=("o_proj", "down_proj"), dtype=BF16), 2, 1000, False),
    (Full(), 1, 900, True),
]


def worst(name, settings, **changes):
    """The largest error of the ledger's peaks, of those against simulated steps, in percent."""
    published = {key: value for key, value in PUBLISHED[name].items() if key != "parameters"}
    text = published.get("text_config", published) | changes
    config, errors = CONFIG_MAPPING[text["model_type"]].from_dict(text), []
    for setting in settings:
        predicted = training_memory(shape_of(config), *setting).total
        found = simulate_step(config, *setting).peak_bytes
        errors.append(100 * (predicted / found - 1))
        method = f"{type(setting[0]).__name__} {setting[1]}x{setting[2]} {'ckpt' * setting[3]}"
        print(f"{name:17} {method:22} {predicted:>15,} {found:>15,} {errors[-1]:8.4f} %", flush=True)
    return max(map(abs, errors))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_at_published_sizes_the_ledger_is_within_a_percent(name):
    assert worst(name, FULL_SHAPE) < 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_two_of_its_layers_are_too(name):
    assert worst(name, FULL_SHAPE[1:2], num_hidden_layers=2) < 1


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"tie_word_embeddings": "yes"},
        {"hidden_size": None},
        {"num_attention_heads": 7},
        {"model_type": ["llama"]},
        {"model_type": None},
    ],
)
def test_a_damaged_config_is_a_value_error_that_says_so(wrong):
    with pytest.raises(ValueError, match=r"no config of a llama model \(|no model type that transformers"):
        shape_of(SMALL | {"model_type": "llama"} | wrong)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("phi3", {"partial_rotary_factor": 0.75}, "partial_rotary_factor': 0.75.* simulate_step does"),
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop': 0.1"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout': 0.1"),
        ("llama", {"hidden_act": "relu"}, "hidden_act': 'relu'"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping': 30.0"),
        ("smollm3", {"no_rope_layers": [1, 0, 0, 1, 1, 1]}, r"come evenly, got \[1, 0, 0, 1, 1, 1\]"),
        ("mixtral", {}, "is of type 'mixtral', the ledger knows .* simulate_step takes any"),
        ("cohere", {}, "is of type 'cohere'"),
    ],
)
def test_what_no_shape_describes_is_refused_by_name(family, changes, words):
    with pytest.raises(ValueError, match=words):
        shape_of(small(family, **changes))


def test_a_window_is_refused_from_its_length_on():
    shape = SHAPES["Gemma-3-4B"]
    assert training_memory(shape, QLoRA(), length=1023).total > 0
    with pytest.raises(
        ValueError, match=r"window of 1024 tokens .* got length 1024: simulate_step counts it"
    ):
        training_memory(shape, QLoRA(), length=1024)


def test_files_that_are_no_config_are_named(tmp_path):
    for text, words in (
        ("{", "is not the config.json"),
        ("[1]", "holds a list"),
        ("{}", "model_type is None"),
    ):
        path = tmp_path / "config.json"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=words):
            shape_of(path)
    with pytest.raises(FileNotFoundError):
        shape_of(tmp_path / "none.json")


def test_fused_layers_are_targets_by_their_names():
    phi, llama = SHAPES["Phi-3-mini"], SHAPES["LLaMA-7B"]
    assert (
        training_memory(phi, LoRA()).adapters
        == training_memory(phi, LoRA(targets=tuple(phi.linears))).adapters
    )
    assert training_memory(phi, LoRA(targets=("qkv_proj",))).adapters == 4 * 32 * 16 * (3072 + 9216)
    for shape, targets in ((phi, ("q_proj",)), (llama, ("qkv_proj",))):
        with pytest.raises(ValueError, match=rf"no \['{targets[0]}'\]; targets are some of"):
            training_memory(shape, LoRA(targets=targets))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"form": "bert"}, "form must be one of .* got 'bert'"),
        ({"biases": ("qkv_proj",)}, "biases are of some of"),
        ({"window": 0}, "window must be .* got 0"),
        ({"unturned": 0}, "unturned must be .* got 0"),
    ],
)
def test_shapes_that_are_none_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(SHAPES["LLaMA-7B"], **changes)
