"""A chapter's size: prose of at most 3,200 words, and an honest number of minutes to read it."""

import json
from pathlib import Path

import pytest
from book_notebook import Chapter, read_chapter
from book_sizes import minutes, stated, words

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "book").glob("[0-9]*.ipynb"))
MOST = 3200  # words of prose; tables, code and folded boxes are not counted
TOLERANCE = 0.2  # of the minutes


def is_honest(chapter: Chapter) -> bool:
    return abs(stated(chapter) - minutes(chapter)) <= TOLERANCE * minutes(chapter)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_prose_is_short(path):
    assert words(read_chapter(path)) <= MOST


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_stated_minutes_are_those_of_the_page(path):
    chapter = read_chapter(path)
    assert is_honest(chapter), f"{path.stem} says {stated(chapter)} minutes, expected {minutes(chapter):.0f}"


def a_chapter(tmp_path, said="", code="x = 1", tags=()):
    """180 words and some lines of code."""
    text = (
        f"Reading takes about {said} minutes. " + "word " * 175 + "\n\n| a | table |\n\n:::{note}\nbox\n:::"
    )
    cells = [{"cell_type": "markdown", "metadata": {}, "source": text}]
    cells += [{"cell_type": "code", "metadata": {"tags": list(tags)}, "outputs": [], "source": code}]
    path = tmp_path / "00_a.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return read_chapter(path)


@pytest.mark.parametrize(("said", "honest"), [("2", True), ("1", False), ("3", False), ("no", False)])
def test_minutes_that_are_off_are_found(tmp_path, said, honest):
    chapter = a_chapter(tmp_path, said, "x = 1\n" * 4)
    assert words(chapter) in (179, 180)
    assert is_honest(chapter) == honest


def test_hidden_code_and_solutions_take_no_time(tmp_path):
    assert round(minutes(a_chapter(tmp_path, "1", "x = 1\n" * 40, ["hide-cell"]))) == 1
    assert round(minutes(a_chapter(tmp_path, "1", "x = 1\n" * 40, ["solution"]))) == 1
    assert round(minutes(a_chapter(tmp_path, "1", "x = 1\n" * 40))) == 11
