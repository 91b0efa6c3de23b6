"""What the machine allows: the book's three sizes, the device, the dtype to compute in."""

from __future__ import annotations

import os

import torch


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
