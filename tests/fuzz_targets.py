"""All targets, in the order in which seeds go round them."""

from pathlib import Path

from fuzz_adapters import adapter_targets
from fuzz_lab import lab_targets
from fuzz_patterns import pattern_targets
from fuzz_states import state_targets


def all_targets(folder: Path) -> dict:
    """Every target by its name: a function of a Random that gives a Trial. The folder is theirs."""
    folder.mkdir(parents=True, exist_ok=True)
    return adapter_targets(folder) | state_targets(folder) | lab_targets(folder) | pattern_targets(folder)
