"""The rule of noise: against numpy, its symmetry, and what it refuses."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2qlora.lab.noise import Effect, paired_effect, relative_effect

numbers = st.floats(-1e3, 1e3)
pairs = st.lists(st.tuples(numbers, numbers), min_size=3, max_size=20)


@settings(max_examples=100, deadline=None)
@given(pairs)
def test_mean_and_error_are_numpys(rows):
    values, others = zip(*rows, strict=True)
    differences = np.subtract(values, others)
    effect = paired_effect(values, others)
    assert effect.mean == pytest.approx(differences.mean(), abs=1e-9)
    assert effect.error == pytest.approx(differences.std(ddof=1) / math.sqrt(len(rows)), abs=1e-9)
    assert effect.pairs == len(rows)


@settings(max_examples=100, deadline=None)
@given(pairs, numbers)
def test_turned_round_the_verdict_is_the_other_one(rows, threshold):
    values, others = zip(*rows, strict=True)
    one, other = paired_effect(values, others), paired_effect(others, values)
    assert one.exceeds(threshold) == other.stays_below(-threshold)


@pytest.mark.parametrize(
    ("mean", "above", "below"),
    [
        (2.01, "HOLDS", "FAILS"),
        (2.0, "UNDECIDED", "UNDECIDED"),
        (-2.0, "UNDECIDED", "UNDECIDED"),
        (-2.01, "FAILS", "HOLDS"),
    ],
)
def test_two_standard_errors_decide(mean, above, below):
    effect = Effect(mean, 1.0, 3)
    assert effect.exceeds() == above
    assert effect.stays_below() == below
    assert Effect(mean + 7, 1.0, 3).exceeds(7) == above


def test_equal_pairs_are_undecided_and_equal_shifts_decided():
    assert paired_effect([1, 2, 3], [1, 2, 3]).exceeds() == "UNDECIDED"
    assert paired_effect([2, 3, 4], [1, 2, 3]).exceeds() == "HOLDS"


@pytest.mark.parametrize(
    ("values", "others", "message"),
    [
        ([1, 2], [1, 2], "3 pairs or more, got 2 and 2"),
        ([1, 2, 3], [1, 2], "got 3 and 2"),
        ([1, math.nan, 3], [1, 2, 3], "pair 1 is not finite"),
        ([1, 2, math.inf], [1, 2, 3], "pair 2 is not finite"),
    ],
)
def test_what_says_nothing_is_refused(values, others, message):
    with pytest.raises(ValueError, match=message):
        paired_effect(values, others)


def test_a_relative_effect_is_the_same_at_every_size():
    effect = relative_effect([1.1, 22.0, 330.0], [1, 20, 300])
    assert effect.mean == pytest.approx(math.log(1.1))
    assert effect.error == pytest.approx(0, abs=1e-12)
    back = relative_effect([1, 20, 300], [1.1, 22.0, 330.0])
    assert back.mean == pytest.approx(-effect.mean)


@pytest.mark.parametrize("value", [0, -1.0, math.nan])
def test_no_relative_effect_of_what_is_not_positive(value):
    with pytest.raises(ValueError, match=f"positive values, got {value}"):
        relative_effect([1, 2, 3], [1, value, 3])
