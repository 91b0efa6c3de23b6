"""experiments/variants.py: methods start as they should, on equal terms, and the sweep resumes."""

import math

import pytest
import torch
from lora2qlora.adapters import count_parameters, lora_layers
from lora2qlora.lab import measured
from lora2qlora.lab.models import SMALL_LM, load_small_lm
from lora2qlora.qlora import NF4Linear
from test_experiments import script
from torch import nn
from toy import toy_model

IDS = torch.arange(3, 19)[None]


@pytest.fixture
def variants(tmp_path, monkeypatch):
    return script("variants", tmp_path, monkeypatch)


def prepared(variants, method, base):
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    return variants.prepare(toy_model(), method, base, [batch], 0)


@pytest.mark.parametrize("base", ["nf4", "16 bits"])
@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "lora+", "rslora", "loftq", "eva"])
def test_every_method_starts_near_the_original_and_trains_as_many_numbers(variants, method, base):
    original, model = toy_model(), prepared(variants, method, base)
    layers = lora_layers(model)
    in_nf4 = base == "nf4" or method == "loftq"
    assert len(layers) == 7
    assert {isinstance(layer.base, NF4Linear) for layer in layers.values()} == {in_nf4}
    off = (model(IDS).logits - original(IDS).logits).abs().max()
    assert off < (0.15 if in_nf4 else 1e-4)
    rows = sum(layer.out_features for layer in layers.values()) if method == "dora" else 0
    plain = sum(8 * (layer.in_features + layer.out_features) for layer in layers.values())
    assert count_parameters(model).trainable == plain + rows


def test_a_better_start_over_nf4_is_nearer_to_the_original(variants):
    wanted = toy_model()(IDS).logits
    off = {m: (prepared(variants, m, "nf4")(IDS).logits - wanted).norm() for m in ("lora", "pissa", "loftq")}
    assert off["loftq"] < off["lora"]
    assert off["pissa"] < off["lora"]


def test_ranks_scales_and_seeds_are_those_asked_for(variants):
    layer = next(iter(lora_layers(prepared(variants, "rslora, rank 16", "nf4")).values()))
    assert (layer.rank, math.isclose(layer.scaling, 16 / 4)) == (16, True)
    one, other = (next(iter(lora_layers(prepared(variants, "lora", b)).values())) for b in ("nf4", "16 bits"))
    assert torch.equal(one.lora_A, other.lora_A)  # a method meets both bases from one start


@pytest.fixture
def runs(variants, monkeypatch):
    """The runs asked for, scored by a parabola; one is cut short."""
    made = []

    def stub(original, tokenizer, task, asked, seed):
        run = (asked["method"], asked["task"], asked["log10_learning_rate"], seed)
        if seed == 1 and "cut" not in made:
            made.append("cut")
            raise KeyboardInterrupt
        made.append(run)
        return {"validation_loss": (run[2] + 3.0) ** 2 + 0.01 * seed}

    monkeypatch.setattr(variants, "run", stub)
    monkeypatch.setattr(variants, "load_base_model", lambda name: (None, None))
    return made


ASKED = ["--methods", "lora", "--bases", "nf4", "--tasks", "wordnet", "cmudict"]


def test_the_best_rate_and_its_neighbours_have_every_seed_and_a_cut_run_goes_on(variants, runs):
    with pytest.raises(KeyboardInterrupt):
        variants.main(ASKED)
    variants.main(ASKED)
    done = [run for run in runs if run != "cut"]
    assert len(done) == len(set(done)) == len(measured.load("variants"))
    for task in ("wordnet", "cmudict"):
        with_seeds = {(e, seed) for _, name, e, seed in done if name == task and seed}
        assert with_seeds == {(e, seed) for e in (-3.5, -3.0, -2.5) for seed in (1, 2)}
    asked = variants.SETTINGS | variants.ROWS | {"base": "nf4", "method": "lora", "task": "wordnet"}
    assert variants.best_exponent(asked, 3) == -3.0
    with pytest.raises(KeyError, match=r"run variants\.py first: dora"):
        variants.best_exponent(asked | {"method": "dora"}, 3)
    variants.main(ASKED)
    assert len(measured.load("variants")) == len(done)


def test_what_cannot_be_corrected_is_not_run(variants, runs):
    runs.append("cut")
    variants.main(["--methods", "loftq", "--tasks", "wordnet", "--seeds", "1"])
    assert {r.configuration["base"] for r in measured.load("variants")} == {"nf4"}


# PEFT's methods -----------------------------------------------------------------------------------


@pytest.fixture
def peft_methods(tmp_path, monkeypatch):
    return script("peft_methods", tmp_path, monkeypatch)


SMALL = {"model": str(SMALL_LM), "batch": 2, "length": 16, "steps": 3}


@pytest.mark.filterwarnings("ignore")
def test_facts_of_a_method_that_runs_are_those_of_its_layers(peft_methods):
    facts = {name: peft_methods.run(name, SMALL) for name in ("LoRA", "DoRA", "layer norms")}
    linears = {n: m for n, m in load_small_lm()[0].named_modules() if isinstance(m, nn.Linear)}
    layers = [(m.in_features, m.out_features) for name, m in linears.items() if name != "lm_head"]
    assert facts["LoRA"]["trainable"] == sum(8 * (a + b) for a, b in layers)
    assert facts["DoRA"]["trainable"] == sum(8 * (a + b) + b for a, b in layers)
    assert facts["layer norms"]["trainable"] == 6 * 2 * 192
    for figures in facts.values():
        assert (figures["moved_at_start"], figures["moved"]) == (0, 1)
        assert 0 < figures["file_bytes"] - 4 * figures["trainable"] < 80_000  # names and shapes
        assert "failed" not in figures
    assert facts["DoRA"]["peak_bytes"] > facts["LoRA"]["peak_bytes"] > facts["layer norms"]["peak_bytes"]


@pytest.mark.filterwarnings("ignore")
def test_facts_of_a_method_that_fails_are_its_words_and_where(peft_methods):
    facts = peft_methods.run("PiSSA", SMALL)
    assert facts["stage"] == "adding"
    assert facts["failed"].startswith("TypeError: Please initialize PiSSA under float32")
    assert "trainable" not in facts


def test_the_best_mean_gets_neighbours_where_seeds_disagree_with_the_first(variants, monkeypatch):
    made = []

    def stub(original, tokenizer, task, asked, seed):
        made.append((asked["log10_learning_rate"], seed))
        return {"validation_loss": (made[-1][0] + 3.0 + 0.6 * seed) ** 2}

    monkeypatch.setattr(variants, "run", stub)
    monkeypatch.setattr(variants, "load_base_model", lambda name: (None, None))
    variants.main(["--methods", "lora", "--bases", "nf4", "--tasks", "wordnet"])
    whole = {e for e, _ in made if {(e, seed) for seed in range(3)} <= set(made)}
    assert {-4.0, -3.5, -3.0} <= whole  # the mean is lowest at -3.5, seed 0 at -3.0
    assert len(made) == len(set(made))
