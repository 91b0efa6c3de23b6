"""Each rule of the pages of questions can fail: a good page, and one defect at a time."""

import pytest
from book_notebook import Chapter
from faq_checks import four_parts, frame, is_faq, it_happens, it_is_gone, own_lines, questions

THREAD = "[peft #1](https://github.com/huggingface/peft/issues/1)"


def prose(text):
    return {"cell_type": "markdown", "metadata": {}, "source": text}


def code(source, text="seen\n"):
    outputs = [{"output_type": "stream", "name": "stdout", "text": [text]}] if text else []
    return {"cell_type": "code", "metadata": {}, "outputs": outputs, "source": source}


def question(number):
    return [
        prose(f"## Fault {number}\n\n**You see.** It ({THREAD}).\n\n**Make it happen.** So:"),
        code("print('seen')"),
        prose("**Why.** Because.\n\n**Cure.** Do it:"),
        code("assert True\nprint('gone')"),
    ]


def page(*edits):
    cells = [prose("# Faults\n\nYou mend them."), prose("## Before you start\n\nIt takes a minute.")]
    cells += [cell for number in range(5) for cell in question(number)]
    cells += [prose("## In practice\n\nLook first."), prose("## Next\n\nMore.")]
    for old, new in edits:
        cells = [cell | {"source": cell["source"].replace(old, new)} for cell in cells]
    return cells


def chapter(tmp_path, cells):
    return Chapter(tmp_path / "20a_faq_faults.ipynb", {"cells": cells})


RULES = (frame, four_parts, it_happens, it_is_gone)


def test_a_good_page_keeps_the_rules(tmp_path):
    good = chapter(tmp_path, page())
    assert [rule(good) for rule in RULES] == [[]] * 4
    assert [asked.title for asked in questions(good)] == [f"Fault {n}" for n in range(5)]


@pytest.mark.parametrize(
    ("rule", "edit", "said"),
    [
        (frame, ("## In practice", "## In theory"), "no section 'In practice'"),
        (frame, ("a minute", "long"), "how many minutes"),
        (frame, ("## Fault 3", "### Fault 3"), "4 questions"),
        (four_parts, ("**Why.**", "Why."), "'Fault 0': leads"),
        (four_parts, ("**Cure.** Do it", "**Cause.** Done"), "'Fault 4': leads"),
        (four_parts, (THREAD, "somewhere"), "'Fault 0': no link to a thread"),
        (it_happens, ("print('seen')", "\n".join(["print('seen')"] * 13)), "13 lines make it happen"),
        (it_is_gone, ("assert True\n", ""), "'Fault 0': no code below the cure asserts"),
    ],
)
def test_a_defect_is_found(tmp_path, rule, edit, said):
    assert any(said in problem for problem in rule(chapter(tmp_path, page(edit))))


def test_what_happens_is_shown(tmp_path):
    silent = [cell | ({"outputs": []} if "outputs" in cell else {}) for cell in page()]
    assert any("nothing is shown" in problem for problem in it_happens(chapter(tmp_path, silent)))


def test_definitions_and_blank_lines_do_not_count(tmp_path):
    source = "@cache\ndef one():\n    return 1\n\n\nassert one() == 1"
    (cell,) = chapter(tmp_path, [code(source)]).code
    assert own_lines(cell) == 1


@pytest.mark.parametrize(
    ("stem", "is_one"), [("20a_faq_training", True), ("20_faq", False), ("05_rank", False)]
)
def test_which_pages_they_are(stem, is_one):
    assert is_faq(stem) == is_one
