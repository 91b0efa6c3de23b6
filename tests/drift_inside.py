"""Checks of `make drift` that run inside a stack: `python tests/drift_inside.py cell|imports|fingerprint`."""

import importlib
import importlib.metadata
import json
import pkgutil
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXPECTED = Path(__file__).parent / "stacks" / "fingerprint.json"


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
    """Convert the model into an empty cache, and compare what came out with the expected one."""
    from lora2qlora.lab.conversion import fingerprint as taken
    from lora2qlora.lab.models import load_base_model

    got = json.loads(json.dumps(taken(*load_base_model())))
    expected = json.loads(EXPECTED.read_text(encoding="utf-8"))
    wrong = [key for key in expected.keys() | got.keys() if expected.get(key) != got.get(key)]
    assert not wrong, "; ".join(
        f"{key} is {got.get(key)}, expected {expected.get(key)}" for key in sorted(wrong)
    )
    print(json.dumps(got, indent=1))


if __name__ == "__main__":
    {"cell": cell, "imports": imports, "fingerprint": fingerprint}[sys.argv[1]](*sys.argv[2:])
