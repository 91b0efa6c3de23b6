"""adapters: a whole model against PEFT, files both ways, counts, merging, and what is refused by name."""

import copy
import json
import logging
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2qlora import adapters
from lora2qlora.adapters import (
    ParameterCount,
    add_lora,
    count_parameters,
    find_targets,
    load_adapter,
    lora_layers,
    merge_lora,
    remove_lora,
    save_adapter,
)
from lora2qlora.lora import LoRALinear
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
SUFFIXES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.arange(20).reshape(2, 10)


def tiny_llama(layers=2, hidden=32, tied=True, dtype=torch.float32):
    """The same small model, to the last bit, each time that it is called."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def randomize(model, seed=0):
    """Give each A and B, ours or PEFT's, values that are not zero."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def adapted(targets="all-linear", rank=4, alpha=8, **options):
    model = tiny_llama()
    add_lora(model, targets, rank, alpha, **options)
    return randomize(model)


def peft_saved(directory, base=None, **config):
    """A PEFT model with values of its own, saved in the directory."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | config
    model = randomize(get_peft_model(base or tiny_llama(), LoraConfig(**options)), seed=1)
    model.save_pretrained(directory)
    return model


def snapshot(model):
    """What must not change when something fails: modules, values, and what trains."""
    return (
        [(name, type(module)) for name, module in model.named_modules()],
        {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()},
    )


def assert_unchanged(model, before):
    (modules, parameters), (now_modules, now) = before, snapshot(model)
    assert modules == now_modules
    assert parameters.keys() == now.keys()
    for name, (value, trains) in parameters.items():
        assert torch.equal(now[name][0], value)
        assert now[name][1] == trains


# The model


@pytest.mark.parametrize("tied", [True, False])
def test_all_linear_is_pefts_all_linear_and_spares_the_head(tied):
    model = tiny_llama(tied=tied)
    names = add_lora(model, "all-linear", 4, 8)
    peft = get_peft_model(tiny_llama(tied=tied), LoraConfig(r=4, target_modules="all-linear"))
    assert set(names) == set(peft.targeted_module_names)
    assert len(names) == 2 * 7
    assert isinstance(model.lm_head, nn.Linear)
    assert list(lora_layers(model)) == names


def test_a_head_is_found_without_a_transformers_model():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)
            self.head.weight = self.embed.weight

    assert add_lora(Tied(), "all-linear", 2, 4) == ["body"]
    inside = nn.ModuleDict({"wrapped": tiny_llama(layers=1, tied=False)})
    assert "wrapped.lm_head" not in add_lora(inside, "all-linear", 2, 4)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (["1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),
        (["model.layers.0.self_attn.v_proj"], ["model.layers.0.self_attn.v_proj"]),
        (
            ("0.mlp.up_proj", "0.mlp.down_proj"),
            ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"],
        ),
    ],
)
def test_targets_are_suffixes_at_a_dot(targets, expected):
    assert find_targets(tiny_llama(), targets) == expected
    assert add_lora(tiny_llama(), targets, 2, 4) == expected


def test_finding_targets_changes_nothing_and_leaves_out_what_is_adapted():
    model = tiny_llama()
    before = snapshot(model)
    everything = find_targets(model, "all-linear")
    assert everything == find_targets(model, SUFFIXES)
    with pytest.raises(ValueError, match=r"named \['query'\]; the candidates are \['down_proj', "):
        find_targets(model, ["q_proj", "query"])
    with pytest.raises(ValueError, match=r'pass \["q_proj"\] for one'):
        find_targets(model, "q_proj")
    assert_unchanged(model, before)
    adapted_now = add_lora(model, ["q_proj"], 2, 4)
    assert find_targets(model, "all-linear") == [n for n in everything if n not in adapted_now]


def test_it_freezes_all_but_the_adapters_and_keeps_the_mode():
    for training in (True, False):
        model = tiny_llama().train(training)
        add_lora(model, ["q_proj"], 2, 4, dropout=0.5)
        assert {module.training for module in model.modules()} == {training}
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {f"{name}.{ab}" for name in lora_layers(model) for ab in ("lora_A", "lora_B")}


def test_a_second_call_adds_and_leaves_the_first():
    model = tiny_llama()
    add_lora(model, ["q_proj"], 2, 4)
    model.model.layers[0].self_attn.q_proj.lora_A.requires_grad_(False)
    add_lora(model, "all-linear", 3, 6, dtype=torch.bfloat16)
    layers = lora_layers(model)
    assert len(layers) == 14
    assert {layer.rank for name, layer in layers.items() if "q_proj" in name} == {2}
    assert {layer.lora_B.dtype for name, layer in layers.items() if "q_proj" not in name} == {torch.bfloat16}
    frozen = [name for name, layer in layers.items() if not layer.lora_A.requires_grad]
    assert frozen == ["model.layers.0.self_attn.q_proj"]
    assert all(layer.lora_B.requires_grad for layer in layers.values())


def test_a_fresh_adapter_changes_no_logit_and_remove_lora_undoes_it():
    model = tiny_llama()
    names = add_lora(model, "all-linear", 4, 8)
    assert torch.equal(logits(model), logits(tiny_llama()))
    assert not torch.equal(logits(randomize(model)), logits(tiny_llama()))
    assert remove_lora(model) == names
    assert model.state_dict().keys() == tiny_llama().state_dict().keys()
    assert torch.equal(logits(model), logits(tiny_llama()))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 16), st.sets(st.sampled_from(SUFFIXES), min_size=1))
def test_the_count_is_rank_times_in_plus_out_and_pefts(rank, suffixes):
    model = tiny_llama()
    before = count_parameters(model)
    assert before.total == before.trainable == sum(p.numel() for p in tiny_llama().parameters())
    names = add_lora(model, sorted(suffixes), rank, 1)
    layers = [model.get_submodule(name) for name in names]
    expected = sum(rank * (layer.in_features + layer.out_features) for layer in layers)
    assert count_parameters(model) == ParameterCount(before.total + expected, expected)
    peft = get_peft_model(tiny_llama(), LoraConfig(r=rank, target_modules=sorted(suffixes)))
    trainable, total = peft.get_nb_trainable_parameters()
    assert count_parameters(model) == ParameterCount(total, trainable)


def test_counts_by_shape_alone():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # the shapes of LLaMA-7B
    names = add_lora(model, ["q_proj", "v_proj"], 8, 16)
    assert len(names) == 2 * 32
    assert count_parameters(model) == ParameterCount(6_738_415_616 + 64 * 8 * 8192, 64 * 8 * 8192)


def test_counts_are_logical_for_packed_weights():
    import bitsandbytes as bnb

    class Packed(nn.Module):
        in_features, out_features = 10, 6

        def __init__(self):
            super().__init__()
            self.weight, self.bias = None, nn.Parameter(torch.zeros(6), requires_grad=False)
            self.register_buffer("packed", torch.zeros(30, dtype=torch.uint8))

    assert count_parameters(Packed()) == ParameterCount(66, 0)
    four_bits = bnb.nn.Linear4bit(64, 8, quant_type="nf4").to("cpu")
    assert four_bits.weight.numel() == 64 * 8 // 2
    assert count_parameters(four_bits).total == 64 * 8 + 8
    layer = LoRALinear(Packed(), 2, 4)
    assert count_parameters(layer) == ParameterCount(66 + 2 * 16, 2 * 16)


def test_adapters_over_four_bits_equal_pefts(tmp_path):
    import bitsandbytes as bnb

    model = tiny_llama(layers=1, hidden=64)
    for name, module in list(model.named_modules()):
        if name.endswith("_proj"):
            four_bits = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.float32
            )
            four_bits.load_state_dict(module.state_dict())
            four_bits.support_avx512bf16_for_cpu = False  # the layout for inference, without a backward
            model.set_submodule(name, four_bits.to("cpu"))
    model.is_loaded_in_4bit = True
    base = copy.deepcopy(model)
    assert len(add_lora(model, "all-linear", 4, 8)) == 7
    save_adapter(randomize(model), tmp_path)
    torch.testing.assert_close(
        logits(model), logits(PeftModel.from_pretrained(base, tmp_path)), rtol=1e-5, atol=1e-5
    )
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(layer.lora_A.grad.any() and layer.lora_B.grad.any() for layer in lora_layers(model).values())
    with pytest.raises(TypeError, match=r"q_proj: merge needs .*got Linear4bit"):
        merge_lora(model)


@pytest.mark.parametrize(
    ("targets", "rank", "error", "message"),
    [
        (
            ["q_proj", "query"],
            4,
            ValueError,
            r"named \['query'\]; the candidates are \['down_proj', 'gate_proj'",
        ),
        (["norm"], 4, ValueError, r"named \['norm'\]; the candidates"),
        (["proj"], 4, ValueError, r"named \['proj'\]; the candidates"),
        (["lm_head"], 4, ValueError, r"named \['lm_head'\]; the candidates"),
        ([], 4, ValueError, r"named \[\]; the candidates"),
        ("q_proj", 4, ValueError, r'list of suffixes or "all-linear"; pass \["q_proj"\]'),
        ("all-linear", 0, ValueError, r"layers\.0\.self_attn\.q_proj: rank must be in 1\.\.32 .* got 0"),
        ("all-linear", 17, ValueError, r"layers\.0\.self_attn\.k_proj: rank must be in 1\.\.16 .* got 17"),
        ("all-linear", 2.0, TypeError, r"q_proj: rank must be an int, got 2\.0"),
    ],
)
def test_what_add_lora_refuses_leaves_the_model_alone(targets, rank, error, message):
    model = tiny_llama()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        add_lora(model, targets, rank, 8)
    assert_unchanged(model, before)


def test_more_that_add_lora_refuses():
    for options, message in (
        ({"alpha": 0}, "alpha must be"),
        ({"alpha": 1, "dropout": 1.5}, "dropout must be"),
    ):
        model = tiny_llama()
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            add_lora(model, "all-linear", 4, **options)
        assert_unchanged(model, before)
    net = nn.ModuleDict({"steps": nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), "out": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r"named \['0'\]; the candidates are \['out', 'steps\.1'\]"):
        add_lora(net, ["0"], 2, 4)
    with pytest.raises(ValueError, match="carries PEFT's own adapters"):
        add_lora(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])), "all-linear", 2, 4)


# Training and merging


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("alpha", [8, 7])
def test_training_losses_equal_pefts_step_by_step(tmp_path, dropout, alpha):
    ours = tiny_llama()
    add_lora(ours, "all-linear", 4, alpha, dropout=dropout)
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    curves = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        curves.append([])
        for _ in range(12):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curves[-1].append(loss.item())
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    if alpha == 8:  # α / r is a power of two, so that it does not matter where it is multiplied
        assert curves[0] == curves[1]
    assert curves[0][-1] < 0.97 * curves[0][0]  # they did learn
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(logits(merge_lora(ours)), logits(merged), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_copy_has_plain_layers_and_the_same_logits(tied, tmp_path):
    model = tiny_llama(tied=tied)
    add_lora(model, "all-linear", 4, 8)
    before = snapshot(randomize(model))
    merged = merge_lora(model)
    assert_unchanged(model, before)
    assert [(n, type(m)) for n, m in merged.named_modules()] == [
        (n, type(m)) for n, m in tiny_llama(tied=tied).named_modules()
    ]
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)
    ours = {p.data_ptr() for p in model.parameters()}
    assert not ours & {p.data_ptr() for p in merged.parameters()}
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    assert count_parameters(merged) == ParameterCount(count_parameters(tiny_llama(tied=tied)).total, 0)
    merged.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(merged))
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge_lora(merged)


# Files, both ways


def both_ways(model, directory, base=tiny_llama):
    """Save ours; PEFT and we load it; all three give the same logits. Returns the config."""
    save_adapter(model, directory)
    expected = logits(model)
    assert not torch.allclose(expected, logits(base()))
    theirs, ours = PeftModel.from_pretrained(base(), directory), base()
    assert load_adapter(ours, directory) == list(lora_layers(model))
    # A scaling of up to 32 over random adapters enlarges each layer's rounding: 3e-5 of the largest logit
    # was seen over 60 draws, against a change by the adapters of its own size.
    assert (logits(theirs) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert torch.equal(logits(ours), expected)
    return json.loads((directory / "adapter_config.json").read_text())


@settings(max_examples=8, deadline=None)
@given(st.sets(st.sampled_from(SUFFIXES), min_size=1), st.integers(1, 16), st.floats(0.5, 32), st.booleans())
def test_peft_and_we_load_what_we_save(tmp_path_factory, suffixes, rank, alpha, tied):
    directory = tmp_path_factory.mktemp("adapter")

    def base():
        return tiny_llama(tied=tied)

    model = base()
    add_lora(model, sorted(suffixes), rank, alpha)
    config = both_ways(randomize(model), directory, base)
    assert config["target_modules"] == sorted(suffixes)
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (rank, alpha, "CAUSAL_LM")


def test_the_files_and_their_keys(tmp_path):
    model = adapted(["q_proj"])
    (tmp_path / "README.md").write_text("mine")
    save_adapter(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", adapters.CONFIG, adapters.WEIGHTS}
    peft_saved(tmp_path / "peft", target_modules=["q_proj"])
    ours, theirs = load_file(tmp_path / adapters.WEIGHTS), load_file(tmp_path / "peft" / adapters.WEIGHTS)
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {
        k: (v.shape, v.dtype) for k, v in theirs.items()
    }
    first = (tmp_path / adapters.WEIGHTS).read_bytes()
    save_adapter(model, tmp_path)
    assert (tmp_path / adapters.WEIGHTS).read_bytes() == first


def test_the_config_names_a_base_on_the_hub_but_no_path_here(tmp_path):
    model = adapted(["q_proj"])
    for name, written in (("owner/model", "owner/model"), (str(tmp_path), None), ("", None)):
        model.name_or_path = name
        save_adapter(model, tmp_path)
        assert json.loads((tmp_path / adapters.CONFIG).read_text())["base_model_name_or_path"] == written


def test_ranks_and_alphas_that_differ_by_module(tmp_path):
    model = tiny_llama()
    add_lora(model, ["q_proj", "v_proj"], 4, 8)
    add_lora(model, ["0.mlp.up_proj"], 2, 8)
    add_lora(model, ["1.mlp.up_proj"], 4, 3.5)
    config = both_ways(randomize(model), tmp_path)
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["rank_pattern"] == {r"^model\.layers\.0\.mlp\.up_proj": 2}
    assert config["alpha_pattern"] == {r"^model\.layers\.1\.mlp\.up_proj": 3.5}


def test_targets_that_no_suffix_tells_apart(tmp_path):
    both = both_ways(adapted(["0.self_attn.q_proj", "1.mlp.up_proj"]), tmp_path / "names")
    assert both["target_modules"] == ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc, self.inner = nn.Linear(4, 4), nn.ModuleDict({"fc": nn.Linear(4, 4)})

        def forward(self, x):
            return self.inner["fc"](torch.relu(self.fc(x)))

    model = Nested()
    add_lora(model, ["fc"], 2, 4)
    model.inner["fc"] = model.inner["fc"].base
    save_adapter(randomize(model), tmp_path / "root")
    assert json.loads((tmp_path / "root" / adapters.CONFIG).read_text())["target_modules"] == "fc"
    x, again = torch.randn(3, 4), Nested()
    load_adapter(again, tmp_path / "root")
    assert torch.equal(again(x), model(x))
    torch.testing.assert_close(PeftModel.from_pretrained(Nested(), tmp_path / "root")(x), model(x))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": "all-linear", "r": 3, "lora_alpha": 5},
        {"target_modules": r".*layers\.1\..*(q_proj|up_proj)|model.layers.0.self_attn.v"},
        {"target_modules": SUFFIXES, "exclude_modules": ["o_proj", "model.layers.0.mlp.up_proj"]},
        {"target_modules": SUFFIXES, "exclude_modules": r".*\.1\..*"},
        {"use_rslora": True, "r": 8},
        {"rank_pattern": {"q_proj": 2, r"layers.0.*v_proj": 6}, "alpha_pattern": {"v_proj": 32}},
        {"rank_pattern": {"^model.layers.1.self_attn.q_proj": 1, "q_proj": 7}},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"0.self_attn.q_proj": 5}, "use_rslora": True},
        {"lora_dropout": 0.1, "init_lora_weights": "gaussian", "task_type": "CAUSAL_LM"},
    ],
    ids=str,
)
def test_we_load_what_peft_saves(tmp_path, config):
    theirs = peft_saved(tmp_path, **config)
    model = tiny_llama()
    names = load_adapter(model, tmp_path)
    assert set(names) == set(theirs.targeted_module_names)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(model), logits(tiny_llama()))
    assert {layer.dropout.p for layer in lora_layers(model).values()} == {config.get("lora_dropout", 0.0)}
    for name, layer in lora_layers(model).items():
        twin = theirs.get_submodule(f"base_model.model.{name}")
        assert layer.rank == twin.r["default"]
        assert layer.scaling == pytest.approx(twin.scaling["default"])
        assert layer.lora_A.requires_grad
    save_adapter(model, tmp_path / "again")  # and PEFT reads what went through us
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "again")
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-5, atol=1e-5)


def test_all_linear_may_stand_in_a_config(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path)
    edit_config(tmp_path, target_modules="all-linear")
    again = tiny_llama()
    assert len(load_adapter(again, tmp_path)) == 14
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_precisions_of_base_and_adapter(tmp_path, dtype):
    model = tiny_llama(dtype=dtype)
    add_lora(model, "all-linear", 4, 8, dtype=dtype)
    save_adapter(randomize(model), tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / adapters.WEIGHTS).values()} == {dtype}
    again = tiny_llama(dtype=dtype)
    load_adapter(again, tmp_path)
    assert {layer.lora_A.dtype for layer in lora_layers(again).values()} == {torch.float32}
    theirs = PeftModel.from_pretrained(tiny_llama(dtype=dtype), tmp_path)
    assert logits(again).dtype == logits(theirs).dtype == dtype
    tolerance = 1e-5 if dtype != torch.bfloat16 else 2e-2
    torch.testing.assert_close(logits(again), logits(theirs), rtol=tolerance, atol=tolerance)
    told = tiny_llama(dtype=dtype)
    load_adapter(told, tmp_path, dtype=dtype)
    assert torch.equal(logits(told), logits(model))


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path):
    model = adapted(["q_proj"])
    both_ways(model, tmp_path)
    expected = load_file(tmp_path / adapters.WEIGHTS)
    save_adapter(torch.compile(model, backend="eager"), tmp_path)
    assert load_file(tmp_path / adapters.WEIGHTS).keys() == expected.keys()


# What is refused


def edit_config(directory, **changes):
    path = directory / adapters.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "option",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"modules_to_save": ["norm"]},
        {"fan_in_fan_out": True},
        {"target_parameters": ["experts.gate_up_proj"]},
        {"target_parameters": ["experts.gate_up_proj"], "target_modules": None},
        {"layers_to_transform": [0]},
        {"layer_replication": [[0, 1]]},
        {"trainable_token_indices": [3]},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"use_qalora": True},
        {"an_option_of_tomorrow": {"x": 1}},
    ],
    ids=str,
)
def test_options_that_change_what_lora_computes_are_named(tmp_path, option):
    save_adapter(adapted(), tmp_path)
    edit_config(tmp_path, **option)
    model = tiny_llama()
    before = snapshot(model)
    name, value = next(iter(option.items()))
    with pytest.raises(
        ValueError, match=re.escape(f"not a plain LoRA, it has {name}={value!r}: load it with PEFT")
    ):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_every_option_that_peft_writes_is_known_or_off(tmp_path):
    peft_saved(tmp_path, use_dora=True)
    with pytest.raises(ValueError, match=r"it has use_dora=True: load it with PEFT"):
        load_adapter(tiny_llama(), tmp_path)


def damage(directory, kind):
    weights, config = directory / adapters.WEIGHTS, directory / adapters.CONFIG
    tensors = load_file(weights)
    first, second, *_ = sorted(tensors)
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif kind == "cut in its header":
        weights.write_bytes(weights.read_bytes()[:40])
    elif kind == "empty":
        weights.write_bytes(b"")
    elif kind == "foreign":
        weights.write_bytes(b"PK\x03\x04" + bytes(200))
    elif kind == "pickle":
        weights.rename(directory / "adapter_model.bin")
    elif kind == "no weights":
        weights.unlink()
    elif kind == "no config":
        config.unlink()
    elif kind == "no json":
        config.write_text(config.read_text()[:-20])
    elif kind == "no lora":
        edit_config(directory, peft_type="IA3")
    elif kind == "no rank":
        edit_config(directory, r=None)
    elif kind == "rank too high":
        edit_config(directory, r=17)
        tensors = {
            k: torch.zeros(17, v.shape[1]) if "lora_A" in k else torch.zeros(v.shape[0], 17)
            for k, v in tensors.items()
        }
        save_file(tensors, weights)
    else:
        if kind == "missing key":
            del tensors[first]
        elif kind == "extra key":
            tensors["base_model.model.extra.lora_A.weight"] = torch.zeros(4, 4)
        elif kind == "other shape":
            tensors[first] = tensors[first].T.contiguous()
        elif kind == "integers":
            tensors[second] = tensors[second].to(torch.int8)
        save_file(tensors, weights)


FIRST = r"layers\.0\.mlp\.down_proj\.lora_A\.weight"


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("truncated", ValueError, "truncated or not a safetensors file"),
        ("cut in its header", ValueError, "truncated or not a safetensors file"),
        ("empty", ValueError, "truncated or not a safetensors file"),
        ("foreign", ValueError, "truncated or not a safetensors file"),
        ("pickle", ValueError, r"adapter_model\.bin, a pickle, which can run code.*load it with PEFT"),
        ("no weights", FileNotFoundError, r"no adapter_model\.safetensors in"),
        ("no config", FileNotFoundError, r"no adapter_config\.json in"),
        ("no json", ValueError, r"adapter_config\.json is damaged, it is not JSON"),
        ("no lora", ValueError, 'needs "peft_type": "LORA"'),
        ("no rank", ValueError, r"lacks \['r'\]"),
        ("rank too high", ValueError, r"k_proj: rank must be in 1\.\.16 .* got 17"),
        ("missing key", KeyError, rf"1 missing: \S*{FIRST}'?$"),
        ("extra key", KeyError, r"1 extra: base_model\.model\.extra\.lora_A\.weight'?$"),
        (
            "other shape",
            KeyError,
            rf"1 mis-shaped: \S*{FIRST} torch\.float32 \[48, 4\], here float \[4, 48\]",
        ),
        (
            "integers",
            KeyError,
            r"1 mis-shaped: \S*lora_B\.weight torch\.int8 \[32, 4\], here float \[32, 4\]",
        ),
    ],
)
def test_a_damaged_adapter_is_refused_and_the_model_unchanged(tmp_path, kind, error, message):
    save_adapter(adapted(), tmp_path)
    damage(tmp_path, kind)
    model = tiny_llama()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: tiny_llama(layers=1), KeyError, r"may be for another.* 14 extra: \S*layers\.1\."),
        (lambda: tiny_llama(layers=3), KeyError, r"may be for another.* 14 missing: \S*layers\.2\."),
        (
            lambda: tiny_llama(hidden=64),
            KeyError,
            r"may be for another.*mis-shaped.*\[4, 32\], here float \[4, 64\]",
        ),
        (
            lambda: nn.Sequential(nn.Linear(4, 4)),
            ValueError,
            r"named \['down_proj', .*candidates are \['0'\]",
        ),
    ],
    ids=["shallower", "deeper", "wider", "of another kind"],
)
def test_an_adapter_for_another_model(tmp_path, make, error, message):
    save_adapter(adapted(), tmp_path)
    model = make()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_the_head_or_the_embedding(tmp_path, target):
    save_adapter(adapted(), tmp_path)
    edit_config(tmp_path, target_modules=["q_proj", target])
    with pytest.raises(
        ValueError, match=rf"for \['(model\.)?{target}'\], which no linear layer below the LM head"
    ):
        load_adapter(tiny_llama(tied=False), tmp_path)


def test_load_and_save_on_the_wrong_model(tmp_path):
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapter(tiny_llama(), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    model = adapted()
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="carries adapters already: remove_lora"):
        load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="carries PEFT's own adapters"):
        load_adapter(peft_saved(tmp_path / "peft"), tmp_path)
    model.model.layers[0].self_attn.q_proj.dropout.p = 0.5
    with pytest.raises(ValueError, match=r"one dropout for all adapters, these have \[0\.0, 0\.5\]"):
        save_adapter(model, tmp_path)


# Never half-written


def test_a_save_that_fails_leaves_the_old_adapter(tmp_path, monkeypatch):
    old, new = adapted(["q_proj"]), adapted(["v_proj"], rank=2)
    save_adapter(old, tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for method in ("write_bytes", "write_text"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, full)
            with pytest.raises(OSError, match="No space left"):
                save_adapter(new, tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("renames", [0, 1])
def test_a_save_cut_between_its_renames_is_no_adapter_rather_than_a_mix(tmp_path, monkeypatch, renames):
    save_adapter(adapted(["q_proj"]), tmp_path)
    new = adapted(["q_proj"], alpha=64)
    done = []

    def cut(source, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        rename(source, target)

    rename = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            save_adapter(new, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        load_adapter(tiny_llama(), tmp_path)
    save_adapter(new, tmp_path)
    again = tiny_llama()
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(new))
    assert {path.name for path in tmp_path.iterdir()} == {adapters.CONFIG, adapters.WEIGHTS}
