"""The checks of a learner's notebook: they stop at `...`, pass what is right, and do not tell the answer."""

import ast
import types

import numpy as np
import pytest
import torch
import workshop_answers as answers
import workshop_checks as check
from lora2qlora.lab.noise import Effect
from workshop_cells import guessed
from workshop_prose import plain_markdown


def empty(a, b=1): ...


def written(a):
    return a + 1


@pytest.mark.parametrize("value", [..., empty])
def test_what_is_not_filled_in_stops_with_a_sentence(value):
    with pytest.raises(check.FillIn, match=r"replace `\.\.\.`. Still open: mine"):
        check.filled(mine=value, other=1)


def test_what_is_filled_in_passes():
    check.filled(a=0, b=None, c=written, d=torch.zeros(2))


def test_jupyter_shows_the_sentence_alone():
    assert check.FillIn("do it")._render_traceback_() == ["FillIn: do it"]


@pytest.mark.parametrize(
    ("one", "other"),
    [(2, np.int64(2)), (0.5, torch.tensor(0.5)), ([1, 2], torch.tensor([1, 2])), ({"b", "a"}, {"a", "b"})],
)
def test_a_value_is_the_same_from_any_library(one, other):
    assert check.plain(one) == check.plain(other)


def run(assertion, **names):
    """The check of an assertion, with those names."""
    lines = answers.hidden(ast.parse(assertion).body[0])
    exec("\n".join(lines), {"check": check, "abs": abs, **names})
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("assertion", "right", "wrong"),
    [
        ("assert x == 44", 44, 45),
        ("assert x == 4 * 5", 20, 21),
        ("assert x == [3, 14]", np.array([3, 14]), [14, 3]),
        ("assert 0.32 < x < 0.35", 0.33, 0.36),
        ("assert 0.32 < x < 0.35", 0.34, 0.31),
        ("assert 1500 < x < 1560", 1530, 1490),
        ("assert x < 3", 2, 4),
        ("assert x <= 3", 3, 4),
        ("assert 0 < x < 0.006", 0.003, 0.007),
        ("assert 0 < x < 0.006", 0.003, -1),
        ("assert bool(x)", 1, 0),
        ("assert x != 3", 4, 3),
    ],
)
def test_a_check_says_what_the_assertion_says(assertion, right, wrong):
    run(assertion, x=right)
    with pytest.raises(check.NotYet):
        run(assertion, x=wrong)


@pytest.mark.parametrize(
    ("assertion", "x", "secret"),
    [
        ("assert x == 4444", 4444, "4444"),
        ("assert 0.32 < x < 0.35", 0.33, "0.3"),
        ("assert x == 'no'", "no", "'no'"),
    ],
)
def test_the_answer_is_not_in_clear(assertion, x, secret):
    assert secret not in run(assertion, x=x)


def test_the_sign_of_a_comparison_is_not_in_clear():
    lines = answers.hidden(ast.parse("assert told < trained").body[0])
    assert "<" not in "".join(lines)


def test_tests_that_stand_between_steps_are_not_used():
    between = ast.parse("assert f(x)\nassert not f(x)").body
    assert answers.of_the_end(between) == []
    assert answers.of_the_end(between[:1]) == between[:1]


def test_a_printed_line_is_compared_to_the_letter(capsys):
    with check.says("here", check.secret("here", "rank 44")):
        print("rank", 44)
    with pytest.raises(check.NotYet), check.says("here", check.secret("here", "rank 44")):
        print("rank", 45)
    assert "rank 45" in capsys.readouterr().out


def test_on_a_gpu_a_printed_line_is_only_shown(monkeypatch):
    cuda = types.SimpleNamespace(is_available=lambda: True)
    monkeypatch.setitem(check.sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    with check.says("here", check.secret("here", "rank 44")):
        print("rank 45")


def test_a_guess_is_kept_and_shown_beside_what_came_out(capsys):
    check.guess(predicted_gain=0.4)
    check.show(measured_gain=0.5, measured_other=[1])
    check.show(measured_gain=Effect(0.8, 0.01, 9))
    assert capsys.readouterr().out.splitlines() == [
        "measured_gain = 0.5; you guessed 0.4, which is 20% off",
        "measured_other = [1]",
        "measured_gain = 0.8, standard error 0.01, 9 pairs; you guessed 0.4, which is 50% off",
    ]


def test_a_verdict_is_one_of_three_words_and_the_books():
    hashes = [check.secret("Claim 1", "FAILS")]
    check.verdict("Claim 1", "FAILS", hashes)
    for word, kind, message in [
        ("HOLDS", check.NotYet, "not yet"),
        ("yes", check.NotYet, "one of HOLDS, FAILS, UNDECIDED"),
        (..., check.FillIn, "Still open: verdict"),
    ]:
        with pytest.raises(kind, match=message):
            check.verdict("Claim 1", word, hashes)
    check.verdict("Claim 1", "HOLDS", hashes, page=False)  # another model than the page's


def test_lists_are_computed_and_values_are_guessed():
    source = "predicted_a = 2.0\npredicted_b, predicted_c = 1, 2\npredicted_d = {1: 2}\nother = 3"
    assert guessed(types.SimpleNamespace(tree=ast.parse(source))) == [
        "predicted_a",
        "predicted_b",
        "predicted_c",
    ]


def test_prose_becomes_plain_and_keeps_no_solution():
    text = (
        "This was the way.\n\n:::{solution-end}\n:::\n"
        "See {term}`NF4 <nf4>` and {term}`rank` {cite:p}`hu2021`.\n\n"
        ":::{exercise-start}\n:label: x-y\n:::\n**Easy.** Do it.\n:::{exercise-end}\n:::\n\n"
        ":::{solution-start} x-y\n:class: dropdown\n:::\nThe answer is 44.\n"
    )
    assert plain_markdown(text) == "See NF4 and rank.\n\n**Exercise** `x-y`\n\n**Easy.** Do it."
