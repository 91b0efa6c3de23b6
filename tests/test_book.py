"""The book keeps its rules: each of `book_checks.py` on each chapter, and those of `book_pages.py`."""

from functools import cache
from pathlib import Path

import pytest
from book_checks import NOTEBOOK_RULES
from book_notebook import Chapter, read_chapter
from book_pages import BOOK_RULES, book_pages
from faq_checks import FAQ_RULES, is_faq

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = [path for path in book_pages(ROOT) if path.suffix == ".ipynb"]


@cache
def chapter(path: Path) -> Chapter:
    """Each notebook is read and parsed once."""
    return read_chapter(path)


def test_there_is_a_chapter():
    assert CHAPTERS


RULES = [(path, rule) for path in CHAPTERS for rule in (FAQ_RULES if is_faq(path.stem) else NOTEBOOK_RULES)]


@pytest.mark.parametrize(
    ("path", "rule"), RULES, ids=[f"{path.stem}-{rule.__name__}" for path, rule in RULES]
)
def test_chapter(path, rule):
    problems = rule(chapter(path))
    assert not problems, "\n".join(["", rule.__doc__, *problems])


@pytest.mark.parametrize("rule", BOOK_RULES, ids=lambda rule: rule.__name__)
def test_book(rule):
    problems = rule(ROOT)
    assert not problems, "\n".join(["", rule.__doc__, *problems])
