"""A chapter's size: prose of at most 3,200 words, and an honest number of minutes to read it."""

import json
import re
from pathlib import Path

import pytest
from book_notebook import Chapter, read_chapter

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "book").glob("[0-9]*.ipynb"))
MOST = 3200  # words of prose; tables, code and folded boxes are not counted
WORDS_A_MINUTE, SECONDS_A_LINE = 180, 15
TOLERANCE = 0.2  # of the minutes
STATED = re.compile(r"[Rr]eading(?: everything)?[^.]*? (\d+) minutes")


def words(chapter: Chapter) -> int:
    """Words of the prose, without tables, fenced code and boxes."""
    text = "\n\n".join(cell.source for cell in chapter.prose)
    text = re.sub(r"(?s)(`{3,}|:{3,}).*?\1", "", text)
    text = re.sub(r"(?m)^\|.*$", "", text)
    return sum(bool(re.search(r"[A-Za-z]", word)) for word in text.split())


def minutes(chapter: Chapter) -> float:
    """Time to read the prose and the code in sight, solutions left out."""
    shown = [cell for cell in chapter.code if not cell.hidden and "solution" not in cell.tags]
    lines = sum(len(cell.source.strip().splitlines()) for cell in shown)
    return words(chapter) / WORDS_A_MINUTE + lines * SECONDS_A_LINE / 60


def stated(chapter: Chapter) -> int:
    """The minutes that the page says, or 0."""
    found = STATED.search("\n".join(cell.source for cell in chapter.prose))
    return int(found.group(1)) if found else 0


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
