"""A tokenizer of transformers as llama.cpp reads it: tokens, merges, and how a text is cut first. Chapter 16.

llama.cpp knows a text's first cuts by name only, the `pre` type. A file that lacks it, or has another, makes
other tokens of the same text, without a word. Here it is read off the tokenizer's own rules.
"""

import json

from gguf import GGUFWriter, TokenType

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _by_regex(digits: str) -> list[dict]:
    """Cut at a regular expression, which lets so many digits stand together."""
    cut = {"type": "Split", "pattern": {"Regex": WORDS % digits}, "behavior": "Isolated", "invert": False}
    return [cut, {**BYTES, "use_regex": False}]


# What cuts a text before merges are applied, by llama.cpp's name for it.
PRE_TYPES = {
    "gpt-2": [BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTES],
    "qwen2": _by_regex(""),
    "llama-bpe": _by_regex("{1,3}"),
}


def write_tokenizer(writer: GGUFWriter, tokenizer, rows: int) -> None:
    """Add a tokenizer's keys; `rows` [tokens] is the height of the embedding, which may have spare ones.

    Raises ValueError: a tokenizer that llama.cpp would read as another, more tokens than rows.
    """
    rules = _rules(tokenizer)
    tokens, kinds = _tokens(tokenizer, rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_type(rules))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(
        [pair if isinstance(pair, str) else " ".join(pair) for pair in rules["model"]["merges"]]
    )
    writer.add_eos_token_id(tokenizer.eos_token_id)
    for token, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if token is not None:
            add(token)
    begins, ends = _added(tokenizer)
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(ends)
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.get_chat_template())


def pre_type(rules: dict) -> str:
    """llama.cpp's name for how a tokenizer.json cuts texts; ValueError where none is known here."""
    steps = rules["pre_tokenizer"] or {}
    found = [
        {key: value for key, value in step.items() if key != "trim_offsets"}
        for step in steps.get("pretokenizers", [steps])
    ]
    name = next((name for name, known in PRE_TYPES.items() if known == found), None)
    whole_first = bool(rules["model"].get("ignore_merges"))  # a word that is a token needs no merges
    if name is None or whole_first != (name == "llama-bpe"):
        raise ValueError(
            f"llama.cpp's name for this pre-tokenizer is not known here: {json.dumps(found)!s:.300}"
            f"{', with ignore_merges' * whole_first}. Known are {', '.join(PRE_TYPES)}; with another one "
            "llama.cpp would cut texts otherwise than the model has learnt. Its own converter knows more"
        )
    return name


def _rules(tokenizer) -> dict:
    """The tokenizer.json of a byte-level BPE; ValueError for any other tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    model, normalizer = rules["model"].get("type"), rules.get("normalizer")
    if model != "BPE" or rules["decoder"] is None or rules["decoder"]["type"] != "ByteLevel":
        raise ValueError(
            f"need a tokenizer of byte-level BPE, got {type(tokenizer).__name__} with model {model}: "
            "llama.cpp's own converter knows others"
        )
    if normalizer not in (None, {"type": "NFC"}):  # llama.cpp leaves texts as they are; most are NFC already
        raise ValueError(f"the tokenizer normalizes texts, which llama.cpp would not: {normalizer!r:.200}")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no eos_token: llama.cpp would take token 11 for it, set the right one"
        )
    return rules


def _tokens(tokenizer, rows: int) -> tuple[list[str], list[int]]:
    """The text and the type of each row of the embedding."""
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(by_id) >= rows:
        raise ValueError(
            f"the tokenizer has tokens up to {max(by_id)} and the model {rows} rows of embeddings: this is "
            "another model's tokenizer, or model.resize_token_embeddings was left out"
        )
    added = tokenizer.added_tokens_decoder
    stripping = [
        token.content for token in added.values() if token.lstrip or token.rstrip or token.single_word
    ]
    if stripping:
        raise ValueError(
            f"llama.cpp cuts added tokens out plainly, but these strip or need spaces: {stripping[:5]}"
        )
    kinds = [
        TokenType.UNUSED
        if index not in by_id
        else TokenType.NORMAL
        if index not in added
        else TokenType.CONTROL
        if added[index].special
        else TokenType.USER_DEFINED
        for index in range(rows)
    ]
    return [by_id.get(index, f"[PAD{index}]") for index in range(rows)], kinds


def _added(tokenizer) -> tuple[bool, bool]:
    """Whether the tokenizer puts its bos before a text, and its eos behind it; ValueError otherwise."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for begins in (False, True):
        for ends in (False, True):
            if whole == [tokenizer.bos_token_id] * begins + plain + [tokenizer.eos_token_id] * ends:
                return begins, ends
    raise ValueError(
        f"the tokenizer makes {whole} of {plain}, more than its bos and eos, which GGUF cannot say"
    )
