"""The page "Interview": thirty questions, figures that their chapters print, and a small script."""

import json
import random
import re
from functools import cache
from pathlib import Path

import pytest
from book_notebook import read_chapter

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "book" / "interview.md"
SCRIPT = ROOT / "book" / "_static" / "interview.js"
PARTS = ("Answer", "The next question", "Heard most often", "What refutes it")
LEVELS = ("Junior", "Mid", "Senior", "Staff")
CARD = re.compile(r"^:::\{dropdown\} (\d+)\. ([^\n]+\?)$\n(.*?)^:::$", re.M | re.S)
FIGURE = re.compile(r"`([^`]+)`")


def cards() -> list[tuple[str, str, str]]:
    """(number, question, text) of each."""
    return CARD.findall(PAGE.read_text(encoding="utf-8"))


def part(text: str, name: str) -> str:
    """What a card says under one of its four titles."""
    (found,) = re.findall(rf"^\*\*{re.escape(name)}\.\*\* (.+)$", text, re.M)
    return found


@cache
def printed(chapter: str) -> str:
    """All that a chapter's cells print."""
    cells = read_chapter(ROOT / "book" / chapter).code
    return "\n".join(text for cell in cells for text in cell.output_texts)


def test_there_are_thirty_questions_in_their_order():
    assert [number for number, _, _ in cards()] == [str(n) for n in range(1, 31)]
    assert len({question for _, question, _ in cards()}) == 30
    assert tuple(re.findall(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), re.M)) == LEVELS


@pytest.mark.parametrize(("number", "question", "text"), cards(), ids=lambda value: str(value)[:30])
def test_a_question_has_its_parts_and_a_minute_of_answer(number, question, text):
    assert f":name: interview-{number}\n:class-container: interview-card\n" in text
    assert re.findall(r"^\*\*(.+?)\.\*\*", text, re.M) == list(PARTS)
    assert 20 <= len(part(text, "Answer").split()) <= 150  # at most what one says in a minute


def unprinted(text: str) -> list[str]:
    """The figures of a refutation that its chapter does not print; or that there are none."""
    said = part(text, "What refutes it")
    (chapter,) = re.findall(r"\]\((\w+\.ipynb)\)", said)
    figures = FIGURE.findall(said)
    return [f for f in figures if f not in printed(chapter)] if figures else ["no figure"]


@pytest.mark.parametrize(("number", "question", "text"), cards(), ids=lambda value: str(value)[:30])
def test_what_refutes_the_wrong_answer_is_printed_by_its_chapter(number, question, text):
    assert unprinted(text) == []


def test_a_figure_that_no_cell_prints_is_found():
    refuted = (
        "**What refutes it.** [Chapter 15](15_merging.ipynb), claim 1: `of what training gained, 4% is left`."
    )
    assert unprinted(refuted) == ["of what training gained, 4% is left"]
    assert unprinted("**What refutes it.** [Chapter 15](15_merging.ipynb), claim 1.") == ["no figure"]


# --- the script ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def context():
    """The script without a page."""
    quickjs = pytest.importorskip("quickjs", reason="quickjs has no wheel for this Python or this machine")
    made = quickjs.Context()
    made.eval(SCRIPT.read_text(encoding="utf-8"))
    return made


def test_shuffling_gives_every_order_alike(context):
    chance, counts = random.Random(0), {}
    context.add_callable("chance", chance.random)
    for _ in range(3000):
        order = context.eval("JSON.stringify(Interview.shuffled(3, chance))")
        counts[order] = counts.get(order, 0) + 1
    assert sorted(map(json.loads, counts)) == [
        [0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]
    ]  # fmt: skip
    assert all(abs(count - 500) < 100 for count in counts.values())


@pytest.mark.parametrize(
    ("stored", "marks"),
    [
        ('{"a": true, "b": false}', {"a": True, "b": False}),
        ('{"a": 1, "c": true, "__proto__": true}', {}),
        ("null", {}),
        ("no json", {}),
        ("[true, false]", {}),
    ],
)
def test_whatever_is_stored_gives_marks_or_none(context, stored, marks):
    found = context.eval(f'JSON.stringify(Interview.read({json.dumps(stored)}, ["a", "b"]))')
    assert json.loads(found) == marks
    assert context.eval('JSON.stringify(Interview.read(null, ["a"]))') == "{}"


def test_the_score_adds_up(context):
    said = context.eval('Interview.score({a: true, b: false, c: true}, ["a", "b", "c", "d"])')
    assert said == "Known: 2 of 4. Not yet: 1. Not tried: 1."


def test_the_script_needs_no_other_host_and_makes_no_markup():
    text = SCRIPT.read_text(encoding="utf-8")
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "http:", "https:"):
        assert way not in text
    page = PAGE.read_text(encoding="utf-8")
    for name in re.findall(r'getElementById\("([\w-]+)"\)', text):
        assert f'id="{name}"' in page
    assert 'src="../_static/interview.js"' in page
