"""lab.training: AdamW against torch, and what cannot train is refused."""

import math
from dataclasses import replace

import pytest
import torch
from lora2qlora.lab import training
from toy import toy_task
from transformers import LlamaForCausalLM


def test_an_empty_dataset_is_named(model, tokenizer):
    empty = replace(toy_task(), train=toy_task().train.select([]), test=toy_task().test.select([]))
    with pytest.raises(ValueError, match=r"1\.\.0, the rows of toy's train split"):
        training.make_batches(empty, tokenizer, batch_size=1)
    with pytest.raises(ValueError, match="nothing to evaluate: toy's test split"):
        training.evaluate(model, empty, tokenizer)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        training.evaluate(model, toy_task(), tokenizer, limit=0)


def test_train_follows_adamw_with_warm_up_and_decay(model, tokenizer):
    batches = training.make_batches(toy_task(), tokenizer, batch_size=4)
    fixed = [next(batches) for _ in range(5)]
    twin = LlamaForCausalLM(model.config)
    twin.load_state_dict(model.state_dict())
    records = training.train(model, fixed, steps=5, learning_rate=1e-2, warmup_steps=2)

    rates = [0.0, 0.5e-2, 1e-2, 1e-2 * 2 / 3, 1e-2 / 3]
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.0, weight_decay=0.0)
    twin.train()
    for batch, rate, record in zip(fixed, rates, records, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        loss = twin(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert record.learning_rate == pytest.approx(rate)
        assert record.loss == pytest.approx(loss.item(), rel=1e-6)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not model.training


def test_train_learns_a_toy_task_and_leaves_frozen_weights_alone(model, tokenizer):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in model.lm_head.parameters():
        parameter.requires_grad_(True)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    batches = training.make_batches(toy_task(), tokenizer, batch_size=4)
    records = training.train(model, batches, steps=60, learning_rate=3e-2)
    assert [r.step for r in records] == list(range(60))
    assert records[-1].loss < 0.5 * records[0].loss
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert all(r.tokens > 0 for r in records)


def test_train_refuses_what_cannot_train(model, tokenizer):
    batches = training.make_batches(toy_task(), tokenizer, batch_size=4)
    with pytest.raises(ValueError, match="steps=0"):
        training.train(model, batches, steps=0, learning_rate=1e-3)
    with pytest.raises(ValueError, match="ended after 2 of 3 steps"):
        training.train(model, [next(batches), next(batches)], steps=3, learning_rate=1e-3)
    assert not model.training
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="the loss is nan at step 0 with learning rate"):
        training.train(model, batches, steps=1, learning_rate=1e-3)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="0 such parameters"):
        training.train(model, batches, steps=1, learning_rate=1e-3)


def test_a_batch_that_is_all_prompt_is_no_matter_of_the_learning_rate(model, tokenizer):
    batch = next(training.make_batches(toy_task(), tokenizer, batch_size=4))
    batch["labels"].fill_(training.IGNORED)
    with pytest.raises(ValueError, match="nothing is left to train"):
        training.train(model, [batch], steps=1, learning_rate=1e-3)
    assert not model.training


def test_everything_is_importable_from_here():
    assert all(hasattr(training, name) for name in training.__all__)
    for (
        name
    ) in "encode collate make_batches answer_loss generate choose evaluate mean_loss perplexity".split():
        assert name in training.__all__
