"""A GGUF file becomes a safetensors model in the cache: whole and the right one, or not at all.

transformers reads GGUF in half a minute and will not save what it read; we convert once to safetensors in
float32, which holds every dequantized value exactly, and load from there in a second. Older versions of
transformers give the same weights with another tokenizer, without a word: so what was written is read back
and held against the source's fingerprint.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from filelock import FileLock

from .cache import (
    RIGHT_SINCE,
    UPGRADE,
    ConversionError,
    cache_directory,
    converted_by,
    explain_cache_error,
    is_complete,
    is_right,
    mark_complete,
    versions,
)
from .sources import SMOLLM2, ModelSource, package_file, verify_file
from .terminal import notice, quiet_unless_terminal

TEXTS = tuple(SMOLLM2["ids"])


def fingerprint(model, tokenizer) -> dict:
    """What must not drift: a plain dict that JSON holds, equal where model and tokenizer are the same.

    `eos`, `pad`: the tokenizer's tokens; `eos_id`, `pad_id`: theirs, `stop_id`: what ends generation;
    `ids`: token ids by text, for each of TEXTS; `weights`: SHA-256 over the parameters in the order of
    their names, each as name, dtype, shape and bytes (a tied one counts once).
    """
    return {
        "eos": tokenizer.eos_token,
        "eos_id": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token,
        "pad_id": tokenizer.pad_token_id,
        "stop_id": model.generation_config.eos_token_id,
        "ids": {text: tokenizer(text)["input_ids"] for text in TEXTS},
        "weights": hash_weights(model),
    }


def hash_weights(model) -> str:
    """SHA-256 of a model's parameters: not of a file, whose order and header are its writer's."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        tensor = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def differences(got: Mapping, expected: Mapping) -> list[str]:
    """In words, where a fingerprint is not the expected one; texts that are not expected do not count."""

    def flat(values):
        ids = {f"the ids of {text!r}": found for text, found in values["ids"].items()}
        return {key: value for key, value in values.items() if key != "ids"} | ids

    got, expected = flat(got), flat(expected)
    pairs = [(what, got.get(what), value) for what, value in expected.items()]
    return [f"{what}: got {found!r}, expected {value!r}" for what, found, value in pairs if found != value]


def find_package_model(source: ModelSource) -> Path | None:
    """The directory of the converted model, converting it first if need be; None: ask the Hub."""
    if source.package is None:
        return None
    directory = cache_directory() / f"{Path(source.file).stem}-{source.sha256[:12]}"
    if is_complete(directory):
        return directory
    gguf = package_file(source)
    if gguf is None:
        return None
    return convert_gguf(gguf, source.sha256, directory, source.command, source.fingerprint)


def convert_gguf(
    gguf: Path, sha256: str, directory: Path, command: str = "", expected: Mapping | None = None
) -> Path:
    """Convert a GGUF file to a safetensors model in `directory`; the directory appears whole or not.

    Work happens in a neighbouring directory that is renamed at the end, under a lock: a second process
    waits and finds the result; what an interrupted one left is removed by the next.

    Raises OSError: the file is missing or its SHA-256 differs, or the cache cannot be written; and
    ConversionError, an OSError: transformers is too old or fails, or the result has not the `expected`
    fingerprint.
    """
    verify_file(gguf, sha256, command)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(directory) + ".lock"):
            if not is_complete(directory):
                _convert(gguf, directory, expected)
    except Exception as error:  # a full disk is a SafetensorError or a bare Exception in libraries of Rust
        explained = explain_cache_error(error, directory.parent)
        if explained is error:
            raise
        raise explained from error
    return directory


def _convert(gguf: Path, directory: Path, expected: Mapping | None) -> None:
    """Convert, compare, rename; the lock is held. Whatever happens, nothing half done stays."""
    if not is_right(versions()["transformers"]):
        raise ConversionError(
            f"{converted_by()}: below transformers {RIGHT_SINCE} the tokenizer of {gguf.name} comes out "
            f"wrong. {UPGRADE}"
        )
    partial = directory.with_name(directory.name + ".partial")
    if directory.exists():
        notice(f"{directory} is not whole, or older software made it: converting {gguf.name} again")
    for leftover in (partial, directory):
        if leftover.exists():
            shutil.rmtree(leftover)
    try:
        with quiet_unless_terminal():
            write_model(gguf, partial)
            wrong = differences(_read_back(partial), expected) if expected is not None else []
        if wrong:
            raise ConversionError(
                f"{converted_by()} made another model of {gguf.name} than the one meant; nothing of it is "
                "kept.\n" + "\n".join([*wrong, UPGRADE])
            )
        mark_complete(partial)
        os.replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # there is none after the rename


def write_model(gguf: Path, directory: Path) -> None:
    """Read a GGUF through transformers and write config, tokenizer and float32 safetensors."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain float32 by now; the config still says gguf, and save_pretrained refuses.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.config._name_or_path = model.name_or_path = ""
    directory.mkdir(parents=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _read_back(directory: Path) -> dict:
    """The fingerprint of what was written: a tokenizer can be right in memory and wrong in its files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(str(directory), use_safetensors=True, dtype=torch.float32)
    return fingerprint(model, AutoTokenizer.from_pretrained(str(directory)))
