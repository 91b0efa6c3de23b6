"""What this machine is, by the standard library alone: Python, processor cores, memory, disk.

Each probe returns a Finding, which `lab.check` prints. It must run where nothing of the book does: no
torch here, and no syntax that an old Python could not read.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

EVERY = ("every chapter",)
# What the kernels of the hungriest chapters took at least [GB], on Linux with one thread.
PEAKS = {"00": 2.3, "02": 3.8, "16": 2.1}
LEAST = 1.2  # any chapter: torch, transformers and a small model
CONVERTED_GB = 0.6  # SmolLM2, converted once, in the cache
RUNS_GB = 1.2  # two files of chapter 16, below the working folder
CGROUPS = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Finding:
    """What a probe found, in words: `advice` says what to do, `chapters` which cannot run here."""

    said: str
    advice: str = ""
    chapters: tuple[str, ...] = ()


def python(versions: str = ">=3.11,<3.14") -> Finding:
    """The Python that runs, against the package's range `versions`, such as ">=3.11,<3.14"."""
    said = f"Python {platform.python_version()} ({platform.system()}, {platform.machine()})"
    if sys.maxsize < 2**32:
        return Finding(f"{said} has 32 bits, PyTorch needs 64", "Install a 64-bit Python.", EVERY)
    bounds = dict(re.findall(r"(>=|<)(\d+\.\d+)", versions))
    least, below = (tuple(map(int, bounds[sign].split("."))) for sign in (">=", "<"))
    if not least <= sys.version_info[:2] < below:
        name = bounds[">="]
        advice = f"Install Python {name} and set up again: make setup PYTHON=python{name}"
        return Finding(f"{said} is outside {versions}", advice, EVERY)
    return Finding(said)


def read_number(path: Path) -> int | None:
    """The first whole number in a file; None where there is no such file, or "max" in it."""
    try:
        return int(path.read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return None


def cores() -> Finding:
    """Processor cores that this process may use; a container may have part of one."""
    mine = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    count = len(mine(0)) if mine else os.cpu_count() or 1
    try:
        quota, period = (CGROUPS / "cpu.max").read_text(encoding="ascii").split()
        count = min(count, int(quota) / int(period))
    except (OSError, ValueError):  # no container, or "max"
        pass
    said = f"{count:g} processor core{'s' if count != 1 else ''}"
    if count < 2:
        return Finding(said, "The chapters' running times are those of two cores: allow twice as long.")
    return Finding(said)


def memory_bytes() -> tuple[int | None, int | None]:
    """(all, free) memory in bytes, as far as this system says; within a container's limit."""
    total = free = None
    if sys.platform == "win32":
        return windows_memory()
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if MEMINFO.exists():
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
        free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes",) * 2):
        most = read_number(CGROUPS / limit)
        if most is not None and total is not None and most < total:
            held = read_number(CGROUPS / used) or 0 if used != limit else 0
            total, free = most, min(free if free is not None else most, most - held)
    return total, free


def windows_memory() -> tuple[int | None, int | None]:
    """(all, free) memory in bytes, by GlobalMemoryStatusEx."""
    import ctypes

    names = ("total", "free", "page_total", "page_free", "virtual_total", "virtual_free", "extended")

    class Status(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)]
        _fields_ += [(name, ctypes.c_ulonglong) for name in names]

    status = Status(length=ctypes.sizeof(Status))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None, None
    return status.total, status.free


def memory() -> Finding:
    """Memory, all and free, against what the chapters were measured to take."""
    total, free = (None if n is None else n / 1e9 for n in memory_bytes())
    if total is None:
        return Finding("this system does not say how much memory it has", "The chapters need 4 GB.")
    said = f"{total:.1f} GB of memory" + ("" if free is None else f", {free:.1f} GB of it free")
    if total < LEAST:
        advice = f"A chapter needs at least {LEAST} GB: use a larger machine, or Colab."
        return Finding(said, advice, EVERY)
    most = max(PEAKS.values())
    if large := tuple(chapter for chapter, peak in PEAKS.items() if peak > total):
        return Finding(said, f"They take up to {most} GB: use a larger machine, or Colab.", large)
    if free is not None and free < most:
        large = [chapter for chapter, peak in PEAKS.items() if peak > free]
        advice = f"Close other programs before {named(large)}: up to {most} GB are needed at a time."
        return Finding(said, advice)
    return Finding(said)


def disk(cache: Path, converted: bool, chapters: tuple[str, ...]) -> list[Finding]:
    """Room for SmolLM2 in the cache, for `chapters`, unless it is `converted`; and for chapter 16's files."""
    here = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free, left = (shutil.disk_usage(folder).free / 1e9 for folder in (here, Path.cwd()))
    found = [Finding(f"{free:.1f} GB of disk free for the model cache {cache}")]
    if not converted and not os.access(here, os.W_OK):
        advice = "Set LORA2QLORA_CACHE to a folder that can be written."
        found = [Finding(f"the model cache {cache} cannot be written", advice, chapters)]
    elif not converted and free < CONVERTED_GB:
        advice = f"SmolLM2 takes {CONVERTED_GB} GB there: free some, or set LORA2QLORA_CACHE to another disk."
        found = [Finding(found[0].said, advice, chapters)]
    if left < RUNS_GB:
        advice = f"Chapter 16 writes {RUNS_GB} GB in the folder it runs in: free some, or move the book."
        found.append(Finding(f"{left:.1f} GB of disk free in this folder", advice, ("16",)))
    return found


def named(chapters) -> str:
    """ "chapter 14", "chapters 03, 14 and 16", or "every chapter"."""
    if EVERY[0] in chapters:
        return EVERY[0]
    *rest, last = sorted(set(chapters))
    return f"chapters {', '.join(rest)} and {last}" if rest else f"chapter {last}"
