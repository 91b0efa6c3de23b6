"""The record of `make drift`: what it keeps of a stack, where it is stored, and the table on the terminal."""

import datetime
import json
import os
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path

from drift_checks import Result, planned
from drift_stacks import Stack

MAIN = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes", "gguf", "accelerate", "datasets")
MAIN += ("huggingface-hub", "safetensors", "numpy", "pyarrow", "matplotlib", "jaxtyping", "filelock")
MAIN += ("packaging", "tqdm", "torchao")
ASKS = """
import importlib.metadata as m, json, platform, sys
have = {d.name.lower().replace("_", "-"): d.version for d in m.distributions()}
print(json.dumps({"python": platform.python_version(), **{n: have[n] for n in sys.argv[1:] if n in have}}))
"""


def entry(stack: Stack, python: str, results: dict[str, Result]) -> dict:
    """What the record keeps of a stack, as plain JSON; `python` is "" where none could be built."""
    versions = {}
    if python:
        said = subprocess.run([python, "-c", ASKS, *MAIN], capture_output=True, text=True, check=True)
        versions = json.loads(said.stdout)
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.system()} {platform.machine()}",
        "requirements": list(stack.requirements),
        "versions": versions,
        "checks": {
            name: asdict(result) | {"seconds": round(result.seconds)} for name, result in results.items()
        },
    }


def store(record: dict[str, dict], path: Path) -> None:
    """Put these stacks into the record at `path`, which keeps the others; whole or not at all."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(before | record, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def line(stack: str, name: str, result: dict) -> str:
    """One row of the table: stack, check, how it ended, minutes, pytest's count or the first error."""
    said = "passed" if result["passed"] else "FAILED"
    return f"{stack:8} {name:13} {said} {result['seconds'] / 60:5.1f} min  {result['note']}".rstrip()


def table(record: dict[str, dict]) -> str:
    """Stack by check."""
    return "\n".join(
        line(stack, name, result) for stack in record for name, result in record[stack]["checks"].items()
    )


def problems(record: dict[str, dict], asked: list[Stack]) -> list[str]:
    """Each check of each stack asked for that did not pass, or of which the record knows nothing."""
    found = []
    for stack in asked:
        have = record.get(stack.name, {}).get("checks", {})
        for name in planned(stack.by_cell):
            result = have.get(name, {"passed": False, "note": "not run"})
            if result["passed"] is not True:
                found.append(f"{stack.name}: {name}: {result['note']}")
    return found
