"""The minutes of a workshop, from the chapters, a record of runs, and a few rules.

A minute comes from the words and the code of a section (book_sizes.py), from the CPU-seconds of a run
(workshop_seconds.json, which `python tests/workshop_run.py --record` measures), or from a rule below.
"""

import json
import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from book_notebook import Chapter, directives, read_chapter
from book_sizes import minutes, section

ROOT = Path(__file__).resolve().parents[1]
SECONDS = ROOT / "tests" / "workshop_seconds.json"
ANSWER = 1  # minutes for a cell to fill in, a guess or a verdict
EXERCISE = {"Easy": 5, "Medium": 10, "Hard": 20}  # minutes
PICTURE = 5  # minutes to look at a figure and to say what it shows
SESSION = 90  # minutes of a term's session


@cache
def chapter(number: str) -> Chapter:
    """The chapter of that number, as "03"."""
    return read_chapter(next((ROOT / "book").glob(f"{number}_*.ipynb")))


def numbers() -> list[str]:
    """The numbers of all chapters."""
    return [path.name.split("_")[0] for path in sorted((ROOT / "book").glob("[0-9]*.ipynb"))]


def measured() -> dict[str, int]:
    """By chapter, the CPU-seconds of a whole run with the solutions."""
    return json.loads(SECONDS.read_text(encoding="utf-8"))


def waiting(number: str) -> int:
    """Minutes until a chapter has run, on one core; the longest measured wait where it was not measured."""
    found = measured()
    return math.ceil(found.get(chapter(number).path.stem, max(found.values())) / 60)


def answers(part: Chapter) -> int:
    """How many guesses and verdicts a part asks for."""
    return sum(bool({"predict", "verdict"} & set(cell.tags)) for cell in part.code)


def exercises(number: str) -> dict[str, str]:
    """The level of each exercise, by its label."""
    text = "\n".join(cell.source for cell in chapter(number).prose)
    labels = [d.options["label"] for d in directives(text) if d.name == "exercise-start"]
    return dict(zip(labels, re.findall(r"(?m)^\*\*(Easy|Medium|Hard)[.:]", text), strict=True))


def link(number: str) -> str:
    """A chapter's number, as a link."""
    return f"[{number}]({chapter(number).name})"


@dataclass(frozen=True)
class Talk:
    """So many minutes that are the room's: welcome, break, discussion."""

    length: int
    text: str

    def row(self) -> tuple[int, str]:
        """Minutes, and what is done."""
        return self.length, self.text


@dataclass(frozen=True)
class Work:
    """Sections of a chapter, read, guessed, run and judged. `runs` where the wait for the run counts."""

    number: str
    titles: tuple[str, ...]
    runs: bool = True

    def row(self) -> tuple[int, str]:
        """Minutes, and what is done."""
        parts = [section(chapter(self.number), title) for title in self.titles]
        asked = sum(map(answers, parts))
        length = math.ceil(sum(map(minutes, parts))) + ANSWER * asked + self.runs * waiting(self.number)
        fill = f"; {asked} cells to fill in" if asked else ""
        return length, f"{link(self.number)}, {', '.join(f'*{t}*' for t in self.titles)}{fill}"


@dataclass(frozen=True)
class Claims:
    """A chapter by its claims alone: read them, guess, run, judge."""

    number: str

    def row(self) -> tuple[int, str]:
        """Minutes, and what is done."""
        asked = answers(chapter(self.number))
        length = math.ceil(minutes(section(chapter(self.number), "Claims"))) + ANSWER * asked
        return length + waiting(self.number), f"{link(self.number)}, claims alone; {asked} cells to fill in"


@dataclass(frozen=True)
class Picture:
    """One figure, shown from the solutions. `alt` is how its description begins."""

    number: str
    alt: str
    text: str

    def row(self) -> tuple[int, str]:
        """Minutes, and what is done. Raises KeyError unless one figure is meant."""
        cells = [
            c.metadata.get("mystnb", {}).get("image", {}).get("alt", "") for c in chapter(self.number).code
        ]
        if sum(alt.startswith(self.alt) for alt in cells) != 1:
            raise KeyError(f"chapter {self.number} has not one figure that begins {self.alt!r}")
        return PICTURE, f"Shown: {self.text} ({link(self.number)})"


@dataclass(frozen=True)
class Exercise:
    """An exercise of a chapter, by its label."""

    number: str
    label: str
    text: str

    def row(self) -> tuple[int, str]:
        """Minutes, and what is done. Raises KeyError where there is no such exercise."""
        length = EXERCISE[exercises(self.number)[self.label]]
        return length, f"{link(self.number)}, exercise `{self.label}`: {self.text}"


@dataclass(frozen=True)
class Own:
    """Chapter 00 once more, with another setting."""

    length: int
    text: str

    def row(self) -> tuple[int, str]:
        """Minutes, the run included."""
        return self.length + waiting("00"), self.text


def clock(minute: int) -> str:
    """Minutes from the start as 1:05."""
    return f"{minute // 60}:{minute % 60:02}"


def total(track: list) -> int:
    """Minutes of a track."""
    return sum(item.row()[0] for item in track)


def timetable(track: list) -> str:
    """A table: from when, how long, what."""
    lines, now = ["| at | min | what |", "|--:|--:|:--|"], 0
    for item in track:
        length, text = item.row()
        lines.append(f"| {clock(now)} | {length} | {text} |")
        now += length
    return "\n".join([*lines, f"| {clock(now)} | | end |"])


def exercise_minutes(number: str) -> int:
    """Minutes for all exercises of a chapter."""
    return sum(EXERCISE[level] for level in exercises(number).values())


def term() -> str:
    """Every chapter with its minutes and the sessions that it fills."""
    lines = ["| chapter | read | run | fill in | exercises | sessions |", "|:--|--:|--:|--:|--:|--:|"]
    for number in numbers():
        parts = [round(minutes(chapter(number))), waiting(number), ANSWER * answers(chapter(number))]
        parts.append(exercise_minutes(number))
        sessions = math.ceil(sum(parts) / SESSION)
        lines.append(f"| {link(number)} | {' | '.join(map(str, parts))} | {sessions} |")
    return "\n".join(lines)
