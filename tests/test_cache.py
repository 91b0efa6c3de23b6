"""lab.cache: what is whole in it, what made it, and where it is."""

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
