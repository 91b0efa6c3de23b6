"""The kinds of adapter in the table of conformance: small models and what PEFT saves over them.

An adapter here is trained by chance: everything that PEFT would train is moved by noise, and then saved.
"""

import copy
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, get_peft_model
from served import SHAPE, random_weights
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

# Heads of 32 numbers, as vLLM has no smaller ones on a CPU; rows of whole blocks of 64, as bitsandbytes 0.50
# dequantizes others wrongly there.
SMALL = SHAPE | {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 128}
MOE = SMALL | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32}
BIASES = {"attention_bias": True, "mlp_bias": True}
NEW = [2060, 2061, 2062]  # ids that stand in the prompts and in no text
MORE = 8  # rows that a resized embedding has more
STD = 0.05


@dataclass(frozen=True)
class Kind:
    """`config` is the base model's, `options` are PEFT's beyond rank, alpha and targets."""

    config: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    is_resized: bool = False
    is_moe: bool = False


TIED = {"tie_word_embeddings": True}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 12}, "alpha_pattern": {"up_proj": 40}}
EXPERTS = ["mlp.experts.gate_up_proj"]  # one: PEFT writes several in any order
KINDS = {
    "plain LoRA": Kind(),
    "rsLoRA": Kind(options={"use_rslora": True}),
    "rank and alpha patterns": Kind(options=PATTERNS),
    "some layers (`layers_to_transform`)": Kind(options={"layers_to_transform": [1]}),
    "DoRA": Kind(options={"use_dora": True}),
    'biases, `bias="lora_only"`': Kind(BIASES, {"bias": "lora_only", "target_modules": ["q_proj", "v_proj"]}),
    'biases, `bias="all"`': Kind(BIASES, {"bias": "all", "target_modules": ["q_proj", "v_proj"]}),
    "new tokens (`trainable_token_indices`)": Kind(TIED, {"trainable_token_indices": NEW}),
    "new tokens, embedding saved whole": Kind(is_resized=True),
    "head saved whole (`modules_to_save`)": Kind(options={"modules_to_save": ["lm_head"]}),
    "tied head saved whole (`modules_to_save`)": Kind(TIED, {"modules_to_save": ["lm_head"]}),
    "LoRA on a tied head": Kind(TIED, {"target_modules": [*LINEAR, "lm_head"]}),
    "experts (`target_parameters`)": Kind(
        options={"target_modules": ["q_proj"], "target_parameters": EXPERTS}, is_moe=True
    ),
}


def base_model(kind: Kind, rows: int = 0) -> nn.Module:
    """The base: always the same numbers, except for the new rows of a resized one, drawn with this seed."""
    torch.manual_seed(0)
    if kind.is_moe:
        return random_weights(Qwen3MoeForCausalLM(Qwen3MoeConfig(**MOE | kind.config)))
    model = random_weights(LlamaForCausalLM(LlamaConfig(**SMALL | kind.config)))
    if kind.is_resized:
        torch.manual_seed(rows)
        model.resize_token_embeddings(SMALL["vocab_size"] + MORE, mean_resizing=False)
    return model


def trained(kind: Kind, base: nn.Module, directory, seed: int = 0) -> nn.Module:
    """PEFT's model over a copy of this base, as trained and saved to this folder."""
    options = {"r": 8, "lora_alpha": 16, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **kind.options}
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(STD * torch.randn_like(parameter))
    model.save_pretrained(str(directory), save_embedding_layers=kind.is_resized)
    return model


def prompts(kind: Kind) -> list[list[int]]:
    """Three rows of token ids, each with new tokens in it."""
    ids = torch.randint(3, 2048, (3, 12), generator=torch.Generator().manual_seed(1))
    ids[:, 4], ids[:, 9] = torch.tensor(NEW), torch.tensor(NEW[::-1])
    if kind.is_resized:
        ids[:, 6] = torch.arange(SMALL["vocab_size"], SMALL["vocab_size"] + 3)
    return ids.tolist()
