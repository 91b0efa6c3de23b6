"""lab.guards: a refusal names the row, the column and the cause; what chapters show of a function is bare."""

import copy
import inspect
import math
from dataclasses import replace

import pytest
from datasets import Dataset
from lora2qlora.lab import guards
from toy import toy_task

BAD = [None, math.nan, "", " \n", 3, 0.5, "half \ud83d"]


def test_a_guard_sees_every_argument_and_the_source_is_the_functions_own():
    seen = []

    def double(x, *, times=2):
        """Multiply."""
        return x * times

    def check(**arguments):
        seen.append(arguments)
        if arguments["x"] < 0:
            raise ValueError("negative")

    guarded = guards.guarded(double, check)
    assert guarded(3) == 6
    assert guarded(x=3, times=5) == 15
    assert seen == [{"x": 3, "times": 2}, {"x": 3, "times": 5}]
    with pytest.raises(ValueError, match="negative"):
        guarded(-1)
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        guarded()
    assert inspect.getsource(guarded) == inspect.getsource(double)
    assert (guarded.__name__, guarded.__doc__) == ("double", "Multiply.")


@pytest.mark.parametrize("value", BAD)
def test_what_is_no_text_is_refused(value):
    with pytest.raises(ValueError, match=r"the answer (must be text that is not blank, got|has half a char)"):
        guards.check_text(value, "the answer")


@pytest.mark.parametrize("value", ["a", " a\n", "Zürich 🐋", "None", "nan", "0"])
def test_what_is_text_passes(value):
    guards.check_text(value, "the answer")


def test_tokens_that_a_tokenizer_lacks_are_named(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    guards.check_ends(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no end token.*set tokenizer\.eos_token"):
        guards.check_ends(tokenizer)
    guards.check_pads(0)
    with pytest.raises(ValueError, match=r"no padding token.*set tokenizer\.pad_token"):
        guards.check_pads(None)


def test_rows_come_as_pairs_and_no_more_than_asked_for():
    task = toy_task(4)
    rows = [("word 0", "yes"), ("word 1", "no"), ("word 2", "yes"), ("word 3", "no")]
    for limit, expected in ((None, 4), (9, 4), (2, 2), (0, 0), (-1, 0)):
        assert list(guards.checked_rows(task, "train", limit)) == rows[:expected]


@pytest.mark.parametrize("column", ["input", "target"])
@pytest.mark.parametrize("value", [None, "", " "])
def test_a_row_without_text_is_named(column, value):
    columns = {"input": ["a", "b", "c"], "target": ["yes", "no", "yes"]}
    columns[column][1] = value
    task = replace(toy_task(), test=Dataset.from_dict(columns))
    assert list(guards.checked_rows(task, "test", limit=1)) == [("a", "yes")]
    expected = (
        rf"row 1 of toy's test split: its column '{column}' must be text that is not blank, got {value!r}"
    )
    with pytest.raises(ValueError, match=expected):
        list(guards.checked_rows(task, "test"))


@pytest.mark.parametrize("values", [[1, 2], [0.5, math.nan], [["a"], ["b"]]])
def test_a_column_of_something_else_is_named(values):
    task = replace(toy_task(), train=Dataset.from_dict({"input": ["a", "b"], "target": values}))
    with pytest.raises(ValueError, match="row 0 of toy's train split: its column 'target' must be text"):
        list(guards.checked_rows(task, "train"))


def test_a_missing_column_or_split_is_named():
    task = replace(toy_task(), train=Dataset.from_dict({"text": ["a"], "target": ["b"]}))
    expected = r"row 0 of toy's train split: its column 'input' is missing, there are \['target', 'text'\]"
    with pytest.raises(ValueError, match=expected):
        list(guards.checked_rows(task, "train"))
    with pytest.raises(ValueError, match="toy has no validation split"):
        list(guards.checked_rows(task, "validation"))
