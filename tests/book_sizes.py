"""How long a chapter, or a section of one, takes to read."""

import re

from book_notebook import Chapter

WORDS_A_MINUTE, SECONDS_A_LINE = 180, 15
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


def section(chapter: Chapter, title: str) -> Chapter:
    """The cells below `## title`, up to the next such heading.

    Raises KeyError, with the titles that there are.
    """
    found, titles, inside = [], [], False
    for raw, cell in zip(chapter.notebook["cells"], chapter.cells, strict=True):
        if cell.kind == "markdown" and (heading := re.search(r"(?m)^## (.+)$", cell.source)):
            inside = heading[1].strip() == title
            titles.append(heading[1].strip())
        if inside:
            found.append(raw)
    if not found:
        raise KeyError(f"{chapter.name} has no section {title!r}, it has {titles}")
    return Chapter(chapter.path, {"cells": found})
