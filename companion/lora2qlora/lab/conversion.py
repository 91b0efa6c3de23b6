"""A model out of a GGUF file: what it must be, whatever versions converted it."""

from __future__ import annotations

import hashlib

import torch

# Digits, white space, letters beyond ASCII, special tokens and code: where tokenizers come apart.
TEXTS = (
    "The capital of France is Paris.",
    "I'll pay $1,234.56 on 2024-02-29!",
    "  two  spaces,\n\na blank line\tand a tab ",
    "Zürich 1862, naïve — “quoted” 🐋 日本語",
    "<|im_start|>user\nHi<|im_end|>\n",
    "def f(x):\n    return x**2",
)


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
