"""lab.output_folder: the Drive where there is one, a warning where nothing would last, runs/ elsewhere."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
from lora2qlora.lab import output_folder as module
from lora2qlora.lab.output_folder import output_folder


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """An empty machine that is not Colab, with its own /content."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    (tmp_path / "content").mkdir()
    monkeypatch.setattr(module, "COLAB", tmp_path / "content")
    monkeypatch.setattr(module, "DRIVE", tmp_path / "content" / "drive" / "MyDrive")
    return tmp_path


@pytest.fixture(params=["its image", "its kernel"])
def colab(request, machine, monkeypatch):
    if request.param == "its image":
        monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    else:
        monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    return machine


def test_elsewhere_runs_lie_beside_the_notebook(machine, capsys):
    (machine / "content" / "drive" / "MyDrive").mkdir(parents=True)  # a folder of that name is no Colab
    assert output_folder("first") == Path("runs/first")
    assert (machine / "runs" / "first").is_dir()
    assert capsys.readouterr().out == ""


def test_on_colab_the_drive_keeps_the_run(colab, capsys):
    (colab / "content" / "drive" / "MyDrive").mkdir(parents=True)
    folder = output_folder("first")
    assert folder.is_relative_to(colab / "content" / "drive" / "MyDrive")
    assert folder.name == "first"
    assert folder.is_dir()
    assert capsys.readouterr().out == ""


def test_on_colab_without_a_drive_the_loss_is_announced(colab, capsys):
    folder = output_folder("first")
    assert folder.is_relative_to(colab / "content")
    assert folder.is_dir()
    assert not (colab / "content" / "drive").exists()  # else the Drive could not be mounted there
    said = capsys.readouterr().out
    assert str(folder) in said
    assert "is lost when" in said
    compile(said.partition("mount your Drive: ")[2], "the line to run", "exec")
    assert 'drive.mount("/content/drive")' in said


def test_a_second_run_of_that_name_finds_its_files(machine):
    (output_folder("first") / "kept").write_text("kept")
    assert (output_folder("first") / "kept").read_text() == "kept"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "a\\b", "-a", "a b", "a\n", None, 3])
def test_a_name_that_could_lead_elsewhere_is_refused(machine, name):
    with pytest.raises(ValueError, match="a run's name has letters"):
        output_folder(name)
    assert not (machine / "runs").exists()


def test_a_file_in_the_way_is_an_oserror_that_names_it(machine):
    (machine / "runs").write_text("a file")
    with pytest.raises(OSError, match="runs"):
        output_folder("first")
