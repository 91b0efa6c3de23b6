"""lab.cache: what is whole in it, what made it, and where it is."""

import json
import sys
from importlib import metadata
from pathlib import Path

import pytest
from lora2qlora.lab import cache, models


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "complete.json"])
def test_a_cut_or_missing_cached_file_is_converted_again(installed, file):
    models.load_base_model("tiny")
    (directory,) = [d for d in installed.iterdir() if d.is_dir()]
    (directory / file).write_bytes((directory / file).read_bytes()[:-3])
    assert not cache.is_complete(directory)
    models.load_base_model("tiny")
    (directory / file).unlink()
    models.load_base_model("tiny")
    assert cache.is_complete(directory)


def test_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA2QLORA_CACHE", "~/models")
    assert cache.cache_directory() == Path.home() / "models"
    monkeypatch.delenv("LORA2QLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_directory() == tmp_path / "lora2qlora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_directory() == Path.home() / ".cache" / "lora2qlora"


def made(**changes) -> dict:
    return {"converter": cache.CONVERTER, "versions": {"transformers": "5.18"}, "sizes": {"a": 2}} | changes


@pytest.mark.parametrize(
    ("content", "complete"),
    [
        (json.dumps(made()), True),
        (json.dumps(made(versions={"transformers": "6.0.0"})), True),
        (json.dumps(made(versions={"transformers": "5.17.1"})), False),
        (json.dumps(made(versions={"transformers": "none"})), False),
        (json.dumps(made(versions={})), False),
        (json.dumps(made(converter=1)), False),
        (json.dumps(made(sizes={"a": 3})), False),
        (json.dumps(made(sizes={"a": 2, "b": 1})), False),
        (json.dumps(made(sizes={})), False),
        (json.dumps(made(sizes=["a"])), False),
        (json.dumps({"a": 2}), False),  # as it was before it said what made it
        ("[" * 100_000, False),
        ("[]", False),
        ("3", False),
        ("\udcff", False),
        ("", False),
    ],
)
def test_complete_is_what_this_converter_wrote_whole_under_a_right_transformers(tmp_path, content, complete):
    (tmp_path / "a").write_text("ab")
    (tmp_path / "complete.json").write_text(content, errors="surrogateescape")
    assert cache.is_complete(tmp_path) == complete


def test_what_is_marked_is_complete_and_says_what_made_it(tmp_path):
    assert not cache.is_complete(tmp_path)
    (tmp_path / "a").write_text("ab")
    cache.mark_complete(tmp_path)
    assert cache.is_complete(tmp_path)
    found = json.loads((tmp_path / "complete.json").read_text())
    assert found["sizes"] == {"a": 2}
    assert found["versions"] == {
        name: metadata.version(name) for name in ("transformers", "tokenizers", "gguf")
    }


@pytest.mark.parametrize("change", [{"converter": 1}, {"versions": {"transformers": "5.15.0"}}])
def test_what_older_software_made_is_converted_again_with_a_word(installed, change, monkeypatch, capsys):
    models.load_base_model("tiny")
    assert "again" not in capsys.readouterr().err
    (directory,) = (d for d in installed.iterdir() if d.is_dir())
    path = directory / "complete.json"
    right = path.read_text()
    path.write_text(json.dumps(json.loads(right) | change))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    models.load_base_model("tiny")
    said = capsys.readouterr().err
    assert f"{directory} is not whole, or older software made it: converting tiny.gguf again" in said
    assert path.read_text() == right
    models.load_base_model("tiny")
    assert "again" not in capsys.readouterr().err


def test_a_missing_library_has_no_version(monkeypatch):
    def version(name):
        if name == "gguf":
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(metadata, "version", version)
    assert cache.converted_by() == "transformers 1.0, tokenizers 1.0, gguf none"
