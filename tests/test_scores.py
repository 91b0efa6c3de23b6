"""lab.scores: losses, greedy answers, choices and perplexity, against torch and by hand."""

import copy
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from lora2qlora.lab import scores
from lora2qlora.lab.batches import IGNORED, collate, encode, make_batches
from toy import toy_task


def test_generate_is_greedy_and_padding_and_order_do_not_matter(model, tokenizer):
    prompts = ["a much longer prompt than the others:", "b:", "a prompt:", "c d e f:"]
    together = scores.generate(model, tokenizer, prompts, max_new_tokens=5, batch_size=3)
    for prompt, answer in zip(prompts, together, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(5):
            token = model(input_ids=ids).logits[0, -1].argmax()
            ids = torch.cat([ids, token[None, None]], dim=1)
            if token == tokenizer.eos_token_id:
                break
        new = ids[0, len(tokenizer(prompt)["input_ids"]) :]
        text = tokenizer.decode(new, skip_special_tokens=True).strip()
        assert answer == (text.splitlines()[0].strip() if text else "")
    assert scores.generate(model, tokenizer, [], max_new_tokens=5) == []


def test_choose_takes_the_likeliest_label_and_padding_does_not_matter(model, tokenizer):
    labels = ("a", "b")  # a byte tokenizer starts both with the same space, except for its one merge
    with pytest.raises(ValueError, match="must begin with different tokens"):
        scores.choose(model, tokenizer, ["x:"], ("bc", "bd"))
    with pytest.raises(ValueError, match="must begin with different tokens"):
        scores.choose(model, tokenizer, ["x:"], ())
    prompts = ["a longer prompt:", "x:", "yz:", "one more of another length:"]
    first = [tokenizer(" " + label)["input_ids"][0] for label in labels]
    chosen = scores.choose(model, tokenizer, prompts, labels, batch_size=3)
    for prompt, label in zip(prompts, chosen, strict=True):
        logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
        assert label == labels[logits[first].argmax()]
    with torch.no_grad():
        model.lm_head.weight[first[1]] = 0
        model.lm_head.weight[first[0]] = 0
    assert scores.choose(model, tokenizer, prompts, labels) == ["a"] * 4


def test_evaluate_scores_what_was_generated(model, tokenizer, monkeypatch):
    monkeypatch.setattr(scores, "generate", lambda *a, **k: ["yes"] * 8)
    metrics = scores.evaluate(model, toy_task(), tokenizer, limit=8)
    assert metrics.values == {"accuracy": 0.5}
    assert metrics.targets == ("yes", "no") * 4
    assert metrics.predictions == ("yes",) * 8


def test_perplexity_of_a_uniform_model_is_the_vocabulary_and_windows_agree(model, tokenizer):
    text = "A sentence of some length, to be cut into windows. " * 3
    whole = scores.perplexity(model, text, tokenizer)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert whole == pytest.approx(model(input_ids=ids, labels=ids).loss.exp().item(), rel=1e-5)
    first = scores.perplexity(model, text, tokenizer, max_tokens=10)
    assert first == pytest.approx(scores.perplexity(model, text[:10], tokenizer), rel=1e-5)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    for window in (1024, 16):
        assert scores.perplexity(model, text, tokenizer, window=window) == pytest.approx(260, rel=1e-4)
    rows = Dataset.from_dict({"text": ["one", "two"]})
    assert scores.perplexity(model, rows, tokenizer) == pytest.approx(260, rel=1e-4)


@pytest.mark.parametrize("text", ["", "a"])
def test_perplexity_needs_two_tokens(model, tokenizer, text):
    with pytest.raises(ValueError, match=f"at least two tokens a window, got {len(text)}"):
        scores.perplexity(model, text, tokenizer)


def test_answer_loss_is_the_models_own_loss(model, tokenizer):
    batch = next(make_batches(toy_task(), tokenizer, batch_size=6))
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    ours = scores.answer_loss(model, batch)
    handle.remove()
    torch.testing.assert_close(ours, model(**batch).loss)
    assert seen[0] < batch["input_ids"].shape[1] - 1  # the prompts' logits were not computed


def test_mean_loss_weighs_answer_tokens_alike_whatever_the_batches(model, tokenizer):
    task = replace(
        toy_task(), test=Dataset.from_dict({"input": ["a", "b c d"], "target": ["yes", "no maybe"]})
    )
    total, count = 0.0, 0
    for row in task.test:
        example = encode(tokenizer, task.prompt(row["input"]), row["target"])
        answered = sum(label != IGNORED for label in example["labels"])
        total += model(**collate([example], 2)).loss.item() * answered
        count += answered
    for batch_size in (1, 2):
        loss = scores.mean_loss(model, task, tokenizer, split="test", batch_size=batch_size)
        assert loss == pytest.approx(total / count, rel=1e-5)
    assert scores.mean_loss(model, task, tokenizer, split="test", limit=1) != pytest.approx(total / count)
    with pytest.raises(ValueError, match="toy's test split gives none"):
        scores.mean_loss(model, task, tokenizer, split="test", limit=0)


# What is refused ----------------------------------------------------------------------------------


def with_row(column, value):
    columns = {"input": ["a", "b"], "target": ["yes", "no"]}
    columns[column][1] = value
    return replace(toy_task(), test=Dataset.from_dict(columns))


@pytest.mark.parametrize("score", [scores.evaluate, scores.mean_loss])
@pytest.mark.parametrize("column", ["input", "target"])
@pytest.mark.parametrize("value", [None, " "])
def test_a_bad_row_is_named_and_a_limit_before_it_is_not_hurt(model, tokenizer, score, column, value):
    task = with_row(column, value)
    with pytest.raises(ValueError, match=rf"row 1 of toy's test split: its column '{column}' must be text"):
        score(model, task, tokenizer, split="test")
    score(model, task, tokenizer, split="test", limit=1)


def test_a_split_that_is_not_there_is_named(model, tokenizer):
    with pytest.raises(ValueError, match="toy has no validation split"):
        scores.mean_loss(model, toy_task(), tokenizer)


def test_a_batch_without_an_answer_is_refused(model):
    labels = torch.tensor([[5, IGNORED, IGNORED]])  # the first token is never predicted
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": labels, "attention_mask": torch.ones(1, 3)}
    with pytest.raises(ValueError, match="no answer token to predict, nothing is left to train"):
        scores.answer_loss(model, batch)
    batch["labels"] = torch.tensor([[IGNORED, IGNORED, 7]])
    assert scores.answer_loss(model, batch) > 0


def test_prompts_and_labels_that_are_no_text_are_named(model, tokenizer):
    with pytest.raises(ValueError, match="prompt 1 must be text that is not blank, got None"):
        scores.generate(model, tokenizer, ["a", None], max_new_tokens=1)
    with pytest.raises(ValueError, match="prompt 0 must be text that is not blank, got ''"):
        scores.choose(model, tokenizer, [""], ("a",))
    with pytest.raises(ValueError, match="a label must be text that is not blank, got None"):
        scores.choose(model, tokenizer, ["x:"], ("a", None))

    class Deaf:
        def __call__(self, text, **options):
            return {"input_ids": []}

    with pytest.raises(ValueError, match="the label 'a' gives no token to choose by"):
        scores.choose(model, Deaf(), ["x:"], ("a",))


@pytest.mark.parametrize("size", [0, -2])
def test_a_batch_holds_at_least_one(model, tokenizer, size):
    calls = [
        lambda: scores.generate(model, tokenizer, ["a"], 1, batch_size=size),
        lambda: scores.choose(model, tokenizer, ["a"], ("a",), batch_size=size),
        lambda: scores.mean_loss(model, toy_task(), tokenizer, split="test", batch_size=size),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {size}"):
            call()


def test_a_tokenizer_without_padding_is_named(model, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = None
    for score in (scores.evaluate, scores.mean_loss):
        with pytest.raises(ValueError, match="the tokenizer has no padding token"):
            score(model, toy_task(), tokenizer, split="test")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, 'a string, or a Dataset with a column "text", got None'),
        (Dataset.from_dict({"input": ["a"]}), 'with a column "text"'),
        (Dataset.from_dict({"text": ["a", None]}), 'row 1: its column "text" must be text, got None'),
    ],
)
def test_perplexity_of_what_is_no_text(model, tokenizer, text, said):
    with pytest.raises(ValueError, match=said):
        scores.perplexity(model, text, tokenizer)
