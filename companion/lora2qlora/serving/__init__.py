"""Serving: files for llama.cpp, its server, and many adapters in one batch. Chapter 16."""

from lora2qlora.serving.batched import BatchedLoRALinear, load_adapters, use_adapters
from lora2qlora.serving.gguf import export_adapter, export_model
from lora2qlora.serving.server import chat, post, serve

__all__ = [  # noqa: RUF022 (in the order in which one meets them)
    "export_model", "export_adapter",
    "serve", "chat", "post",
    "BatchedLoRALinear", "load_adapters", "use_adapters",
]  # fmt: skip
