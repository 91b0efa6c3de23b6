"""lab.training: the loss on the answer alone, seeded batches, AdamW against torch, metrics, perplexity."""

import copy
import math
from dataclasses import dataclass, replace

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2qlora.lab import training
from lora2qlora.lab.models import convert_gguf
from tiny_gguf import write_tiny_gguf
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class ToyTask:
    train: Dataset
    test: Dataset
    name: str = "toy"
    max_answer_tokens: int = 4

    def prompt(self, text):
        return f"{text}:"

    def metric(self, predictions, targets):
        right = sum(p == t for p, t in zip(predictions, targets, strict=True))
        return {"accuracy": right / len(targets)}


def toy_task(rows: int = 12) -> ToyTask:
    data = Dataset.from_dict(
        {"input": [f"word {i}" for i in range(rows)], "target": ["yes", "no"] * (rows // 2)}
    )
    return ToyTask(train=data, test=data)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    gguf = directory / "tiny.gguf"
    where = convert_gguf(gguf, write_tiny_gguf(gguf), directory / "tiny")
    return AutoTokenizer.from_pretrained(where, padding_side="left")


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        pad_token_id=2,
        eos_token_id=2,
        bos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def test_only_the_answer_and_its_end_are_targets(tokenizer):
    example = training.encode(tokenizer, "a b:", "yes")
    answer = [i for i in example["labels"] if i != training.IGNORED]
    assert tokenizer.decode(answer) == " yes" + tokenizer.eos_token
    assert tokenizer.decode(example["input_ids"]) == "a b: yes" + tokenizer.eos_token
    assert example["input_ids"][: -len(answer)] == tokenizer("a b:")["input_ids"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_collate_pads_right_and_masks_just_the_padding(lengths):
    examples = [{"input_ids": [7] * n, "labels": [training.IGNORED] * (n - 1) + [7]} for n in lengths]
    batch = training.collate(examples, pad_token_id=2)
    assert {tuple(t.shape) for t in batch.values()} == {(len(lengths), max(lengths))}
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert (batch["input_ids"] == 7).equal(batch["attention_mask"].bool())
    assert (batch["labels"] != training.IGNORED).sum().item() == len(lengths)


def test_loss_is_the_mean_over_answer_tokens_and_padding_changes_nothing(model, tokenizer):
    examples = [training.encode(tokenizer, p, a) for p, a in [("a:", "yes"), ("a longer one:", "no")]]
    batch = training.collate(examples, tokenizer.pad_token_id)
    losses, answered = [], 0
    for example in examples:
        ids = torch.tensor([example["input_ids"]])
        logits = model(input_ids=ids).logits[0, :-1]
        count = sum(label != training.IGNORED for label in example["labels"])
        losses.append(torch.nn.functional.cross_entropy(logits[-count:], ids[0, -count:], reduction="sum"))
        answered += count
    torch.testing.assert_close(model(**batch).loss, sum(losses) / answered)


def test_batches_repeat_with_the_seed_cover_an_epoch_and_reshuffle(tokenizer):
    def epoch(seed, start):
        batches = training.make_batches(toy_task(), tokenizer, batch_size=4, seed=seed)
        taken = [next(batches) for _ in range(start + 3)][start:]
        return [tokenizer.decode(row) for batch in taken for row in batch["input_ids"]]

    assert epoch(0, 0) == epoch(0, 0)
    assert epoch(0, 0) != epoch(1, 0)
    assert epoch(0, 0) != epoch(0, 3)
    assert len(set(epoch(0, 0))) == 12
    assert {text.replace("<|im_end|>", "") for text in epoch(0, 0)} == {
        text.replace("<|im_end|>", "") for text in epoch(0, 3)
    }


def test_rows_of_like_length_share_a_batch(tokenizer):
    texts = ["x" * (1 + 7 * i % 64) for i in range(64)]
    data = Dataset.from_dict({"input": texts, "target": ["yes"] * 64})
    batches = training.make_batches(replace(toy_task(), train=data), tokenizer, batch_size=4)
    taken = [next(batches) for _ in range(16)]
    assert sum(b["attention_mask"].sum().item() for b in taken) > 0.9 * sum(
        b["attention_mask"].numel() for b in taken
    )
    lengths = [b["input_ids"].shape[1] for b in taken]
    assert lengths != sorted(lengths)
    assert {len(b["input_ids"]) for b in taken} == {4}


@pytest.mark.parametrize("size", [0, -1, 13])
def test_batch_size_outside_the_split(tokenizer, size):
    with pytest.raises(ValueError, match=rf"1\.\.12, the rows of toy's train split, got {size}"):
        training.make_batches(toy_task(), tokenizer, batch_size=size)


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


def test_generate_is_greedy_and_padding_and_order_do_not_matter(model, tokenizer):
    prompts = ["a much longer prompt than the others:", "b:", "a prompt:", "c d e f:"]
    together = training.generate(model, tokenizer, prompts, max_new_tokens=5, batch_size=3)
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
    assert training.generate(model, tokenizer, [], max_new_tokens=5) == []


def test_choose_takes_the_likeliest_label_and_padding_does_not_matter(model, tokenizer):
    labels = ("a", "b")  # a byte tokenizer starts both with the same space, except for its one merge
    with pytest.raises(ValueError, match="must begin with different tokens"):
        training.choose(model, tokenizer, ["x:"], ("bc", "bd"))
    with pytest.raises(ValueError, match="must begin with different tokens"):
        training.choose(model, tokenizer, ["x:"], ())
    prompts = ["a longer prompt:", "x:", "yz:", "one more of another length:"]
    first = [tokenizer(" " + label)["input_ids"][0] for label in labels]
    chosen = training.choose(model, tokenizer, prompts, labels, batch_size=3)
    for prompt, label in zip(prompts, chosen, strict=True):
        logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
        assert label == labels[logits[first].argmax()]
    with torch.no_grad():
        model.lm_head.weight[first[1]] = 0
        model.lm_head.weight[first[0]] = 0
    assert training.choose(model, tokenizer, prompts, labels) == ["a"] * 4


def test_evaluate_scores_what_was_generated(model, tokenizer, monkeypatch):
    monkeypatch.setattr(training, "generate", lambda *a, **k: ["yes"] * 8)
    metrics = training.evaluate(model, toy_task(), tokenizer, limit=8)
    assert metrics.values == {"accuracy": 0.5}
    assert metrics.targets == ("yes", "no") * 4
    assert metrics.predictions == ("yes",) * 8


def test_perplexity_of_a_uniform_model_is_the_vocabulary_and_windows_agree(model, tokenizer):
    text = "A sentence of some length, to be cut into windows. " * 3
    whole = training.perplexity(model, text, tokenizer)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert whole == pytest.approx(model(input_ids=ids, labels=ids).loss.exp().item(), rel=1e-5)
    first = training.perplexity(model, text, tokenizer, max_tokens=10)
    assert first == pytest.approx(training.perplexity(model, text[:10], tokenizer), rel=1e-5)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    for window in (1024, 16):
        assert training.perplexity(model, text, tokenizer, window=window) == pytest.approx(260, rel=1e-4)
    rows = Dataset.from_dict({"text": ["one", "two"]})
    assert training.perplexity(model, rows, tokenizer) == pytest.approx(260, rel=1e-4)


@pytest.mark.parametrize("text", ["", "a"])
def test_perplexity_needs_two_tokens(model, tokenizer, text):
    with pytest.raises(ValueError, match=f"at least two tokens a window, got {len(text)}"):
        training.perplexity(model, text, tokenizer)


def test_answer_loss_is_the_models_own_loss(model, tokenizer):
    batch = next(training.make_batches(toy_task(), tokenizer, batch_size=6))
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    ours = training.answer_loss(model, batch)
    handle.remove()
    torch.testing.assert_close(ours, model(**batch).loss)
    assert seen[0] < batch["input_ids"].shape[1] - 1  # the prompts' logits were not computed


def test_mean_loss_weighs_answer_tokens_alike_whatever_the_batches(model, tokenizer):
    task = replace(
        toy_task(), test=Dataset.from_dict({"input": ["a", "b c d"], "target": ["yes", "no maybe"]})
    )
    total, count = 0.0, 0
    for row in task.test:
        example = training.encode(tokenizer, task.prompt(row["input"]), row["target"])
        answered = sum(label != training.IGNORED for label in example["labels"])
        total += model(**training.collate([example], 2)).loss.item() * answered
        count += answered
    for batch_size in (1, 2):
        loss = training.mean_loss(model, task, tokenizer, split="test", batch_size=batch_size)
        assert loss == pytest.approx(total / count, rel=1e-5)
    assert training.mean_loss(model, task, tokenizer, split="test", limit=1) != pytest.approx(total / count)
    with pytest.raises(ValueError, match="toy's test split gives none"):
        training.mean_loss(model, task, tokenizer, split="test", limit=0)


def test_full_fine_tuning_moves_every_linear_weight_and_nothing_else(model, tokenizer):
    weights = training.train_every_linear(model)
    assert sorted(weights) == sorted(
        name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training.train(model, training.make_batches(toy_task(), tokenizer, 4), 2, 1e-3)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {f"{name}.weight" for name in weights}


def test_mixed_precision_computes_in_bfloat16_and_updates_in_float32(model, tokenizer):
    training.train_every_linear(model)
    batch = next(training.make_batches(toy_task(), tokenizer, batch_size=4))
    exact = training.answer_loss(model, batch).item()
    dtypes, exactly = [], copy.deepcopy(model)
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, inputs, y: dtypes.append(y.dtype))
    training.compute_in_bfloat16(model)
    rounded = training.answer_loss(model, batch)
    assert dtypes == [torch.bfloat16]
    assert 0 < abs(rounded.item() - exact) < 0.02 * exact
    rounded.backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model.zero_grad()
    runs = [
        training.train(m, training.make_batches(toy_task(), tokenizer, 4), 30, 1e-2) for m in (exactly, model)
    ]
    first, last = (runs[0][i].loss for i in (0, -1))
    assert last < 0.95 * first
    assert runs[1][-1].loss == pytest.approx(last, rel=0.02)  # weights cached across steps would stand still
