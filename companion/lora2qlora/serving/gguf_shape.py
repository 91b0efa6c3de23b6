"""What a GGUF says about a model's shape, and the models whose shape it can say. Chapter 16."""

import torch
from gguf import GGUFWriter
from jaxtyping import Float
from torch import Tensor

from lora2qlora.serving.gguf_names import FAMILIES


def check_config(config) -> None:
    """ValueError unless llama.cpp computes what transformers computes for such a config."""
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise ValueError(
            f"a GGUF is written here for {', '.join(FAMILIES)} alone, got model type {kind!r:.80}"
        )
    rope = config.rope_parameters
    ropes = ("default", "llama3") if kind == "llama" else ("default",)
    refused = {
        "hidden_act": config.hidden_act not in ("silu", "swish"),
        "rope_parameters": rope["rope_type"] not in ropes or rope.get("partial_rotary_factor", 1) != 1,
        "layer_types": set(getattr(config, "layer_types", None) or ()) - {"full_attention"},
    }
    if wrong := [name for name, is_wrong in refused.items() if is_wrong]:
        named = ", ".join(f"{name}={getattr(config, name)!r:.120}" for name in wrong)
        raise ValueError(
            f"llama.cpp's {kind} would compute something else than this model, which has {named}: it "
            f"takes hidden_act silu, rotary embedding of whole heads, {' or '.join(ropes)}, full attention"
        )


def write_shape(writer: GGUFWriter, config, rows: int) -> None:
    """Add the keys that say what layers there are; `rows` [tokens] is the height of the embedding."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_size(config))
    writer.add_vocab_size(rows)


def head_size(config) -> int:
    """How many numbers a head's query has."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_factors(config) -> Float[Tensor, " half_head"] | None:
    """By what llama.cpp divides each angle of the rotary embedding; None where that is one everywhere.

    Llama 3.1's scaling to long contexts: its frequencies, as transformers has them, against those without.
    """
    if config.rope_parameters["rope_type"] == "default":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, device="cpu")
    size = head_size(config)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (plain / scaled).float()
