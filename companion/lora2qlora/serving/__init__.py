"""Serving: a model and its adapters as files of llama.cpp. Chapter 16."""

from lora2qlora.serving.gguf import export_adapter, export_model

__all__ = ["export_adapter", "export_model"]
