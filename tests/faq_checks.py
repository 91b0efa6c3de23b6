"""The rules of the pages that answer questions by experiment (20a, 20b and so on), in place of a chapter's.

A question is a section: **You see.**, **Make it happen.**, **Why.** and **Cure.**, in this order, with the
threads in which it was asked, code that makes it happen, and code that shows it gone.
"""

import ast
import re
from dataclasses import dataclass

from book_checks import (
    NOTEBOOK_RULES,
    build_meet_trust,
    claims,
    duration,
    exercises,
    figures,
    predictions,
    sections,
    solutions,
    verdicts,
)
from book_notebook import Cell, Chapter

LEADS = ("You see.", "Make it happen.", "Why.", "Cure.")
FRAME = ("Before you start", "In practice", "Next")
THREAD = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+/(?:issues|pull|discussions)/\d+")
LONGEST = 12  # lines of a cell that makes it happen, blank ones and definitions not counted
FEWEST = 5  # questions of a page
OF_CHAPTERS = {build_meet_trust, claims, duration, exercises, figures, predictions, sections, solutions}
OF_CHAPTERS |= {verdicts}


@dataclass(frozen=True)
class Question:
    """A section: its title, its prose, and the code cells below each lead."""

    title: str
    prose: str
    leads: tuple[str, ...]
    code: dict[str, list[Cell]]


def is_faq(stem: str) -> bool:
    """Whether a notebook answers questions instead of telling a chapter."""
    return re.match(r"\d\d[a-z]_faq_", stem) is not None


def split(chapter: Chapter) -> list[tuple[str, list[Cell]]]:
    """The page's sections: each `## title` with the cells from there to the next one."""
    found = [("", [])]
    for cell in chapter.cells:
        title = re.match(r"(?:\(\S+\)=\s+)?## (.+)", cell.source) if cell.kind == "markdown" else None
        if title:
            found.append((title.group(1).strip(), []))
        found[-1][1].append(cell)
    return found


def questions(chapter: Chapter) -> list[Question]:
    """The sections that are none of the frame's."""
    found = []
    for title, cells in split(chapter):
        if title in ("", *FRAME):
            continue
        leads, code = [], {}
        for cell in cells:
            if cell.kind == "markdown":
                leads += re.findall(r"^\*\*([A-Z][\w ]+\.)\*\*", cell.source, re.M)
            elif leads:
                code.setdefault(leads[-1], []).append(cell)
        prose = "\n".join(cell.source for cell in cells if cell.kind == "markdown")
        found.append(Question(title, prose, tuple(leads), code))
    return found


def frame(chapter: Chapter) -> list[str]:
    """The page says how long it takes, has enough questions, and ends with a decision and the next page."""
    titles = [title for title, _ in split(chapter)]
    problems = [f"{chapter.name}: no section {title!r}" for title in FRAME if title not in titles]
    if len(found := questions(chapter)) < FEWEST:
        problems.append(f"{chapter.name}: {len(found)} questions, expected at least {FEWEST}")
    before = [cells[0].source for title, cells in split(chapter) if title == FRAME[0]]
    if not any(re.search(r"\b(second|minute)s?\b", text) for text in before):
        problems.append(f"{chapter.name}: {FRAME[0]!r} does not say how many minutes it takes")
    return problems


def four_parts(chapter: Chapter) -> list[str]:
    """A question has its four leads in order, and names a thread."""
    problems = []
    for asked in questions(chapter):
        if asked.leads != LEADS:
            problems.append(f"{chapter.name}, {asked.title!r}: leads {asked.leads}, expected {LEADS}")
        if not THREAD.search(asked.prose):
            problems.append(f"{chapter.name}, {asked.title!r}: no link to a thread")
    return problems


def it_happens(chapter: Chapter) -> list[str]:
    """Code makes it happen, in cells of at most 12 lines, and prints what is seen."""
    problems = []
    for asked in questions(chapter):
        cells = asked.code.get("Make it happen.", [])
        if not any(cell.outputs for cell in cells):
            problems.append(f"{chapter.name}, {asked.title!r}: nothing is shown to happen")
        for cell in (cell for cell in cells if not cell.hidden):
            if (lines := own_lines(cell)) > LONGEST:
                problems.append(f"{cell.where}: {lines} lines make it happen, at most {LONGEST}")
    return problems


def own_lines(cell: Cell) -> int:
    """Lines of a cell that are neither blank nor inside a definition."""
    inside = set()
    for node in cell.tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            inside |= set(range(node.lineno - len(node.decorator_list), node.end_lineno + 1))
    lines = enumerate(cell.source.splitlines(), 1)
    return sum(bool(line.strip()) for number, line in lines if number not in inside)


def it_is_gone(chapter: Chapter) -> list[str]:
    """Code below the cure asserts that it is gone."""
    problems = []
    for asked in questions(chapter):
        cells = asked.code.get("Cure.", [])
        if not any(re.search(r"^ *assert(_\w+\(|\b)", cell.source, re.M) for cell in cells):
            problems.append(f"{chapter.name}, {asked.title!r}: no code below the cure asserts anything")
    return problems


FAQ_RULES = (frame, four_parts, it_happens, it_is_gone)
FAQ_RULES += tuple(rule for rule in NOTEBOOK_RULES if rule not in OF_CHAPTERS)
