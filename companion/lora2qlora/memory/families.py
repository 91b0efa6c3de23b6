"""What families of models do otherwise than a Llama, as far as a step's bytes tell. Chapter 11."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """The form of a block, and of what stands before and behind all blocks."""

    norms: str = "before"  # RMSNorm "before" attention and MLP, "after" them, or "both"
    norm: str = (
        "cast"  # its product is "cast" before the weight multiplies it, or stays "wide"; or "shifted":
    )
    # wide, and the weight counts from 1
    head_norm: str = ""  # q and k are normed by "head", or over their whole "width"
    fused: bool = False  # one layer for q, k and v, one for gate and up
    wide_angles: bool = False  # rotary positions in float32
    scaled: str = ""  # the "embedding" is multiplied by a number, or "all": also branches and logits
    far: int | None = None  # every such layer reaches over the whole length, by angles of its own


FORMS = {
    "llama": Form(),
    "qwen3": Form(head_norm="head"),
    "phi3": Form(fused=True),
    "olmo2": Form(norms="after", norm="wide", head_norm="width", wide_angles=True),
    "gemma3": Form(norms="both", norm="shifted", head_norm="head", scaled="embedding", far=6),
    "granite": Form(scaled="all"),
}
# The model types of transformers, and the form that each has, tensor for tensor.
FAMILIES = {
    "llama": "llama",
    "mistral": "llama",
    "ministral": "llama",
    "cwm": "llama",
    "qwen2": "llama",
    "smollm3": "llama",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "gemma3_text": "gemma3",
    "granite": "granite",
}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
