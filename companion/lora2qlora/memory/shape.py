"""The sizes of a Llama-like model: all of the model that the ledger needs to know."""

from dataclasses import dataclass

from lora2qlora.blockwise import check_size
from lora2qlora.memory.families import FORMS, FUSED, LINEARS, Form


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama-like model: gated MLP, RMSNorm, rotary positions; a Llama's form unless given."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    kv_heads: int | None = None  # as many as heads unless given
    head_size: int | None = None  # hidden / heads unless given
    tied: bool = False  # the LM head is the embedding
    form: str = "llama"  # of FORMS
    biases: tuple[str, ...] = ()  # the linear layers that have one
    unturned: int | None = None  # every such layer, counted from 1, has no rotary positions
    window: int | None = None  # attention reaches back so far, in some layers at least

    def __post_init__(self):
        for name in ("hidden", "layers", "heads", "intermediate", "vocabulary"):
            check_size(name, getattr(self, name))
        for name in ("kv_heads", "head_size", "unturned", "window"):
            if getattr(self, name) is not None:
                check_size(name, getattr(self, name))
        if self.heads % (self.kv_heads or self.heads) or (self.hidden % self.heads and not self.head_size):
            raise ValueError(f"heads must divide hidden, and kv_heads divide heads, got {self}")
        if self.head_dim % 2:
            raise ValueError(f"rotary positions need heads of an even size, got {self.head_dim} in {self}")
        if not isinstance(self.tied, bool):
            raise TypeError(f"tied must be True or False, got {self.tied!r}")
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {tuple(FORMS)}, got {self.form!r}")
        if not set(self.biases) <= set(self.linears):
            raise ValueError(f"biases are of some of {tuple(self.linears)}, got {self.biases!r}")

    @property
    def head_dim(self) -> int:
        """Numbers in one head."""
        return self.head_size or self.hidden // self.heads

    @property
    def traits(self) -> Form:
        """What the form is like."""
        return FORMS[self.form]

    @property
    def widths(self) -> tuple[int, int]:
        """Numbers in q, and in k or v, of one token."""
        return self.heads * self.head_dim, (self.kv_heads or self.heads) * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the linear layers of one block, in the order in which they are used."""
        (q, kv), h, i = self.widths, self.hidden, self.intermediate
        if self.traits.fused:
            return dict(zip(FUSED, [(q + 2 * kv, h), (h, q), (2 * i, h), (h, i)], strict=True))
        return dict(zip(LINEARS, [(q, h), (kv, h), (kv, h), (h, q), (i, h), (i, h), (h, i)], strict=True))

    @property
    def order(self) -> list[str]:
        """The names of the linear layers in the order of model.parameters()."""
        names = list(self.linears)
        return [names[1], names[0], *names[2:]] if self.traits.fused else names

    @property
    def block(self) -> list[int]:
        """Numbers in every tensor of one block, in the order of model.parameters()."""
        counts = []
        for name in self.order:
            out, in_ = self.linears[name]
            counts += [out * in_, *([out] if name in self.biases else [])]
            if name == "o_proj":  # the norms of q and k come next
                counts += {"": (), "head": 2 * (self.head_dim,), "width": self.widths}[self.traits.head_norm]
        return counts + (4 if self.traits.norms == "both" else 2) * [self.hidden]

    @property
    def angle_kinds(self) -> int:
        """How many sets of rotary angles there are."""
        return 1 + (self.traits.far is not None and self.layers >= self.traits.far)

    @property
    def parameters(self) -> int:
        """How many parameters such a model has, each counted once."""
        return self.layers * sum(self.block) + self.hidden + (2 - self.tied) * self.vocabulary * self.hidden
