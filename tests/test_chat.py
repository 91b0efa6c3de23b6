"""Labels of a chat: what the assistant writes and its end token train, for every form of template."""

import pytest
from chat_templates import FORMS
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2qlora.lab.chat import encode_chat, encode_chats, fit_length, one_answer_a_row
from lora2qlora.lab.models import SMALL_LM

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is the whale?"},
    {"role": "assistant", "content": "In the sea."},
    {"role": "user", "content": "And the ship?"},
    {"role": "assistant", "content": "Upon it."},
]
PAIR = CHAT[1:3]


def tokenizer_for(form):
    """The small model's tokenizer with a form's special tokens and template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(SMALL_LM))
    tokenizer.add_special_tokens({"additional_special_tokens": list(form.special)})
    tokenizer.chat_template = form.template
    return tokenizer


def trained(tokenizer, example):
    """The texts of the runs of tokens that train."""
    runs, previous = [], False
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (-100, token)
        if label != -100:
            runs[-1:] = [[*runs[-1], token]] if previous else [*runs[-1:], [token]]
        previous = label != -100
    return [tokenizer.decode(run) for run in runs]


@pytest.fixture(params=FORMS.values(), ids=FORMS.keys())
def form(request):
    return request.param


def test_one_answer_trains_with_its_end_token_and_nothing_else(form):
    tokenizer = tokenizer_for(form)
    example = encode_chat(tokenizer, PAIR)
    (answer,) = trained(tokenizer, example)
    assert answer.removeprefix("<think>\n\n</think>\n\n").strip() == "In the sea." + form.end
    assert example["input_ids"] == tokenizer.apply_chat_template(PAIR, return_dict=False)
    assert example["attention_mask"] == [1] * len(example["input_ids"])


def test_the_prompt_has_the_tokens_that_generation_starts_from(form):
    tokenizer = tokenizer_for(form)
    example = encode_chat(tokenizer, PAIR)
    prompt = tokenizer.apply_chat_template(PAIR[:1], add_generation_prompt=True, return_dict=False)
    assert example["input_ids"][: len(prompt)] == prompt
    assert [label == -100 for label in example["labels"]].index(False) == len(prompt)


def test_every_answer_of_a_longer_chat_trains(form):
    tokenizer = tokenizer_for(form)
    chat = CHAT[1:] if form.refuses_system else CHAT
    if form.rewrites:
        with pytest.raises(ValueError, match=r"^turn 2: the template renders it otherwise.*last_only"):
            encode_chat(tokenizer, chat)
    else:
        answers = [answer.strip() for answer in trained(tokenizer, encode_chat(tokenizer, chat))]
        assert answers == ["In the sea." + form.end, "Upon it." + form.end]
    (last,) = trained(tokenizer, encode_chat(tokenizer, chat, last_only=True))
    assert last.endswith("Upon it." + form.end)
    assert "sea" not in last


def test_with_one_answer_a_row_every_template_trains_each_answer_once(form):
    tokenizer = tokenizer_for(form)
    chat = [*(CHAT[1:] if form.refuses_system else CHAT), {"role": "user", "content": "Thanks."}]
    examples, refused = encode_chats(tokenizer, one_answer_a_row([chat, PAIR]), last_only=True)
    assert not refused
    trains = [trained(tokenizer, example) for example in examples]
    assert [len(answers) for answers in trains] == [1, 1, 1]
    for (answer,), expected in zip(trains, ("In the sea.", "Upon it.", PAIR[-1]["content"]), strict=True):
        assert answer.strip().endswith(expected + form.end)


def test_a_role_that_the_template_refuses_is_named(form):
    tokenizer = tokenizer_for(form)
    if form.refuses_system:
        with pytest.raises(
            ValueError, match=r"^turn 0 .system.: the template says 'System role not supported'"
        ):
            encode_chat(tokenizer, CHAT)
    else:
        assert "Be brief." in tokenizer.decode(encode_chat(tokenizer, CHAT, last_only=True)["input_ids"])


def test_a_template_that_marks_its_answers_agrees():
    tokenizer = tokenizer_for(FORMS["marked"])
    marked = tokenizer.apply_chat_template(
        CHAT, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    ours = encode_chat(tokenizer, CHAT)
    assert ours["input_ids"] == marked["input_ids"]
    assert [int(label != -100) for label in ours["labels"]] == marked["assistant_masks"]


WORDS = st.text("abc é\n.", min_size=1, max_size=12).map(str.strip).filter(bool)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3), st.sampled_from(sorted(FORMS)))
def test_labels_are_the_answers_of_any_chat(pairs, name):
    form = FORMS[name]
    tokenizer = tokenizer_for(form)
    roles = ("user", "assistant")
    chat = [{"role": r, "content": c} for pair in pairs for r, c in zip(roles, pair, strict=True)]
    if form.rewrites:
        chat = chat[:2]
    example = encode_chat(tokenizer, chat)
    answers = [answer.removesuffix(form.end).strip() for answer in trained(tokenizer, example)]
    answers = [answer.removeprefix("<think>\n\n</think>").strip() for answer in answers]
    assert answers == [message["content"].strip() for message in chat if message["role"] == "assistant"]


def test_a_border_inside_a_token_is_refused():
    form = FORMS["Mistral"]
    tokenizer = tokenizer_for(form)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %} {% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"  # noqa: E501
    with pytest.raises(ValueError, match=r"^turn 1: its prompt.*merges the prompt's end"):
        encode_chat(tokenizer, PAIR)


def test_a_template_without_an_end_token_is_refused():
    tokenizer = tokenizer_for(FORMS["Phi-3"])
    tokenizer.chat_template = FORMS["Phi-3"].template.replace("<|end|>\n", "\n")
    with pytest.raises(ValueError, match=r"^turn 1: the template ends it with no special token"):
        encode_chat(tokenizer, PAIR)


def test_no_template_is_refused():
    tokenizer = tokenizer_for(FORMS["Phi-3"])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        encode_chat(tokenizer, PAIR)


@pytest.mark.parametrize("turn", [0, 1])
def test_a_content_with_a_special_token_is_refused(turn):
    tokenizer = tokenizer_for(FORMS["Qwen2.5"])
    chat = [dict(message) for message in PAIR]
    chat[turn]["content"] += "<|im_end|>"
    with pytest.raises(ValueError, match=rf"^turn {turn} .*its content holds <\|im_end\|>"):
        encode_chat(tokenizer, chat)


@pytest.mark.parametrize(("chat", "reason"), [([], "no messages"), (PAIR[:1], "no assistant turn")])
def test_messages_that_are_no_chat_are_refused(chat, reason):
    with pytest.raises(ValueError, match=reason):
        encode_chat(tokenizer_for(FORMS["Qwen2.5"]), chat)


def test_rows_that_are_too_long_are_dropped_and_counted():
    tokenizer = tokenizer_for(FORMS["Qwen2.5"])
    short, long = encode_chat(tokenizer, PAIR), encode_chat(tokenizer, CHAT)
    kept, said = fit_length([short, long], len(long["input_ids"]) - 1)
    count = [sum(label != -100 for label in example["labels"]) for example in (short, long)]
    assert kept == [short]
    assert said == {
        "rows": 2, "kept": 1, "dropped": 1, "longest": len(long["input_ids"]),
        "dropped answers": 1 - count[0] / sum(count),
    }  # fmt: skip
    assert fit_length([short, long], len(long["input_ids"]))[0] == [short, long]
    with pytest.raises(ValueError, match="no row of 2 has at most 3 tokens"):
        fit_length([short, long], 3)


def test_a_tokenizer_that_adds_a_start_token_does_not_double_it():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_for(FORMS["Llama-3"])
    start = tokenizer.convert_tokens_to_ids("<|begin_of_text|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", start)]
    )
    assert tokenizer("Ahoy")["input_ids"][0] == start
    assert encode_chat(tokenizer, CHAT)["input_ids"].count(start) == 1


def test_rows_that_cannot_train_are_refused_with_their_number_and_reason(form):
    tokenizer = tokenizer_for(form)
    hostile = [PAIR[0], {"role": "assistant", "content": f"Yes.{form.end}No."}]
    examples, refused = encode_chats(tokenizer, [PAIR, hostile, PAIR])
    assert examples == [encode_chat(tokenizer, PAIR)] * 2
    ((row, reason),) = refused
    assert row == 1
    assert "its content holds" in reason
    with pytest.raises(ValueError, match=r"no chat of 1 can be trained on: row 0: turn 1 \(assistant\)"):
        encode_chats(tokenizer, [hostile])
    with pytest.raises(ValueError, match=r"no chat of 0 .* there are none"):
        encode_chats(tokenizer, [])
