"""lab.checkpoints: what was not written to its end is seen, and a killed run ends as if it never was."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora2qlora.lab.checkpoints import newest_whole_checkpoint, what_is_missing
from safetensors.torch import load_file, save_file

SCRIPT = Path(__file__).with_name("killed_training.py")
PLACES = ("step", "adapter_model.safetensors", "optimizer.pt", "behind rng_state.pth", "trainer_state.json")
FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="ends processes that are forks")


def write_checkpoint(folder):
    """What Trainer writes, as far as it counts here; `test_the_state_is_written_last` has the real one."""
    folder.mkdir()
    save_file({"lora_A.weight": torch.ones(4, 8)}, folder / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.ones(16)}, folder / name)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 8, "log_history": []}, indent=2))
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint-8")


@pytest.fixture(scope="module")
def cuttable(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "checkpoint-8")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of a run that nobody ended and of runs that were killed and resumed."""
    folder = tmp_path_factory.mktemp("runs")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


def outcome(folder, attempt):
    return json.loads((folder / f"attempt-{attempt}.json").read_text())


@forks
@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_was_killed_and_resumed_is_the_one_that_was_not(runs, place):
    assert json.loads((runs / "ended.json").read_text())[place] == signal.SIGKILL
    resumed, whole = outcome(runs / place, 1), outcome(runs / "whole", 0)
    assert resumed["start"] == "checkpoint-4"
    assert resumed["losses"] == {step: x for step, x in whole["losses"].items() if int(step) > 4}
    assert len(set(whole["losses"].values())) == len(whole["losses"]) == 8
    adapters = [
        load_file(runs / run / "checkpoint-8" / "adapter_model.safetensors") for run in ("whole", place)
    ]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


@forks
@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_what_was_half_written_is_named_once(runs, place):
    said = outcome(runs / place, 1)["warnings"]
    if place == "step":  # nothing was being written
        assert said == []
    else:
        (warning,) = said
        assert "checkpoint-6 (trainer_state.json, which is written last, is missing or cut)" in warning
        assert "going on from checkpoint-4" in warning


@forks
@pytest.mark.slow
def test_the_state_is_written_last(runs):
    """What the module says of Trainer, seen by the clock of the files."""
    written = {name: (runs / "whole" / "checkpoint-8" / name).stat().st_mtime_ns for name in FILES}
    assert what_is_missing(runs / "whole" / "checkpoint-8") is None
    assert max(written, key=written.get) == "trainer_state.json"
    assert min(written, key=written.get) == "adapter_model.safetensors"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "short"])
def test_a_file_that_is_not_whole_is_named(checkpoint, name, damage):
    assert what_is_missing(checkpoint) is None
    path = checkpoint / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:-2] if damage == "short" else b"")
    reason = what_is_missing(checkpoint)
    if name == "adapter_model.safetensors" and damage == "missing":
        assert reason == "no .safetensors file with weights"
    else:
        assert reason.startswith(name)
    with pytest.warns(UserWarning, match=r"checkpoint-8 \(.*\); no other is there"):
        assert newest_whole_checkpoint(checkpoint.parent) is None


@pytest.mark.parametrize("name", FILES)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_noticed(cuttable, name, share):
    content = (cuttable / name).read_bytes()
    try:
        (cuttable / name).write_bytes(content[: int(share * len(content))])
        assert what_is_missing(cuttable).startswith(name)
    finally:
        (cuttable / name).write_bytes(content)


def test_a_state_of_another_step_is_none(checkpoint):
    renamed = checkpoint.rename(checkpoint.with_name("checkpoint-9"))
    assert what_is_missing(renamed) == "trainer_state.json is that of step 8"


def test_a_shard_or_a_scaler_that_is_lost_is_named(checkpoint):
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"a": "adapter_model.safetensors", "b": "model-2.safetensors"}})
    )
    assert what_is_missing(checkpoint) == "model-2.safetensors is missing"
    index.write_text('{"weight_map":')
    assert what_is_missing(checkpoint) == "model.safetensors.index.json is cut"
    index.unlink()
    (checkpoint / "scaler.pt").write_bytes(b"PK")
    assert what_is_missing(checkpoint) == "scaler.pt is cut"


def test_the_newest_is_the_one_of_the_most_steps(checkpoint, recwarn):
    for step in (10, 9, 100):
        made = Path(shutil.copytree(checkpoint, checkpoint.with_name(f"checkpoint-{step}")))
        state = json.loads((made / "trainer_state.json").read_text())
        (made / "trainer_state.json").write_text(json.dumps(state | {"global_step": step}))
    for other in ("checkpoint-1000-old", "checkpoint-x", "my checkpoint-2000"):
        (checkpoint.parent / other).mkdir()
    (checkpoint.parent / "checkpoint-3000").write_text("a file")
    assert newest_whole_checkpoint(checkpoint.parent).name == "checkpoint-100"
    assert not recwarn
    for step in (10, 100):
        (checkpoint.with_name(f"checkpoint-{step}") / "optimizer.pt").unlink()
    with pytest.warns(UserWarning, match="not whole, and so not used") as caught:
        assert newest_whole_checkpoint(str(checkpoint.parent)).name == "checkpoint-9"
    (warning,) = caught
    expected = "checkpoint-100 (optimizer.pt is missing), checkpoint-10 (optimizer.pt is missing)"
    assert expected in str(warning.message)


def test_nothing_to_resume_from_is_a_fresh_start(tmp_path, recwarn):
    assert newest_whole_checkpoint(tmp_path) is None
    assert newest_whole_checkpoint(tmp_path / "nowhere") is None
    assert not recwarn
