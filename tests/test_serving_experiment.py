"""companion/experiments/serving.py: its figures tell a whole converter from one that forgets a step."""

import importlib.util
from pathlib import Path

import pytest
from lora2qlora.lab import measured
from served import TEXTS, small_lm

pytest.importorskip("xllamacpp")
SCRIPT = Path(__file__).parents[1] / "companion" / "experiments" / "serving.py"


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """The script with the book's small model and plain texts."""
    spec = importlib.util.spec_from_file_location("serving_experiment", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(measured, "RECORDS", tmp_path)
    monkeypatch.setattr(module, "load_base_model", lambda name, device: small_lm())
    monkeypatch.setattr(module, "asked", lambda tokenizer, count: list(TEXTS[:count]))
    monkeypatch.setattr(module, "STD", 0.05)
    return module


def test_answers_are_kept_by_a_whole_converter_alone_and_recorded_once(experiment, monkeypatch):
    steps = [(False, None), (False, "order of q and k"), (False, "pre type"), (True, None)]
    steps += [(True, "order of B"), (True, "rsLoRA"), (True, "patterns")]
    monkeypatch.setattr(experiment, "CASES", [("F32", *step) for step in steps])
    experiment.main(["answers", "--prompts", "5"])
    records = measured.load("serving")
    figures = {(r.configuration["adapter"], r.configuration["forgotten"]): r.figures for r in records}
    assert list(figures) == steps
    for (has_adapter, step), found in figures.items():
        assert (found["whole_answer"] == 5) == (step is None)
        assert (found["changed_by_adapter"] > 2) == has_adapter
    assert figures[False, "pre type"]["tokenized_alike"] < 5
    experiment.main(["answers", "--prompts", "5"])
    assert len(measured.load("serving")) == len(records)


def test_mixed_batches_are_timed(experiment, monkeypatch):
    monkeypatch.setattr(experiment, "SIZES", [(3, 2)])
    model, before = small_lm()[0], [type(module) for module in small_lm()[0].modules()]
    experiment.main(["speed"])
    (record,) = measured.load("serving")
    assert set(record.figures) == {"base", "one_for_all", "mixed", "peft_mixed", "row_by_row"}
    assert all(len(times) == 6 and min(times) > 0 for times in record.figures.values())
    assert [type(module) for module in model.modules()] == before


def test_the_adapters_share_the_weights_of_the_base_and_no_modules(experiment, tmp_path):
    model = small_lm()[0]
    shared = experiment.sharing(model)
    assert all(a is b for a, b in zip(model.parameters(), shared.parameters(), strict=True))
    assert not set(map(id, model.modules())) & set(map(id, shared.modules()))
