"""lab.model_folder: a short name, a Hub name or a folder becomes what transformers loads."""

import shutil
from pathlib import Path

import pytest
import torch
from lora2qlora.lab import models
from lora2qlora.lab.model_folder import model_folder
from transformers import AutoModelForCausalLM


@pytest.fixture
def folder(installed, tmp_path):
    """The tiny model as a reader's own folder."""
    return Path(shutil.copytree(model_folder("tiny"), tmp_path / "own" / "model"))


def test_the_books_model_is_its_converted_folder_and_loads(installed):
    where = model_folder("tiny")
    assert Path(where).parent == installed
    expected, _ = models.load_base_model("tiny")
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


@pytest.mark.parametrize("name", ["me/x", "HuggingFaceTB/SmolLM2-1.7B-Instruct", "-/x"])
def test_a_hub_name_stays_itself(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_folder(name) == name


def test_a_short_name_without_a_package_is_its_hub_name():
    assert model_folder("qwen2.5-7b") == "Qwen/Qwen2.5-7B-Instruct"


def spellings(folder):
    """The folder as readers may write it; the working folder is above it, and HOME too."""
    return [folder, str(folder), f"{folder}/", "own/model", "./own/model", "~/own/model", Path("own/model")]


def test_a_folder_loads_however_its_path_is_written(folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    monkeypatch.setenv("HOME", str(folder.parent.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent.parent))
    for name in spellings(folder):
        assert Path(model_folder(name)).samefile(folder)
    expected, tokens = models.load_base_model("tiny")
    for name in ("own/model", folder):  # the first has the form of a Hub name, and the folder wins
        model, tokenizer = models.load_base_model(name)
        assert tokenizer("Ahoy")["input_ids"] == tokens("Ahoy")["input_ids"]
        assert all(torch.equal(model.state_dict()[key], w) for key, w in expected.state_dict().items())


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("config.json", r"model has no config\.json"),
        ("model.safetensors", r"a config\.json and no \.safetensors file.*pickle"),
    ],
)
def test_a_folder_that_lacks_a_file_says_which(folder, monkeypatch, lost, said):
    (folder / lost).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    monkeypatch.chdir(folder.parent.parent)
    for name in (folder, "own/model"):
        for function in (model_folder, models.load_base_model):
            with pytest.raises(OSError, match=said):
                function(name)


def test_an_adapter_is_no_model(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(OSError, match="holds an adapter and no model: load its base model"):
        model_folder(folder)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "../nowhere/", "~/nowhere", Path("no")])
def test_a_path_without_a_folder_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no folder .*no"):
        model_folder(name)


@pytest.mark.parametrize("name", ["smollm3", "", "a/b/c", 7, None, ["tiny"]])
def test_what_is_none_of_them_lists_what_would_do(name):
    with pytest.raises(KeyError, match=r"smollm2-135m.*Hub name owner/model, or a folder's path"):
        model_folder(name)


def test_a_damaged_file_of_ones_own_is_not_to_be_removed(folder):
    (folder / "model.safetensors").write_bytes(b"{" * 100)
    with pytest.raises(OSError, match=r"own/model\): a file in that folder is damaged .* save the model"):
        models.load_base_model(folder)
