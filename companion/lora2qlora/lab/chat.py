"""A chat as token ids with labels on what the assistant writes, for any chat template. Chapter 13.

No template marks in its text which part is the answer. It is found by rendering the chat up to each of the
assistant's turns, with and without it, and by holding the tokens of the three renderings together.
"""

from __future__ import annotations

from lora2qlora.lab.chat_rows import Chats, Messages, read_chats, what_is_wrong
from lora2qlora.lab.training import IGNORED

__all__ = ["Chats", "encode_chat", "encode_chats", "fit_length", "one_answer_a_row", "read_chats"]
__all__ += ["what_is_wrong"]


def encode_chat(tokenizer, messages: Messages, last_only: bool = False) -> dict[str, list[int]]:
    """`input_ids`, `attention_mask` and `labels` of a chat, equally long.

    What trains is every turn of the assistant with its end token, and nothing else; with `last_only` the
    last of these turns alone. The ids are those of `apply_chat_template`, so no start token is doubled, and
    the prompt of a turn has the tokens that the model meets when it answers there.

    Raises ValueError, naming the turn, where that is impossible: if the messages are no chat; if there is no
    template, or it refuses a role, drops or rewrites an earlier turn, or ends a turn with no special token;
    if the tokenizer merges the prompt's end with the answer's start; or if a content holds special tokens.
    Chapter 13.
    """
    if reason := what_is_wrong(messages):
        raise ValueError(reason)
    _check_roles(tokenizer, messages)
    _check_contents(tokenizer, messages)
    ids = _tokens(tokenizer, messages, len(messages))
    labels = [IGNORED] * len(ids)
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    for turn in turns[-1:] if last_only else turns:
        start, stop = _answer(tokenizer, messages, turn, ids)
        labels[start:stop] = ids[start:stop]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def one_answer_a_row(rows: list[Messages]) -> list[Messages]:
    """A row for each answer: the chat up to it. With `last_only` every answer trains once, as it is asked.

    For templates that render an answer otherwise when more turns follow. Chapter 13.
    """
    return [
        messages[: turn + 1]
        for messages in rows
        for turn, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


def encode_chats(
    tokenizer, rows: list[Messages], last_only: bool = False
) -> tuple[list[dict[str, list[int]]], list[tuple[int, str]]]:
    """(examples as `encode_chat` gives them, refused rows as (index, reason)).

    Raises ValueError where no row is left: the message has the first reasons. Chapter 13.
    """
    examples, refused = [], []
    for index, messages in enumerate(rows):
        try:
            examples.append(encode_chat(tokenizer, messages, last_only))
        except ValueError as error:
            refused.append((index, str(error)))
    if not examples:
        first = "; ".join(f"row {index}: {reason}" for index, reason in refused[:3]) or "there are none"
        raise ValueError(f"no chat of {len(rows)} can be trained on: {first}")
    return examples, refused


def fit_length(examples: list[dict[str, list[int]]], max_length: int) -> tuple[list[dict], dict[str, float]]:
    """The examples of at most `max_length` tokens, uncut, and what that costs.

    The second is {"rows", "kept", "dropped", "longest" [tokens], "dropped answers" [share of all tokens
    that train]}. Raises ValueError where no example is short enough. Chapter 13.
    """
    kept = [e for e in examples if len(e["input_ids"]) <= max_length]
    longest = max((len(e["input_ids"]) for e in examples), default=0)
    if not kept:
        raise ValueError(f"no row of {len(examples)} has at most {max_length} tokens, the longest {longest}")
    everything, left = (sum(x != IGNORED for e in es for x in e["labels"]) for es in (examples, kept))
    counts = {"rows": len(examples), "kept": len(kept), "dropped": len(examples) - len(kept)}
    return kept, counts | {"longest": longest, "dropped answers": 1 - left / everything}


def _answer(tokenizer, messages: Messages, turn: int, ids: list[int]) -> tuple[int, int]:
    """Where the tokens of an assistant's turn start, and where they stop: behind its end token."""
    prompt = _tokens(tokenizer, messages, turn, add_generation_prompt=True)
    through = _tokens(tokenizer, messages, turn + 1)
    if through[: len(prompt)] != prompt:
        raise ValueError(
            f"turn {turn}: its prompt, rendered alone, is not how the chat begins: the template changes what "
            "came before, or the tokenizer merges the prompt's end with the answer's start"
        )
    special = _special_ids(tokenizer)
    ends = [k for k in range(len(prompt), len(through)) if through[k] in special]
    if not ends:
        raise ValueError(f"turn {turn}: the template ends it with no special token, so none would be learned")
    stop = ends[-1] + 1
    if ids[:stop] != through[:stop]:
        raise ValueError(
            f"turn {turn}: the template renders it otherwise when more turns follow (templates of reasoning "
            "models drop earlier thoughts): make one row for each answer, and pass last_only=True"
        )
    return len(prompt), stop


def _tokens(tokenizer, messages: Messages, count: int, **options) -> list[int]:
    """The ids of the first `count` messages as the template renders them."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template: take that of an instruct model, or set one")
    text = tokenizer.apply_chat_template(messages[:count], tokenize=False, **options)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _check_roles(tokenizer, messages: Messages) -> None:
    """ValueError naming the first turn that the template does not take."""
    from jinja2.exceptions import TemplateError

    for turn, message in enumerate(messages):
        try:
            _tokens(tokenizer, messages, turn + 1)
        except TemplateError as error:
            raise ValueError(f"turn {turn} ({message['role']}): the template says {str(error)!r}") from error


def _special_ids(tokenizer) -> set[int]:
    """The ids of all tokens that are special: no text of a message gives them."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}


def _check_contents(tokenizer, messages: Messages) -> None:
    """ValueError where a content holds the text of a special token, which would end or begin a turn."""
    special = _special_ids(tokenizer)
    for turn, message in enumerate(messages):
        found = special.intersection(tokenizer(message["content"], add_special_tokens=False)["input_ids"])
        if found:
            names = tokenizer.convert_ids_to_tokens(sorted(found))
            raise ValueError(f"turn {turn} ({message['role']}): its content holds {', '.join(names)}")
