"""What llama.cpp calls the parts of a model, and in which order it wants the rows of q and k. Chapter 16.

Source: llama.cpp's converters, conversion/llama.py and qwen.py, which transformers and llama.cpp agree with.
"""

import re

import numpy as np
from jaxtyping import Float

# What transformers calls a model's class, by the architecture that both it and llama.cpp name alike.
FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
IN_A_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(module: str) -> str:
    """llama.cpp's name for a module of transformers: blk.3.attn_q for model.layers.3.self_attn.q_proj.

    Raises ValueError: a module that these architectures have not.
    """
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    name = TOP.get(module) or (found and IN_A_LAYER.get(found[2]))
    if not name:
        raise ValueError(
            f"{module} is no part of a {', '.join(FAMILIES)} model: GGUF has no name for it here"
        )
    return f"blk.{found[1]}.{name}" if found else name


def in_llama_cpp_order(
    rows: Float[np.ndarray, "out ..."], module: str, config
) -> Float[np.ndarray, "out ..."]:
    """The rows of a module's weight, bias or lora_B, [out, ...], in the order that llama.cpp expects.

    Rotary embedding turns pairs of numbers. In transformers the pairs of a head are (i, i + d/2). In
    llama.cpp's `llama` they are neighbours, (2i, 2i + 1), so the rows of q and k are permuted head by head.
    Qwen's pairs are those of transformers. Without the permutation a model loads and talks nonsense.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(module.rpartition(".")[2]) if config.model_type == "llama" else None
    if not count:
        return rows
    shape = (count, 2, len(rows) // count // 2, *rows.shape[1:])
    return rows.reshape(shape).swapaxes(1, 2).reshape(rows.shape)
