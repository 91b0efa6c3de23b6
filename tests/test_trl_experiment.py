"""experiments/trl_arguments.py: what a release takes or refuses is what it says, and is recorded once."""

import sys
from types import ModuleType

import pytest
from lora2qlora.lab import measured
from test_experiments import script

OLD_WORDS = "got an unexpected keyword argument"


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """The script, with a TRL whose SFTConfig takes `max_length` and `packing` alone, and no training."""
    trl = ModuleType("trl")
    trl.__version__ = "0.0"

    class SFTConfig:
        def __init__(self, folder, use_cpu=True, report_to=(), max_length=1, packing=True): ...

    class SFTTrainer:
        def __init__(self, model, args, train_dataset, processing_class): ...

    trl.SFTConfig, trl.SFTTrainer = SFTConfig, SFTTrainer
    monkeypatch.setitem(sys.modules, "trl", trl)
    module = script("trl_arguments", tmp_path, monkeypatch)
    monkeypatch.setattr(module, "load_base_model", lambda *_, **__: ("model", "tokenizer"))
    monkeypatch.setattr(module, "losses", lambda folder: [2.0, 1.0])
    return module


def test_what_is_said_is_recorded_once(experiment, capsys):
    experiment.main()
    (record,) = measured.load("trl_arguments")
    assert record.configuration == {"trl": "0.0", "model": "smollm2-135m"}
    said = record.figures["said"]
    taken = {call for call, words in said.items() if not words}
    assert taken == {
        "SFTConfig(max_length=...)",
        "SFTConfig(packing=...)",
        "SFTTrainer(processing_class=...)",
    }
    assert all(OLD_WORDS in words for call, words in said.items() if call not in taken)
    experiment.main()
    assert "recorded already" in capsys.readouterr().out
    assert len(measured.load("trl_arguments")) == 1


def test_without_trl_it_says_how_to_get_it(experiment, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit, match="TRL is not installed"):
        experiment.main()


def test_the_record_is_of_a_run_that_learned():
    for record in measured.load("trl_arguments"):
        losses = record.figures["losses"]
        assert losses == sorted(losses, reverse=True)
        assert len(losses) == 3
        assert any(record.figures["said"].values())
        assert not all(record.figures["said"].values())
