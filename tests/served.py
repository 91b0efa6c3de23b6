"""Small models, tokenizers and adapters of every kind that `serving` writes."""

import copy
import json
from functools import cache

import torch
from lora2qlora.lab.models import load_small_lm
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, pre_tokenizers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TEXTS = (
    "Fellow citizens of the Senate", "Call me Ishmael. Some years ago", "The whale",
    "I have the honor to say", "we've 1,234.56 ships;  he'll\tsee 12345\n\n three   more ",
    "Zürich — “naïve” 🐋 ٣٤٥ 12a34", "x\r\n\r\ny  \n z!!?'S",
)  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
SHAPE = {
    "vocab_size": 2080, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "eos_token_id": 0,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(attention_bias=True, mlp_bias=True, **SHAPE)),
    "llama of long heads": lambda: LlamaForCausalLM(LlamaConfig(head_dim=24, **SHAPE)),
    "llama 3": lambda: LlamaForCausalLM(LlamaConfig(rope_parameters=LLAMA3, **SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=32, **SHAPE)),
}


def random_model(kind: str) -> nn.Module:
    """A model of this kind whose every weight matters: large enough for attention to be no mean.

    It says ASCII only, as llama.cpp's server gives no probabilities of half a letter.
    """
    torch.manual_seed(0)
    return random_weights(MODELS[kind]())


def random_weights(model: nn.Module) -> nn.Module:
    """This model in eval mode, with such weights."""
    for name, parameter in model.eval().named_parameters():
        around = 1.0 if "norm" in name else 0.0
        nn.init.normal_(parameter, around, 0.3 if parameter.ndim == 1 else 0.25)
    tokenizer = small_lm()[1]
    unsaid = [i for i in range(2080) if i >= 2048 or not tokenizer.decode([i]).isascii()]
    model.lm_head.weight.data[unsaid] = 0
    return model


@cache
def small_lm() -> tuple:
    """The book's small model and its tokenizer; never changed."""
    return load_small_lm()


def byte_tokenizer(pre: str = "gpt-2") -> PreTrainedTokenizerFast:
    """The small model's tokens and merges and some of digits, with texts first cut as this pre type says."""
    whole = json.loads(small_lm()[1].backend_tokenizer.to_str())
    for token in ("12", "34", "1234", "345", "Ġ1"):
        whole["model"]["vocab"].setdefault(token, len(whole["model"]["vocab"]))
    whole["model"]["merges"] += [["1", "2"], ["3", "4"], ["12", "34"], ["34", "5"], ["Ġ", "1"]]
    if pre == "qwen2":
        model = whole["model"]
        return Qwen2Tokenizer(model["vocab"], [tuple(pair) for pair in model["merges"]])
    whole["model"]["ignore_merges"] = pre == "llama-bpe"
    tokenizer = Tokenizer.from_str(json.dumps(whole))
    tokenizer.pre_tokenizer = {"gpt-2": _by_bytes, "smollm": _by_digits, "llama-bpe": _by_llama_regex}[pre]()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def _by_bytes():
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _by_digits():
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _by_bytes()])


def _by_llama_regex():
    cut = Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(cut, "isolated"), last])


def peft_adapter(model: nn.Module, directory, seed: int = 0, **options):
    """A random adapter over all linears, saved by PEFT; returns PEFT's model, to be asked."""
    torch.manual_seed(seed)
    options = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**options)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.03)
    adapted.save_pretrained(str(directory))
    return adapted
