"""The sizes of a Llama-like model: all of the model that the ledger needs to know."""

from dataclasses import dataclass, fields

from torch import nn

from lora2qlora.adapters import count_parameters
from lora2qlora.blockwise import check_size
from lora2qlora.lora import is_linear

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The model types of transformers whose block is a Llama's, tensor for tensor.
FAMILIES = ("llama", "mistral", "ministral", "cwm")


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama-like model: gated MLP, RMSNorm, rotary positions, no biases."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    kv_heads: int | None = None  # as many as heads unless given
    head_size: int | None = None  # hidden / heads unless given
    tied: bool = False  # the LM head is the embedding

    def __post_init__(self):
        for field in fields(self):
            size = getattr(self, field.name)
            optional = field.name in ("kv_heads", "head_size") and size is None
            if field.name != "tied" and not optional:
                check_size(field.name, size)
        if self.heads % (self.kv_heads or self.heads) or (self.hidden % self.heads and not self.head_size):
            raise ValueError(f"heads must divide hidden, and kv_heads divide heads, got {self}")
        if self.head_dim % 2:
            raise ValueError(f"rotary positions need heads of an even size, got {self.head_dim} in {self}")
        if not isinstance(self.tied, bool):
            raise TypeError(f"tied must be True or False, got {self.tied!r}")

    @property
    def head_dim(self) -> int:
        """Numbers in one head."""
        return self.head_size or self.hidden // self.heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the linear layers of one block, in the order in which they are used."""
        q, kv = self.heads * self.head_dim, (self.kv_heads or self.heads) * self.head_dim
        h, i = self.hidden, self.intermediate
        return dict(zip(LINEARS, [(q, h), (kv, h), (kv, h), (h, q), (i, h), (i, h), (h, i)], strict=True))

    @property
    def parameters(self) -> int:
        """How many parameters such a model has, each counted once."""
        block = sum(out * in_ for out, in_ in self.linears.values()) + 2 * self.hidden
        return self.layers * block + self.hidden + (2 - self.tied) * self.vocabulary * self.hidden


# Published shapes. 175B has GPT-3's width and depth in the form of a Llama.
SHAPES = {
    "SmolLM2-135M": LlamaShape(576, 30, 9, 1536, 49152, kv_heads=3, tied=True),
    "Llama-3.2-1B": LlamaShape(2048, 16, 32, 8192, 128256, kv_heads=8, tied=True),
    "LLaMA-7B": LlamaShape(4096, 32, 32, 11008, 32000),
    "Llama-3.1-8B": LlamaShape(4096, 32, 32, 14336, 128256, kv_heads=8),
    "LLaMA-13B": LlamaShape(5120, 40, 40, 13824, 32000),
    "LLaMA-33B": LlamaShape(6656, 60, 52, 17920, 32000),
    "LLaMA-65B": LlamaShape(8192, 80, 64, 22016, 32000),
    "Llama-2-70B": LlamaShape(8192, 80, 64, 28672, 32000, kv_heads=8),
    "175B": LlamaShape(12288, 96, 96, 32768, 50257),
}


def shape_of(model: nn.Module) -> LlamaShape:
    """The LlamaShape of a base model, by its config; it need not hold any numbers.

    Raises ValueError: it is of another family, its attention is not sdpa, it has other parameters than
    such a shape (biases, say, or adapters already), or is quantized already; TypeError: no model with a
    config that names the sizes of a Llama.
    """
    config = getattr(model, "config", None)
    try:
        shape = LlamaShape(
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            intermediate=config.intermediate_size,
            vocabulary=config.vocab_size,
            kv_heads=config.num_key_value_heads,
            head_size=getattr(config, "head_dim", None),
            tied=config.tie_word_embeddings,
        )
    except AttributeError as error:
        raise TypeError(
            f"need a LlamaShape or a Llama-like model with a config, got {type(model).__name__} ({error})"
        ) from error
    check_base(model, shape)
    return shape


def check_base(model: nn.Module, shape: LlamaShape) -> None:
    """ValueError unless a model takes the bytes of its shape, as `shape_of` says."""
    name, family = type(model).__name__, getattr(model.config, "model_type", None)
    if family not in FAMILIES:
        raise ValueError(f"{name} is of type {family!r}, the ledger knows the block of {FAMILIES}")
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
