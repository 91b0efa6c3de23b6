"""lab.machine: each thing that a machine can lack is said in words, with what to do and which chapters."""

import os
import sys
from collections import namedtuple

import pytest
from lora2qlora.lab import machine
from lora2qlora.lab.machine import EVERY, Finding

GB = 10**9
Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("version", "advice"),
    [((3, 10, 9), "make setup PYTHON=python3.11"), ((3, 14, 0), "make setup PYTHON=python3.11"),
     ((3, 11, 0), ""), ((3, 13, 9), "")],
)  # fmt: skip
@pytest.mark.parametrize("versions", [">=3.11,<3.14", "<3.14,>=3.11"])  # builders turn them round
def test_a_python_outside_the_range_is_named(monkeypatch, version, advice, versions):
    monkeypatch.setattr(sys, "version_info", version)
    found = machine.python(versions)
    assert found.advice.endswith(advice)
    assert found.chapters == (EVERY if advice else ())
    assert ("outside" in found.said) == bool(advice)


def test_a_python_of_32_bits_is_named(monkeypatch):
    monkeypatch.setattr(sys, "maxsize", 2**31 - 1)
    found = machine.python()
    assert "has 32 bits" in found.said
    assert found.chapters == EVERY


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine of four cores and no container; its folder of limits."""
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(4), raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("quota", "said"), [(None, "4 processor cores"), ("max 100000", "4 processor cores"),
                        ("100000 100000", "1 processor core"), ("50000 100000", "0.5 processor cores")],
)  # fmt: skip
def test_cores_are_those_that_a_container_may_use(bare, quota, said):
    if quota:
        (bare / "cpu.max").write_text(quota)
    found = machine.cores()
    assert found.said == said
    assert ("twice as long" in found.advice) == (not said.startswith("4"))
    assert found.chapters == ()


def test_cores_without_affinity_are_those_of_the_machine(bare, monkeypatch):
    monkeypatch.delattr(machine.os, "sched_getaffinity")
    monkeypatch.setattr(machine.os, "cpu_count", lambda: None)  # as it may be by its documentation
    assert machine.cores().said == "1 processor core"


def has_memory(monkeypatch, tmp_path, total, available):
    """A machine of so many bytes."""
    pages = {"SC_PHYS_PAGES": total // 4096, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(machine.os, "sysconf", pages.__getitem__)
    monkeypatch.setattr(machine.os, "sysconf_names", pages)
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    if available is not None:
        text = f"MemTotal: {total // 1024} kB\nMemAvailable:  {available // 1024} kB\n"
        (tmp_path / "meminfo").write_text(text)


PEAKS = {"00": 2.0, "16": 3.0}


@pytest.mark.parametrize(
    ("total", "available", "advice", "chapters"),
    [
        (8 * GB, 7 * GB, "", ()),
        (8 * GB, None, "", ()),  # macOS does not say
        (8 * GB, 25 * GB // 10, "Close other programs before chapter 16", ()),
        (8 * GB, GB, "Close other programs before chapters 00 and 16", ()),
        (25 * GB // 10, 2 * GB, "use a larger machine", ("16",)),
        (GB, GB, "use a larger machine", EVERY),
    ],
)
def test_too_little_memory_is_said_with_the_chapters(bare, monkeypatch, total, available, advice, chapters):
    monkeypatch.setattr(machine, "PEAKS", PEAKS)
    has_memory(monkeypatch, bare, total, available)
    found = machine.memory()
    assert advice in found.advice
    assert bool(found.advice) == bool(advice)
    assert found.chapters == chapters
    assert found.said.startswith(f"{total / 1e9:.1f} GB of memory")


@pytest.mark.parametrize(
    ("limit", "used"), [("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", None)]
)
def test_a_container_has_the_memory_of_its_limit(bare, monkeypatch, limit, used):
    has_memory(monkeypatch, bare, 64 * GB, 60 * GB)
    (bare / limit).parent.mkdir(exist_ok=True)
    (bare / limit).write_text(str(2 * GB))
    if used:
        (bare / used).write_text(str(GB // 2))
    assert machine.memory_bytes() == (2 * GB, 2 * GB - GB // 2 if used else 2 * GB)
    (bare / limit).write_text("max\n")
    assert machine.memory_bytes() == (64 * GB // 4096 * 4096, 60 * GB // 1024 * 1024)


def test_a_system_that_tells_no_memory_is_no_failure(bare, monkeypatch):
    monkeypatch.setattr(machine, "memory_bytes", lambda: (None, None))
    assert machine.memory().chapters == ()
    assert "does not say" in machine.memory().said


def test_windows_is_asked_in_its_own_way(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(machine, "windows_memory", lambda: (8 * GB, 3 * GB))
    assert machine.memory_bytes() == (8 * GB, 3 * GB)


@pytest.mark.parametrize(
    ("free", "converted", "writable", "chapters"),
    [
        (50.0, False, True, ()),
        (0.5, False, True, ("00", "16")),  # neither SmolLM2's 0.6 GB nor chapter 16's files
        (0.5, True, False, ("16",)),
        (0.8, False, True, ("16",)),
        (50.0, False, False, ("00",)),
    ],
)
def test_a_full_or_read_only_disk_is_said(monkeypatch, tmp_path, free, converted, writable, chapters):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: Usage(0, 0, free * 1e9))
    monkeypatch.setattr(machine.os, "access", lambda *_: writable)
    found = machine.disk(tmp_path / "not" / "there", converted, ("00",))
    assert tuple(chapter for finding in found for chapter in finding.chapters) == chapters
    assert all(bool(finding.advice) == bool(finding.chapters) for finding in found)
    assert not (tmp_path / "not").exists()


def test_chapters_are_named_once_and_in_order():
    assert machine.named(["14"]) == "chapter 14"
    assert machine.named(["16", "14", "16"]) == "chapters 14 and 16"
    assert machine.named(["16", "03", "20a"]) == "chapters 03, 16 and 20a"
    assert machine.named(["16", *EVERY]) == "every chapter"


def test_here_it_finds_something():
    assert machine.python().said.startswith("Python 3.")
    assert isinstance(machine.memory(), Finding)
    total, free = machine.memory_bytes()
    assert os.name == "nt" or (total and (free is None or 0 < free <= total))
