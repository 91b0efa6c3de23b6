"""What is installed, and whether it works: versions, libraries, the C++ compiler, the GPU.

A probe returns what it found, one Finding or several. Libraries are imported inside the probes.
"""

from __future__ import annotations

import importlib
import platform
import re
import shutil
import warnings
from importlib import metadata
from pathlib import Path

from .machine import EVERY, Finding

CHECKOUT = Path(__file__).resolve().parents[3]
COMPILER = {
    "Linux": "Install one (on Debian and Ubuntu: sudo apt install g++), or name yours: CXX=clang++.",
    "Darwin": "Apple's has no OpenMP. Install another, brew install gcc, and name it, such as CXX=g++-15.",
    "Windows": "Run the book in WSL, and install g++ there.",
}


def installed_version(name: str) -> str | None:
    """A package's installed version; None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def requirements() -> list[Finding]:
    """The installed versions against the ranges of the installed package lora2qlora."""
    from packaging.requirements import Requirement

    found, good = [], 0
    for text in metadata.requires("lora2qlora") or []:
        needed = Requirement(text)
        meant = needed.marker is None or needed.marker.evaluate({"extra": ""})
        serves = not meant and needed.marker.evaluate({"extra": "serve"})
        if not meant and not serves:
            continue
        version = installed_version(needed.name)
        if version and needed.specifier.contains(version, prereleases=True):
            good += 1
            continue
        there = f"{needed.name} {version} is outside {needed.specifier}"
        said = there if version else f"{needed.name} is not installed"
        chapters = ("16",) if serves else EVERY
        found.append(Finding(said, f'pip install "{needed.name}{needed.specifier}"', chapters))
    return [Finding(f"{good} packages are in the ranges that the book asks for"), *found]


def pins(checkout: Path = CHECKOUT) -> list[Finding]:
    """The installed versions against the pins of environment.yml, where there is a checkout."""
    from packaging.markers import Marker

    if not (checkout / "environment.yml").is_file():
        return [Finding("no environment.yml here, so no exact versions to compare with")]
    text = (checkout / "environment.yml").read_text(encoding="utf-8")
    listed = re.findall(r"^ +- ([\w.-]+)==([^\s;]+)(?:; *(.+))?$", text, re.M)
    listed = [(name, pin) for name, pin, marker in listed if not marker or Marker(marker).evaluate()]
    other = []
    for name, pin in listed:
        version = installed_version(name) or "none"
        if version.partition("+")[0] != pin:
            other.append(f"{name} {version} for {pin}")
    said = f"{len(listed) - len(other)} of {len(listed)} packages are exactly as pinned in environment.yml"
    if not other:
        return [Finding(said)]
    several = ", ".join(other[:4]) + (f" and {len(other) - 4} more" if len(other) > 4 else "")
    advice = "Last digits of outputs may differ from the book's; make setup installs the exact versions."
    return [Finding(f"{said}; not {several}", advice)]


def libraries() -> list[Finding]:
    """That the heavy packages import, and that bitsandbytes quantizes four numbers and back."""
    found = []
    for name in ("torch", "transformers", "datasets", "peft", "bitsandbytes"):
        try:
            importlib.import_module(name)
        except Exception as error:
            said = f"{name} cannot be imported: {type(error).__name__}: {first_line(error)}"
            found.append(Finding(said, f"pip install --force-reinstall {name}", EVERY))
    if found:
        return found
    found += [torchao(), nf4_finding()]
    return [Finding("torch, transformers, datasets, PEFT and bitsandbytes import"), *filter(None, found)]


def torchao() -> Finding | None:
    """PEFT refuses to adapt anything beside an old torchao, such as Colab's."""
    from peft.import_utils import is_torchao_available

    try:
        is_torchao_available()
    except ImportError as error:
        said = f"PEFT refuses the installed torchao: {first_line(error)}"
        return Finding(said, "pip uninstall torchao (no chapter uses it)", EVERY)
    return None


def nf4_finding() -> Finding | None:
    """That bitsandbytes quantizes four numbers to NF4 and back."""
    import torch
    from bitsandbytes import functional

    weight = torch.tensor([-1.0, 0.0, 0.5, 1.0]).repeat(16)
    try:
        back = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4"))
        got = back.flatten()[:4].tolist()
    except Exception as error:
        got = f"{type(error).__name__}: {first_line(error)}"
    else:
        if torch.allclose(back.flatten(), weight, atol=0.15):
            return None
    said = f"bitsandbytes should give about -1, 0, 0.5, 1 in NF4, and gives {got}"
    return Finding(said, "pip install --force-reinstall bitsandbytes", EVERY)


def compiler() -> Finding:
    """That a C++ compiler makes the fast kernels of chapter 14."""
    from lora2qlora.fast.library import load_library

    load_library.cache_clear()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        if load_library() is not None:
            return Finding("a C++ compiler builds the kernels of chapter 14")
    reason = str(heard[-1].message).partition(": ")[2]
    return Finding(reason, COMPILER.get(platform.system(), COMPILER["Linux"]), ("14",))


def gpu() -> Finding:
    """The GPU, if torch sees one, and whether it multiplies and has bf16 in hardware."""
    import torch

    from .profiles import choose_profile, compute_dtype

    try:
        profile = choose_profile()
    except ValueError as error:
        return Finding(str(error), "Unset LORA2QLORA_PROFILE.", EVERY)
    if not torch.cuda.is_available():
        said = 'no GPU that torch can use: chapters run in the profile "cpu"'
        if shutil.which("nvidia-smi"):
            return Finding(said, "There is an NVIDIA driver: install a torch with CUDA, see pytorch.org.")
        return Finding(said)
    card = torch.cuda.get_device_properties(0)
    said = f'{card.name}, {card.total_memory / 1e9:.1f} GB: chapters run in the profile "{profile}"'
    try:
        torch.ones(8, 8, device="cuda:0").mm(torch.ones(8, 8, device="cuda:0")).sum().item()
    except RuntimeError as error:
        advice = 'Install a torch made for this card, or hide the card: CUDA_VISIBLE_DEVICES="".'
        return Finding(f"{said}, but it cannot multiply: {first_line(error)}", advice, EVERY)
    if compute_dtype() != torch.bfloat16:
        advice = "Chapter 13 says what to train in instead; its code chooses by itself."
        return Finding(f"{said}. It has no bf16 in hardware", advice)
    return Finding(f"{said}. It has bf16")


def first_line(error: Exception) -> str:
    """The first line of what an error says, cut to a hundred letters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
