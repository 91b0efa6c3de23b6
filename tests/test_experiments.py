"""companion/experiments: a long run resumes where it was cut, and records what it was asked to do."""

import ast
import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora2qlora.lab import measured

EXPERIMENTS = Path(__file__).parents[1] / "companion" / "experiments"


def script(name, tmp_path, monkeypatch):
    """An experiment's script as a module, with its records in tmp_path."""
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
