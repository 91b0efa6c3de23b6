"""Checks of `make drift` that run inside a stack: `python tests/drift_inside.py cell|imports|fingerprint`."""

import importlib
import importlib.metadata
import pkgutil
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def cell(source: str) -> None:
    """Run the Colab cell as Colab would; AssertionError where it moved torch or left what it must not."""
    from drift_stacks import colab_cell
    from IPython.core.interactiveshell import InteractiveShell

    torch = importlib.metadata.version("torch")
    sys.modules["google.colab"] = types.ModuleType("google.colab")
    InteractiveShell.instance().run_cell(colab_cell(ROOT, Path(source))).raise_error()
    installed = {found.name: found.version for found in importlib.metadata.distributions()}
    assert "lora2qlora" in installed, "the cell installed no lora2qlora"
    assert installed["torch"] == torch, f"the cell moved torch from {torch} to {installed['torch']}"
    assert "torchao" not in installed, f"torchao {installed['torchao']} is still there"


def imports() -> None:
    """Import every module of the package."""
    package = importlib.import_module("lora2qlora")
    names = [found.name for found in pkgutil.walk_packages(package.__path__, "lora2qlora.")]
    assert len(names) > 20, f"only {len(names)} modules in {package.__path__}"
    for name in names:
        importlib.import_module(name)
    print(f"{len(names)} modules")


def fingerprint() -> None:
    """Convert the model into an empty cache, and hold what is loaded from there against the expected one."""
    from lora2qlora.lab import conversion
    from lora2qlora.lab.models import MODELS, load_base_model

    cache = conversion.cache_directory()
    assert not cache.exists(), f"{cache} is there already: the model would not be converted"
    got = conversion.fingerprint(*load_base_model())
    assert len(got["ids"]) > 3
    wrong = conversion.differences(got, MODELS["smollm2-135m"].fingerprint)
    assert not wrong, "; ".join(wrong)
    print(got["eos"], got["weights"])


if __name__ == "__main__":
    {"cell": cell, "imports": imports, "fingerprint": fingerprint}[sys.argv[1]](*sys.argv[2:])
