"""A task of a few short rows, and a model of one layer to go with it."""

from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class ToyTask:
    train: Dataset
    test: Dataset
    name: str = "toy"
    max_answer_tokens: int = 4

    def prompt(self, text):
        return f"{text}:"

    def metric(self, predictions, targets):
        right = sum(p == t for p, t in zip(predictions, targets, strict=True))
        return {"accuracy": right / len(targets)}


def toy_task(rows: int = 12) -> ToyTask:
    data = Dataset.from_dict(
        {"input": [f"word {i}" for i in range(rows)], "target": ["yes", "no"] * (rows // 2)}
    )
    return ToyTask(train=data, test=data)


def toy_model():
    """A Llama with the byte vocabulary of tiny_gguf, in eval mode; the same numbers every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        pad_token_id=2,
        eos_token_id=2,
        bos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()
