"""An adapter's folder as a GGUF that llama.cpp puts over a base model. Chapter 16."""

import copy
import os
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFWriter

from lora2qlora.serving.folders import read_adapter
from lora2qlora.serving.gguf_file import write_gguf
from lora2qlora.serving.gguf_names import gguf_name, in_llama_cpp_order
from lora2qlora.serving.gguf_shape import check_config


def export_adapter(directory: str | os.PathLike, base_config, path: str | os.PathLike) -> None:
    """Export an adapter saved by `save_adapter` or PEFT to a GGUF file in float32, completely or not at all.

    `base_config` is the config of the model that it is for (model.config). llama.cpp's update is
    scale · (alpha / r) · B A, with one alpha for all modules and a `scale` that the user chooses. So alpha
    becomes the largest rank R, and each B is multiplied by α / R: rsLoRA and the alphas and ranks of single
    modules are kept, and scale 1 is the adapter as it was trained. The rows of B for q and k are put in
    llama.cpp's order.

    Raises ValueError: the adapter is for another base, or is not plain LoRA (DoRA, whole modules, biases, new
    tokens); the message names the option. OSError: there is no adapter, or the disk is full. llama.cpp's own
    converter ignores rsLoRA and patterns, and writes the base's path into the file. Chapter 16.
    """
    check_config(base_config)
    found = read_adapter(_without_numbers(base_config), directory)
    largest = max(rank for rank, *_ in found.values())
    tensors = {}
    for name, (_, alpha, A, B) in found.items():
        B = B * (alpha / largest)
        if not B.isfinite().all():
            raise ValueError(f"{name}: alpha {alpha} takes lora_B beyond the range of float32")
        tensors[f"{gguf_name(name)}.weight.lora_a"] = A.numpy()
        tensors[f"{gguf_name(name)}.weight.lora_b"] = in_llama_cpp_order(B.numpy(), name, base_config)
    shapes = {name: (tensor.shape, GGMLQuantizationType.F32) for name, tensor in tensors.items()}

    def add_keys(writer: GGUFWriter) -> None:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", largest)

    write_gguf(Path(path), base_config.model_type, add_keys, shapes, tensors.values())


def _without_numbers(base_config) -> torch.nn.Module:
    """The base without numbers: names and shapes alone."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(base_config))
