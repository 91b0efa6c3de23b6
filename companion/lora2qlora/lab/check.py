"""`python -m lora2qlora.lab.check`: can this machine run the book? In words, in under 20 seconds.

Each line is a finding; where something is wrong, the next says what to do and which chapters cannot run.
The exit status is 0 where all of the book runs, else 1. Nothing is installed, downloaded or written.
"""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

from . import installed, machine
from .machine import EVERY, Finding, named

# The chapters that load a model; a test holds them to the notebooks.
SMOLLM2 = ("00", "01", "02", "03", "04", "05", "09", "10", "13", "16", "18", "20a", "20b")
MINILM = ("01", "06", "07", "08")
STEPS = 5


def book() -> Finding:
    """The package itself, as installed, and the Python that it asks for."""
    try:
        found = metadata.distribution("lora2qlora")
    except metadata.PackageNotFoundError:
        advice = "In a checkout run make setup; on Colab run the first code cell of a chapter."
        return Finding("the package lora2qlora is not installed", advice, EVERY)
    python = machine.python(found.metadata["Requires-Python"])
    return Finding(f"lora2qlora {found.version}, {python.said}", python.advice, python.chapters)


def models() -> list[Finding]:
    """SmolLM2 and MiniLM: their packages, whole, or SmolLM2 converted before or from the Hub."""
    from .models import hub_folder
    from .sources import FP32_WEIGHTS, MODELS, package_file, verify_file

    smol, mini = MODELS["smollm2-135m"], FP32_WEIGHTS["minilm"]
    found = []
    for name, source, chapters in (("SmolLM2-135M", smol, SMOLLM2), ("MiniLM", mini, MINILM)):
        path = package_file(source)
        try:
            if path is None:
                there = name != "MiniLM" and hub_folder(source.hub)
                said = f"{name} is there, in the Hub's cache" if there else f"{name} is not installed"
                found.append(Finding(said) if there else Finding(said, source.command, chapters))
                continue
            verify_file(path, source.sha256, source.command)
            found.append(Finding(f"{name} is there, {path.stat().st_size / 1e6:.0f} MB, and whole"))
        except OSError as error:
            found.append(Finding(str(error), f"{source.command} --force-reinstall", chapters))
    return found


def room() -> list[Finding]:
    """Disk: enough to convert SmolLM2 once, unless it is there."""
    from .cache import cache_directory, is_complete
    from .sources import MODELS

    source, cache = MODELS["smollm2-135m"], cache_directory()
    converted = is_complete(cache / f"{Path(source.file).stem}-{source.sha256[:12]}")
    return machine.disk(cache, converted, SMOLLM2)


def training() -> Finding:
    """Five steps of QLoRA on the small model that comes with the package; the loss must fall."""
    import torch

    from lora2qlora.adapters import add_lora
    from lora2qlora.qlora import quantize_base

    from .batches import collate, encode_rows
    from .models import load_small_lm
    from .profiles import default_device
    from .tasks import load_task
    from .training import train

    try:
        model, tokenizer = load_small_lm()
        quantize_base(model, compute_dtype=torch.float32)
        add_lora(model, "all-linear", rank=8, alpha=16)
        model.to(default_device())
        rows = sorted(encode_rows(load_task("spam"), tokenizer, "train", 16), key=lambda r: len(r["labels"]))
        batch = collate(rows[:4], tokenizer.pad_token_id)  # the shortest, so that it takes a second
        losses = [record.loss for record in train(model, [batch] * STEPS, STEPS, 1e-2)]
    except Exception as error:
        said = f"training the small model stopped: {type(error).__name__}: {error}"
        return Finding(said, "Mend what stands above; if nothing does, reinstall lora2qlora.", EVERY)
    fell = f"loss {losses[0]:.2f} to {losses[-1]:.2f}"
    said = f"{STEPS} steps of QLoRA on the small model, on {default_device()}: {fell}"
    if not all(map(math.isfinite, losses)) or losses[-1] >= losses[0]:
        return Finding(f"{said}, which must fall", "Report it with all of this output.", EVERY)
    return Finding(said)


PROBES = (
    book, machine.cores, machine.memory, room, installed.requirements, installed.pins, installed.libraries,
    installed.compiler, installed.gpu, models, training,
)  # fmt: skip


def tried(probe: Callable) -> list[Finding]:
    """What a probe found; what stops the probe itself is a finding too."""
    try:
        found = probe()
    except Exception as error:
        said = f"the check of {probe.__name__} stopped: {type(error).__name__}: {error}"
        return [Finding(said, "Mend what stands above; if nothing does, report it with this output.", EVERY)]
    return [found] if isinstance(found, Finding) else found


def lines(finding: Finding) -> str:
    """A finding as it is printed."""
    kind = "FAIL" if finding.chapters else "note" if finding.advice else "ok"
    text = f"{kind:4}  {finding.said}"
    if finding.advice:
        text += f"\n      What to do: {finding.advice}"
    if finding.chapters:
        text += f"\n      Cannot run: {named(finding.chapters)}."
    return text


def main(probes: Iterable[Callable] = PROBES) -> int:
    """Print what each probe finds as it finds it, then the verdict; 0 where all of the book runs, else 1."""
    print(f"Can this machine run the book? {platform.platform()}", flush=True)
    blocked = []
    for probe in probes:
        for finding in tried(probe):
            print(lines(finding), flush=True)
            blocked += finding.chapters
    spent = os.times()
    seconds = spent.user + spent.system + spent.children_user + spent.children_system
    print(f"\nThe check took {seconds:.0f} s of processor time.")
    if blocked:
        others = "" if set(EVERY) <= set(blocked) else " All the others can."
        print(f"This machine cannot run {named(blocked)} as it is: see FAIL above.{others}")
    else:
        print("This machine can run the whole book.")
    return 1 if blocked else 0


if __name__ == "__main__":
    sys.exit(main())
