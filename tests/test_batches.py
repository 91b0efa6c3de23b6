"""lab.batches: labels on the answer alone, padding that changes nothing, seeded batches."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2qlora.lab import batches
from toy import toy_task


def test_only_the_answer_and_its_end_are_targets(tokenizer):
    example = batches.encode(tokenizer, "a b:", "yes")
    answer = [i for i in example["labels"] if i != batches.IGNORED]
    assert tokenizer.decode(answer) == " yes" + tokenizer.eos_token
    assert tokenizer.decode(example["input_ids"]) == "a b: yes" + tokenizer.eos_token
    assert example["input_ids"][: -len(answer)] == tokenizer("a b:")["input_ids"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_collate_pads_right_and_masks_just_the_padding(lengths):
    examples = [{"input_ids": [7] * n, "labels": [batches.IGNORED] * (n - 1) + [7]} for n in lengths]
    batch = batches.collate(examples, pad_token_id=2)
    assert {tuple(t.shape) for t in batch.values()} == {(len(lengths), max(lengths))}
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert (batch["input_ids"] == 7).equal(batch["attention_mask"].bool())
    assert (batch["labels"] != batches.IGNORED).sum().item() == len(lengths)


def test_loss_is_the_mean_over_answer_tokens_and_padding_changes_nothing(model, tokenizer):
    examples = [batches.encode(tokenizer, p, a) for p, a in [("a:", "yes"), ("a longer one:", "no")]]
    batch = batches.collate(examples, tokenizer.pad_token_id)
    losses, answered = [], 0
    for example in examples:
        ids = torch.tensor([example["input_ids"]])
        logits = model(input_ids=ids).logits[0, :-1]
        count = sum(label != batches.IGNORED for label in example["labels"])
        losses.append(torch.nn.functional.cross_entropy(logits[-count:], ids[0, -count:], reduction="sum"))
        answered += count
    torch.testing.assert_close(model(**batch).loss, sum(losses) / answered)


def test_batches_repeat_with_the_seed_cover_an_epoch_and_reshuffle(tokenizer):
    def epoch(seed, start):
        made = batches.make_batches(toy_task(), tokenizer, batch_size=4, seed=seed)
        taken = [next(made) for _ in range(start + 3)][start:]
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
    made = batches.make_batches(replace(toy_task(), train=data), tokenizer, batch_size=4)
    taken = [next(made) for _ in range(16)]
    assert sum(b["attention_mask"].sum().item() for b in taken) > 0.9 * sum(
        b["attention_mask"].numel() for b in taken
    )
    lengths = [b["input_ids"].shape[1] for b in taken]
    assert lengths != sorted(lengths)
    assert {len(b["input_ids"]) for b in taken} == {4}


@pytest.mark.parametrize("size", [0, -1, 13])
def test_batch_size_outside_the_split(tokenizer, size):
    with pytest.raises(ValueError, match=rf"1\.\.12, the rows of toy's train split, got {size}"):
        batches.make_batches(toy_task(), tokenizer, batch_size=size)
