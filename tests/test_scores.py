"""lab.scores: losses, greedy answers, choices and perplexity, against torch and by hand."""

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
