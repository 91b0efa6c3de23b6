"""experiments/gpu.py, dry-run on a CPU at toy shapes: what it records, how it resumes, what it notices."""

import importlib
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lora2qlora import nf4
from lora2qlora.lab import measured
from lora2qlora.qlora import NF4Linear

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
EXPERIMENTS = Path(__file__).parents[1] / "companion" / "experiments"
DRY = ["--toy", "--device", "cpu"]


@pytest.fixture
def module(monkeypatch):
    """A script of companion/experiments by name, as if started there."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    yield importlib.import_module
    for name in [name for name in sys.modules if name.partition("_")[0] == "gpu"]:
        del sys.modules[name]


@pytest.fixture
def gpu(module):
    return module("gpu")


def figures(folder) -> dict:
    return {record.configuration["job"]: record.figures for record in measured.load("gpu", folder)}


def test_correctness_counts_differences_from_bitsandbytes_and_finds_none_where_it_is_right(gpu, tmp_path):
    jobs = ["against", "double", "edges", "triton"]
    assert gpu.main([*DRY, "--parts", "correctness", "--records", str(tmp_path), "--jobs", *jobs]) == 0
    found = figures(tmp_path)
    assert len(found) == 4
    for name, counts in found["against bitsandbytes"].items():
        assert (counts["bytes"], counts["absmax"]) == (0, 0), name
        assert counts["of_bytes"] > 4000
    assert found["double quantization"]["scales"] == 0
    edges = found["edges"]
    for name in ("tie", "zeros", "minus zero", "subnormal"):
        assert edges[name]["first_byte"] == edges[name]["our_first_byte"], name
    assert edges["nan"]["our_first_byte"] == edges["infinity"]["our_first_byte"] == "ValueError"
    assert found["triton dequantize"] == {"skipped": "needs a CUDA device"}
    assert all(r.configuration["device"] == "cpu" for r in measured.load("gpu", tmp_path))


def test_correctness_would_see_a_wrong_byte_and_a_wrong_scale(module, monkeypatch):
    correctness = module("gpu_correctness")
    right = correctness.quantize_nf4

    def wrong(w, block_size=64):
        q = right(w, block_size)
        return replace(
            q, packed=q.packed ^ torch.eye(1, len(q.packed), dtype=torch.uint8)[0], absmax=q.absmax * 2
        )

    monkeypatch.setattr(correctness, "quantize_nf4", wrong)
    counts = correctness.differences(correctness.weights((64, 128), torch.float32, "cpu"), 64)
    assert counts["bytes"] == 1
    assert counts["absmax"] == counts["of_absmax"]
    assert correctness.compare_nested("cpu", "toy")["scales"] == 1


def test_failures_of_tests_are_recorded_by_name_and_shown_in_full(module, monkeypatch, capsys):
    correctness = module("gpu_correctness")
    where = "/" + "home/reader/torch/x.py:3: RuntimeError"
    printed = f"E   {where}\nFAILED tests/test_x.py::test_a[1] - {where}\nERROR tests/test_y.py\n"
    printed += "1 failed, 2 passed, 3 skipped, 1 error in 0.1s\n"

    def run(command, **options):
        return subprocess.CompletedProcess(command, 1, stdout=printed, stderr="a warning")

    monkeypatch.setattr(correctness.subprocess, "run", run)
    assert correctness.marked_tests() == {
        "exit": 1, "failed": 1, "passed": 2, "skipped": 3, "error": 1,
        "not_passed": ["tests/test_x.py::test_a[1]", "tests/test_y.py"],
    }  # fmt: skip
    shown = capsys.readouterr().err
    assert where in shown
    assert "a warning" in shown


def test_memory_records_the_peak_beside_the_ledger_within_a_thousandth(gpu, tmp_path):
    arguments = [*DRY, "--parts", "memory", "--records", str(tmp_path), "--jobs", "65B", "LoRA LLaMA-7B"]
    assert gpu.main(arguments) == 0
    found = figures(tmp_path)
    assert len(found) == 4
    for name, case in found.items():
        assert case["peak_bytes"] == pytest.approx(case["predicted_bytes"], rel=0.001), name
        parts = case["ledger"]
        held = parts["weights"] + parts["constants"] + parts["adapters"]
        assert case["model_bytes"] == held, name
        assert case["optimizer_bytes"] == parts["optimizer"], name
        assert case["losses"][1] < case["losses"][0], name


def test_speed_compares_in_rounds_after_asserting_equality(gpu, tmp_path):
    assert gpu.main([*DRY, "--parts", "speed", "--records", str(tmp_path)]) == 0
    found = figures(tmp_path)
    assert set(found["dequantize [64, 128]"]) >= {"fast", "plain", "bitsandbytes", "copy"}
    assert found["dequantize [64, 128]"]["moved_bytes"] == 64 * 128 // 2 + 128 + 4 + 4 + 2 * 64 * 128
    timed = {"lora", "qlora", "qlora-fast", "qlora-peft", "copy", "matmul"}
    assert set(found["step of 7B, 32 tokens"]) == timed | {"losses"}
    losses = found["step of 7B, 32 tokens"]["losses"]
    assert losses["qlora"] == losses["qlora-fast"] == pytest.approx(losses["qlora-peft"], abs=0.01)
    rates = found["full step of 7B, 32 tokens"]["full"]
    assert rates["tokens_per_second"] == pytest.approx(32 / rates["median"])


def test_a_fast_path_with_other_numbers_is_refused_before_it_is_timed(module, monkeypatch):
    from lora2qlora import fast

    speed = module("gpu_speed")
    right = fast.dequantize_nf4
    monkeypatch.setattr(fast, "dequantize_nf4", lambda q, out: right(q, out=out).mul_(2))
    with pytest.raises(ValueError, match="other numbers"):
        speed.dequantize("cpu", "toy", (64, 128))
    doubled = staticmethod(lambda q, dtype: 2 * nf4.dequantize_nf4(q, dtype))
    monkeypatch.setattr(fast, "use_fast", lambda model: set_dequantize(model, doubled))
    with pytest.raises(ValueError, match="another loss"):
        speed.step_jobs("cpu", "toy", 32)


def set_dequantize(model, function) -> None:
    for module in model.modules():
        if isinstance(module, NF4Linear):
            module.dequantize = function


def test_a_cut_run_goes_on_and_a_failed_job_does_not_cost_the_others(gpu, tmp_path, monkeypatch, capsys):
    ran = []

    def jobs(part, device, size):
        def fail():
            raise RuntimeError("no such kernel")

        def work(name):
            ran.append(name)
            return {"answer": 1}

        return {"first": lambda: work("first"), "bad": fail, "last": lambda: work("last")}

    monkeypatch.setattr(gpu, "jobs", jobs)
    arguments = [*DRY, "--parts", "speed", "--records", str(tmp_path)]
    assert gpu.main([*arguments, "--seconds", "-1"]) == 2
    assert not ran
    assert gpu.main(arguments) == 1
    assert ran == ["first", "last"]
    assert "no such kernel" in capsys.readouterr().err
    assert gpu.main(arguments) == 1
    assert ran == ["first", "last"]
    assert gpu.configuration("speed", "first", "cpu", "toy") == {
        "part": "speed", "job": "first", "size": "toy", "device": "cpu",
    }  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_full_size_is_refused_with_the_way_to_try_it(gpu, capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--toy --device cpu" in capsys.readouterr().err


def test_out_of_memory_is_a_result_and_not_a_failure(module, monkeypatch):
    memory = module("gpu_memory")

    def train(*arguments):
        raise torch.cuda.OutOfMemoryError("tried to allocate 2 GB")

    monkeypatch.setattr(memory, "train", train)
    case = next(iter(memory.cases().values()))
    found = memory.measure(case, "cpu", "toy")
    assert found["out_of_memory"] is True
    assert found["predicted_bytes"] > 0


@pytest.mark.slow
def test_quality_holds_every_run_of_a_climb_and_of_the_seeds(gpu, module, tmp_path, monkeypatch):
    quality = module("gpu_quality")
    monkeypatch.setattr(quality.sweep, "ROWS", {"validation": 4, "test": 4, "written": 2})
    monkeypatch.setattr(quality.sweep, "next_exponent", lambda losses, start: None if losses else start)
    monkeypatch.setattr(quality.sweep, "best_exponent", lambda *arguments, seeds: -2.5)
    arguments = [*DRY, "--parts", "quality", "--records", str(tmp_path)]
    assert gpu.main(arguments) == 0
    found = figures(tmp_path)
    swept = {"perplexity of bf16", "LoRA on bf16: wordnet", "rank 8: wordnet"}
    assert set(found) == swept | {"recipe of LoRA", "recipe of QLoRA"}
    for name, quantization in (("LoRA", None), ("QLoRA", "nf4")):
        followed = found[f"recipe of {name}"]
        assert followed["quantization"] == quantization
        assert [len(run["losses"]) for run in followed["runs"]] == [2]
        assert followed["runs"][0]["test_loss"] > 0
    assert found["recipe of LoRA"]["runs"] != found["recipe of QLoRA"]["runs"]
    climbed = found["rank 8: wordnet"]
    assert list(climbed["tried"]) == ["-2.5"]
    assert len(climbed["runs"]) == 1
    assert climbed["runs"][0]["validation_loss"] > 0
