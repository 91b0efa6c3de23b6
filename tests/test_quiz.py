"""The page "Quiz": what its data promise, figures that the chapters print, and its script."""

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import yaml
from book_notebook import read_chapter
from docutils.nodes import make_id

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"
PAGE, DATA, SCRIPT = BOOK / "quiz.md", BOOK / "_static" / "quiz_data.js", BOOK / "_static" / "quiz.js"
FIGURE = re.compile(r"`([^`]+)`")


def parts(text: str | None = None) -> list[dict]:
    """The data: what stands behind `var QUIZ =`, which is JSON."""
    text = DATA.read_text(encoding="utf-8") if text is None else text
    return json.loads(re.fullmatch(r"/\*.*?\*/\nvar QUIZ = (.*);\n", text, re.S)[1])


def questions() -> list[dict]:
    return [question for part in parts() for question in part["questions"]]


every_question = pytest.mark.parametrize("question", questions(), ids=lambda question: question["id"])


@cache
def chapter(stem: str) -> tuple[str, list[str]]:
    """All that a chapter's cells print, and its headings."""
    read = read_chapter(BOOK / f"{stem}.ipynb")
    printed = "\n".join(text for cell in read.code for text in cell.output_texts)
    prose = "\n".join(cell.source for cell in read.prose)
    return printed, [title.replace("`", "") for title in re.findall(r"^#+ (.+)$", prose, re.M)]


def test_each_part_of_the_book_has_five_questions():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))["parts"]
    captions = {part["caption"]: part["chapters"] for part in toc if part["caption"].startswith("Part")}
    assert [f"Part {part['part']}: {part['title']}" for part in parts()] == list(captions)
    for part, chapters in zip(parts(), captions.values(), strict=True):
        stems = {Path(entry["file"]).name for entry in chapters}
        assert len(part["questions"]) == 5
        assert {question["chapter"] for question in part["questions"]} <= stems
    assert max(Counter(question["id"] for question in questions()).values()) == 1


def test_the_page_has_a_place_for_each_part():
    page = PAGE.read_text(encoding="utf-8")
    for number, part in enumerate(parts(), start=1):
        assert f"(quiz-{number})=\n## Part {part['part']}: {part['title']}\n" in page
        for place in (f"quiz-part-{part['part']}", f"quiz-score-{part['part']}"):
            assert page.count(f'id="{place}"') == 1
        assert f"(quiz-{number})" in (BOOK / "index.md").read_text(encoding="utf-8")


@every_question
def test_one_answer_is_right_and_each_wrong_one_is_somebody_s(question):
    options = question["options"]
    assert len(options) in (3, 4)
    assert sum(option["right"] for option in options) == 1
    assert len({option["text"] for option in options}) == len(options)
    for option in options:
        assert len(option["text"].split()) <= 25
        assert len(option["why"].split()) <= 60
        assert option["right"] == ("said" not in option)
        if not option["right"]:
            assert option["said"]["name"]
            assert option["said"]["url"] == "index.html" or option["said"]["url"].startswith("https://")


def test_the_right_answer_stands_in_every_place():
    places = Counter(i for q in questions() for i, option in enumerate(q["options"]) if option["right"])
    assert all(places[i] >= 5 for i in range(3))


@every_question
def test_the_right_answer_is_not_the_longest_by_far(question):
    """Else its length would give it away."""
    (right,) = [len(option["text"]) for option in question["options"] if option["right"]]
    assert right <= 1.4 * max(len(option["text"]) for option in question["options"] if not option["right"])


@every_question
def test_the_section_that_answers_is_there(question):
    assert question["section"] in chapter(question["chapter"])[1]
    assert question["anchor"] == make_id(question["section"])


def unprinted(option: dict, stem: str) -> list[str]:
    """The figures of an explanation that its chapter does not print; or that there are none."""
    figures = FIGURE.findall(option["why"])
    printed = chapter(option.get("chapter", stem))[0]
    return [figure for figure in figures if figure not in printed] if figures else ["no figure"]


@every_question
def test_what_an_explanation_quotes_is_printed_by_its_chapter(question):
    assert [unprinted(option, question["chapter"]) for option in question["options"]] == [[]] * len(
        question["options"]
    )


@every_question
def test_a_percentage_outside_of_quotes_is_in_the_chapter(question):
    """Prose repeats a few figures of the chapter; none of its own."""
    prose = "\n".join(cell.source for cell in read_chapter(BOOK / f"{question['chapter']}.ipynb").prose)
    known = (chapter(question["chapter"])[0] + prose).replace(" %", "%")
    for option in question["options"]:
        loose = FIGURE.sub("", option["why"]).replace(" %", "%")
        assert [figure for figure in re.findall(r"\d[\d.]*%", loose) if figure not in known] == []


def test_a_figure_that_no_cell_prints_is_found():
    assert unprinted({"why": "Of it `97% is left`."}, "15_merging") == ["97% is left"]
    assert unprinted({"why": "Nearly all."}, "15_merging") == ["no figure"]
    assert unprinted({"why": "`1.01 (0.98 to 1.04)`", "chapter": "14_fast"}, "15_merging") == []


# --- the script ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def context():
    """The script and its data without a page."""
    quickjs = pytest.importorskip("quickjs", reason="quickjs has no wheel for this Python or this machine")
    made = quickjs.Context()
    made.eval(DATA.read_text(encoding="utf-8") + SCRIPT.read_text(encoding="utf-8"))
    made.eval("var all = QUIZ.reduce(function (some, part) { return some.concat(part.questions); }, []);")
    return made


@pytest.mark.parametrize(
    ("stored", "chosen"),
    [
        ('{"rank": 2, "nf4": 0}', {"rank": 2, "nf4": 0}),
        ('{"rank": 3, "nf4": -1, "blocks": 0.5}', {}),
        ('{"rank": "2", "nf4": true, "other": 1, "__proto__": 1, "tail": "length"}', {}),
        ("null", {}),
        ("no json", {}),
        ("[2]", {}),
    ],
)
def test_whatever_is_stored_gives_answers_or_none(context, stored, chosen):
    assert json.loads(context.eval(f"JSON.stringify(Quiz.read({json.dumps(stored)}, all))")) == chosen
    assert context.eval("JSON.stringify(Quiz.read(null, all))") == "{}"


def test_the_score_adds_up(context):
    right = {q["id"]: i for q in questions() for i, option in enumerate(q["options"]) if option["right"]}
    chosen = {"rank": right["rank"], "nf4": (right["nf4"] + 1) % 3}
    said = context.eval(f"Quiz.score({json.dumps(chosen)}, all)")
    assert said == "Right: 1 of 25. Not right: 1. Not answered: 23."
    assert context.eval(f"Quiz.score({json.dumps(right)}, all)").startswith("Right: 25 of 25.")


def test_quotes_are_every_second_piece(context):
    assert json.loads(context.eval('JSON.stringify(Quiz.pieces("so `3%` is"))')) == ["so ", "3%", " is"]
    texts = [option["why"] for q in questions() for option in q["options"]]
    assert all(text.count("`") % 2 == 0 for text in texts)


def test_the_script_needs_no_other_host_and_makes_no_markup():
    text = SCRIPT.read_text(encoding="utf-8")
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "http:", "https:"):
        assert way not in text
    page = PAGE.read_text(encoding="utf-8")
    for name in re.findall(r'getElementById\("([\w-]+)"\)', text):
        assert f'id="{name}"' in page
    assert page.index('src="../_static/quiz_data.js"') < page.index('src="../_static/quiz.js"')
