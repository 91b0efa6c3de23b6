"""lab.sources: models are known by name, and their files by their sums."""

import importlib.util
from pathlib import Path

from lora2qlora.lab import sources


def test_the_commands_in_messages_are_those_that_setup_runs():
    found = [sources.MODELS["smollm2-135m"], sources.FP32_WEIGHTS["minilm"]]
    packages = " ".join(source.command.split()[-1] for source in found)
    assert f"# no-deps: {packages}\n" in Path("environment.yml").read_text(encoding="utf-8")
    assert all(importlib.util.find_spec(source.package) for source in found)
