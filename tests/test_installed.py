"""lab.installed: versions, libraries, compiler and GPU, each with a machine that lacks it."""

import subprocess
import sys
import warnings
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from lora2qlora.fast import library
from lora2qlora.lab import installed
from lora2qlora.lab.machine import EVERY


def said(findings) -> str:
    return "\n".join(finding.said for finding in findings)


@pytest.fixture
def versions(monkeypatch):
    """Installed versions by name; what is not in it is as it is."""
    other, real = {}, metadata.version

    def version(name):
        if other.get(name, "") is None:
            raise metadata.PackageNotFoundError(name)
        return other.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", version)
    return other


def test_the_versions_here_are_in_the_ranges():
    (found,) = installed.requirements()
    assert found.said.endswith("packages are in the ranges that the book asks for")
    assert found.chapters == ()


@pytest.mark.parametrize(
    ("name", "version", "words", "advice", "chapters"),
    [
        ("peft", "0.10.0", "peft 0.10.0 is outside <1,>=0.18", 'pip install "peft<1,>=0.18"', EVERY),
        ("peft", None, "peft is not installed", 'pip install "peft<1,>=0.18"', EVERY),
        ("xllamacpp", None, "xllamacpp is not installed", 'pip install "xllamacpp>=2026', ("16",)),
    ],
)
def test_a_version_outside_its_range_is_named(monkeypatch, versions, name, version, words, advice, chapters):
    needs = ["peft<1,>=0.18", 'xllamacpp>=2026.10.1; extra == "serve"', 'no-such>=1; extra == "test"']
    needs += ['no-such>=1; python_version < "3"', "numpy"]
    monkeypatch.setattr(metadata, "requires", lambda _: needs)
    versions.update({"peft": "0.21.2", "xllamacpp": "2026.11.1", name: version})
    good, found = installed.requirements()
    assert good.said.startswith("2 packages are in the ranges")
    assert (found.said, found.chapters) == (words, chapters)
    assert found.advice.startswith(advice)


PINS = """dependencies:
  - python=3.11
  - pip:
      - numpy==2.0.0
      - torch==2.13.0
      - nowhere==1.0; sys_platform == "no such"
"""


def test_pins_that_differ_are_a_note_and_no_failure(tmp_path, versions):
    (tmp_path / "environment.yml").write_text(PINS)
    versions.update({"numpy": "2.0.0", "torch": "2.13.0+cu130"})
    (found,) = installed.pins(tmp_path)
    assert found == installed.Finding("2 of 2 packages are exactly as pinned in environment.yml")
    versions.update({"numpy": "2.0.1", "torch": None})
    (found,) = installed.pins(tmp_path)
    assert found.said.startswith("0 of 2 packages")
    assert found.said.endswith("not numpy 2.0.1 for 2.0.0, torch none for 2.13.0")
    assert "make setup" in found.advice
    assert found.chapters == ()


def test_many_pins_that_differ_are_not_all_listed(tmp_path, versions):
    lines = "".join(f"      - p{n}==1\n" for n in range(9))
    versions.update({f"p{n}": "2" for n in range(9)})
    (tmp_path / "environment.yml").write_text(f"dependencies:\n  - pip:\n{lines}")
    assert installed.pins(tmp_path)[0].said.endswith("p3 2 for 1 and 5 more")


def test_without_a_checkout_there_are_no_pins(tmp_path):
    (found,) = installed.pins(tmp_path)
    assert found.said.startswith("no environment.yml here")
    assert found.advice == ""


def test_a_library_that_does_not_import_is_named(monkeypatch):
    def import_module(name):
        if name == "bitsandbytes":
            raise OSError("libstdc++.so.6: version not found\nmore")
        return real(name)

    real = installed.importlib.import_module
    monkeypatch.setattr(installed.importlib, "import_module", import_module)
    (found,) = installed.libraries()
    assert found.said == "bitsandbytes cannot be imported: OSError: libstdc++.so.6: version not found"
    assert found.chapters == EVERY


def test_an_old_torchao_is_named(monkeypatch):
    from peft import import_utils

    def refuse():
        raise ImportError("Found an incompatible version of torchao. Found version 0.10.0")

    assert installed.torchao() is None
    monkeypatch.setattr(import_utils, "is_torchao_available", refuse)
    found = installed.torchao()
    assert "torchao. Found version 0.10.0" in found.said
    assert found.advice.startswith("pip uninstall torchao")
    assert found in installed.libraries()


@pytest.mark.parametrize("wrong", ["numbers", "error"])
def test_a_bitsandbytes_that_quantizes_wrongly_is_named(monkeypatch, wrong):
    from bitsandbytes import functional

    def dequantize(*arguments):
        if wrong == "error":
            raise RuntimeError("no kernel for this processor")
        return torch.zeros(64)

    assert installed.nf4_finding() is None
    monkeypatch.setattr(functional, "dequantize_4bit", dequantize)
    found = installed.nf4_finding()
    assert ("no kernel" if wrong == "error" else "[0.0, 0.0") in found.said
    assert found.chapters == EVERY


@pytest.fixture
def fresh_library():
    library.load_library.cache_clear()
    yield
    library.load_library.cache_clear()


@pytest.mark.usefixtures("fresh_library")
@pytest.mark.parametrize("system", ["Linux", "Darwin", "Windows", "Other"])
def test_no_compiler_is_chapter_14(monkeypatch, system):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(library.shutil, "which", lambda _: None)
    monkeypatch.setattr(installed.platform, "system", lambda: system)
    found = installed.compiler()
    assert found.said == "no C++ compiler is on PATH (g++ or c++; CXX names another)"
    assert found.advice == installed.COMPILER.get(system, installed.COMPILER["Linux"])
    assert found.chapters == ("14",)


@pytest.mark.usefixtures("fresh_library")
def test_a_compiler_that_fails_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "false")
    with warnings.catch_warnings(record=True) as heard:
        found = installed.compiler()
    assert found.said.startswith("false could not compile it")
    assert heard == []  # it is said once, in the finding


CARD = SimpleNamespace(name="Tesla T4", total_memory=15.8e9)


def has_card(monkeypatch, capability):
    monkeypatch.delenv("LORA2QLORA_PROFILE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: CARD)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch, "ones", lambda *sizes, device: torch.full(sizes, 1.0))


def test_a_card_without_bf16_is_a_note(monkeypatch):
    has_card(monkeypatch, (7, 5))
    found = installed.gpu()
    assert found.said == 'Tesla T4, 15.8 GB: chapters run in the profile "t4". It has no bf16 in hardware'
    assert "Chapter 13" in found.advice
    assert found.chapters == ()
    has_card(monkeypatch, (8, 9))
    assert installed.gpu().said.endswith("It has bf16")


def test_a_card_that_cannot_multiply_stops_every_chapter(monkeypatch):
    def ones(*sizes, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    has_card(monkeypatch, (5, 0))
    monkeypatch.setattr(torch, "ones", ones)
    found = installed.gpu()
    assert "no kernel image" in found.said
    assert "CUDA_VISIBLE_DEVICES" in found.advice
    assert found.chapters == EVERY


@pytest.mark.parametrize("driver", [None, "/usr/bin/nvidia-smi"])
def test_a_driver_without_a_torch_for_it_is_a_note(monkeypatch, driver):
    monkeypatch.delenv("LORA2QLORA_PROFILE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(installed.shutil, "which", lambda _: driver)
    found = installed.gpu()
    assert "no GPU that torch can use" in found.said
    assert ("NVIDIA driver" in found.advice) == bool(driver)


def test_a_profile_that_is_none_is_named(monkeypatch):
    monkeypatch.setenv("LORA2QLORA_PROFILE", "laptop")
    found = installed.gpu()
    assert "'laptop'" in found.said
    assert found.chapters == EVERY


def test_a_long_error_is_cut():
    assert installed.first_line(ValueError("a\nb")) == "a"
    assert installed.first_line(ValueError()) == "ValueError"
    assert len(installed.first_line(ValueError("a" * 999))) == 100


def test_the_check_is_imported_without_any_library():
    """On a machine that has none, it must still say so."""
    code = "import sys, lora2qlora.lab.check; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "lora2qlora" in loaded
    assert not {"torch", "transformers", "numpy", "packaging", "tqdm"} & loaded
