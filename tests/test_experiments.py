"""companion/experiments: a long run resumes where it was cut, and records what it was asked to do."""

import importlib.util
from pathlib import Path

import pytest
from lora2qlora.lab import measured

SCRIPT = Path(__file__).parents[1] / "companion" / "experiments" / "quickstart.py"


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    """The script as a module, with its records in tmp_path."""
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(measured, "RECORDS", tmp_path)
    return module


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
