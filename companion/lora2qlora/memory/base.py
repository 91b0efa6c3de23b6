"""The shape of a base model, read off its config."""

from torch import nn

from lora2qlora.adapters import count_parameters
from lora2qlora.lora import is_linear
from lora2qlora.memory.config import Source, read_config
from lora2qlora.memory.families import FAMILIES
from lora2qlora.memory.shape import LlamaShape


def shape_of(source: Source) -> LlamaShape:
    """The LlamaShape of a base model, of its config, or of the dict or path of its config.json.

    Of a nested config it is that of the part for text. A model need not hold any numbers.

    Raises ValueError: it is of another family, or has what no such shape has; its attention is not sdpa; a
    model with other parameters (adapters already, say), or quantized already; TypeError: no causal language
    model; OSError: no such file.
    """
    try:
        config = read_config(source)
    except TypeError as error:
        raise TypeError(f"need a LlamaShape or a Llama-like model: {error}") from error
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{type(source).__name__} is of type {config.model_type!r}, the ledger knows the block of "
            f"{tuple(FAMILIES)}: simulate_step takes any causal model"
        )
    check_config(config)
    form = FAMILIES[config.model_type]
    shape = LlamaShape(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        kv_heads=config.num_key_value_heads,
        head_size=getattr(config, "head_dim", None),
        tied=config.tie_word_embeddings,
        form=form,
        biases=biases(config),
        unturned=unturned(config),
        window=config.sliding_window if slides(config) else None,
    )
    if isinstance(source, nn.Module):
        check_base(source, shape)
    return shape


def biases(config) -> tuple[str, ...]:
    """The linear layers that have a bias."""
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    if config.model_type == "qwen2":
        return attention[:3]
    if FAMILIES[config.model_type] == "phi3":
        return ()
    found = attention * bool(getattr(config, "attention_bias", False))
    return found + mlp * bool(getattr(config, "mlp_bias", False))


def unturned(config) -> int | None:
    """Every which layer has no rotary positions; ValueError where they come in no such order."""
    turned = getattr(config, "no_rope_layers", None)  # so named, and 1 where there are some
    if not turned or all(turned):
        return None
    every = turned.index(0) + 1
    if list(turned) != [int(i % every != 0) for i in range(1, len(turned) + 1)]:
        raise ValueError(
            f"layers without rotary positions must come evenly, got {turned}: simulate_step takes any order"
        )
    return every


def slides(config) -> bool:
    """Whether attention slides a window in some layer."""
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    sees_all = config.model_type in ("llama", "olmo2", "granite")  # whatever the config says
    return bool(window) and not sees_all and (not kinds or "sliding_attention" in kinds)


def check_config(config) -> None:
    """ValueError where a model of a family known does something that the ledger does not count."""
    parts = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    activation = getattr(config, "hidden_act", None) or config.hidden_activation
    odd = {
        "partial_rotary_factor": parts if parts != 1.0 else None,
        "hidden_act": activation if activation not in ("silu", "gelu", "gelu_pytorch_tanh") else None,
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        "use_bidirectional_attention": getattr(config, "use_bidirectional_attention", None),
    }
    dropped = ("attention_dropout", "resid_pdrop", "embd_pdrop")
    odd |= {name: getattr(config, name, None) for name in dropped}
    if found := {name: value for name, value in odd.items() if value}:
        raise ValueError(f"the ledger does not count {found} of {config.model_type}: simulate_step does")


def check_base(model: nn.Module, shape: LlamaShape) -> None:
    """ValueError unless a model takes the bytes of its shape, as `shape_of` says."""
    name = type(model).__name__
    attention = getattr(model.config, "_attn_implementation", None)
    if attention != "sdpa":
        raise ValueError(f"{name} has {attention!r} attention, need 'sdpa': set_attn_implementation('sdpa')")
    if (counted := count_parameters(model).total) != shape.parameters:
        raise ValueError(
            f"{name} has {counted:,} parameters, a Llama of its sizes {shape.parameters:,}: "
            "pass the base model, before adapters, or a LlamaShape"
        )
    linears = (module for module in model.modules() if is_linear(module))
    if (other := next((m for m in linears if type(m) is not nn.Linear), None)) is not None:
        raise ValueError(
            f"{name} has linear layers of type {type(other).__name__}, need nn.Linear: "
            "pass the base model, before it is quantized, or a LlamaShape"
        )
