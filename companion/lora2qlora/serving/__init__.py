"""Serving: a model and its adapters as files of llama.cpp, and many adapters in one batch. Chapter 16."""

from lora2qlora.serving.batched import BatchedLoRALinear, load_adapters, use_adapters
from lora2qlora.serving.gguf import export_adapter, export_model

__all__ = ["BatchedLoRALinear", "export_adapter", "export_model", "load_adapters", "use_adapters"]
