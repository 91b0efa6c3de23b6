"""lab.batches: labels on the answer alone, padding that changes nothing, seeded batches."""

import copy
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


# What is refused ----------------------------------------------------------------------------------


def without(tokenizer, token):
    """A copy of a tokenizer that lacks its `eos_token` or its `pad_token`."""
    tokenizer = copy.deepcopy(tokenizer)
    setattr(tokenizer, token, None)
    return tokenizer


def deaf(tokenizer):
    """A tokenizer that makes nothing of the text " ?", as one that normalizes it away."""

    class Deaf:
        eos_token_id, pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id

        def __call__(self, text, **options):
            return {"input_ids": []} if text == " ?" else tokenizer(text, **options)

    return Deaf()


@pytest.mark.parametrize(("prompt", "answer"), [(None, "a"), ("a", None), ("a", ""), ("a", 3), ("", "a")])
def test_an_example_needs_a_prompt_and_an_answer(tokenizer, prompt, answer):
    with pytest.raises(ValueError, match=r"an? (prompt|answer) must be text that is not blank, got"):
        batches.encode(tokenizer, prompt, answer)


def test_an_example_needs_an_end_and_an_answer_that_gives_tokens(tokenizer):
    with pytest.raises(ValueError, match=r"no end token.*set tokenizer\.eos_token"):
        batches.encode(without(tokenizer, "eos_token"), "a:", "yes")
    with pytest.raises(ValueError, match=r"the answer '\?' gives no token, nothing is left to train"):
        batches.encode(deaf(tokenizer), "a:", "?")


def test_a_batch_needs_examples_a_padding_token_and_labels_for_all_ids():
    example = {"input_ids": [5, 6], "labels": [5, 6]}
    with pytest.raises(ValueError, match="no padding token"):
        batches.collate([example], None)
    with pytest.raises(ValueError, match="at least one example, got none"):
        batches.collate([], 0)
    with pytest.raises(ValueError, match="example 1 must have as many labels as input_ids, got 1 and 2"):
        batches.collate([example, {"input_ids": [5, 6], "labels": [5]}], 0)


@pytest.mark.parametrize("bad", [None, "", 3.0])
@pytest.mark.parametrize("column", ["input", "target"])
def test_a_bad_row_is_named_before_the_first_batch(tokenizer, column, bad):
    columns = {"input": ["a", "b"], "target": ["yes", "no"]}
    columns[column] = [None, bad] if isinstance(bad, float) else [columns[column][0], bad]
    task = replace(toy_task(), train=Dataset.from_dict(columns))
    with pytest.raises(
        ValueError, match=rf"row [01] of toy's train split: its column '{column}' must be text"
    ):
        batches.make_batches(task, tokenizer, 1)


@pytest.mark.parametrize(
    ("token", "said"), [("eos_token", "no end token"), ("pad_token", "no padding token")]
)
def test_a_tokenizer_that_lacks_a_token_is_named_before_the_first_batch(tokenizer, token, said):
    with pytest.raises(ValueError, match=f"^the tokenizer has {said}"):  # no row is to blame
        batches.make_batches(toy_task(), without(tokenizer, token), 1)


def test_an_answer_that_gives_no_token_is_named_by_its_row(tokenizer):
    rows = Dataset.from_dict({"input": ["a", "b"], "target": ["yes", "?"]})
    task = replace(toy_task(), train=rows)
    with pytest.raises(ValueError, match=r"row 1 of toy's train split: the answer '\?' gives no token"):
        batches.make_batches(task, deaf(tokenizer), 1)


def test_rows_are_encoded_as_one_by_one(tokenizer):
    task = toy_task(4)
    expected = [batches.encode(tokenizer, f"word {i}:", ["yes", "no"][i % 2]) for i in range(4)]
    assert batches.encode_rows(task, tokenizer, "test") == expected
    assert batches.encode_rows(task, tokenizer, "test", limit=3) == expected[:3]
