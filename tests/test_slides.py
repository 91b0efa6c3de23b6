"""The slides of the one-day track: they fit the day, say little at a time, and measure nothing themselves."""

import re
from pathlib import Path

import pytest
import slides_deck
import slides_sources
from book_notebook import directives
from slides_deck import Slide, is_predicted, read_slides, slots

ROOT = Path(__file__).resolve().parents[1]
DECK = slides_deck.DECK.read_text(encoding="utf-8")
SLIDES = read_slides(DECK)
TRACK = ["00", "03", "04", "07", "10", "11", "13"]
# What a deck may say in figures without measuring: bits, ranks, block sizes, a card.
SETTINGS = {"0", "1", "2", "4", "8", "16", "24", "32", "64", "512"}
TYPED = re.compile(r"(?<![\w.,])\d[\d,.]*\w*(?:\s?%)?")
GOOD = "# 09:00–09:10 A\nminutes: 10\n\nText.\n\nNotes: Say it.\n"


def by_slot() -> dict[str, list[Slide]]:
    """The slides of each slot by its title, the opening slide included."""
    found = {}
    for slide in SLIDES:
        if slide.slot:
            chapter = found.setdefault(slide.title, [])
        chapter.append(slide)
    return found


CHAPTERS = {title[:2]: slides for title, slides in by_slot().items() if title[:2].isdigit()}


# --- The day -------------------------------------------------------------------------------------


def wrong_times(slides: list[Slide]) -> list[str]:
    """Slots whose slides do not add up to them, or that do not begin where the one before ends."""
    problems, now = [], None
    for title, start, end, minutes in slots(slides):
        if minutes != end - start:
            problems.append(f"{title}: {minutes} minutes on slides, {end - start} in the day")
        if now not in (None, start):
            problems.append(f"{title}: begins at {slides_deck.clock(start)}, not {slides_deck.clock(now)}")
        now = end
    return problems


def test_the_minutes_of_the_slides_add_up_to_the_day():
    assert wrong_times(SLIDES) == []
    assert slots(SLIDES)[0][1] == 9 * 60
    assert slots(SLIDES)[-1][2] == 17 * 60
    assert sum(slide.minutes for slide in SLIDES) == 8 * 60


def test_minutes_that_do_not_add_up_are_found():
    late = read_slides(GOOD + "# 09:15–09:20 B\nminutes: 4\n\nNotes: Say it.\n")
    assert wrong_times(late) == ["B: 4 minutes on slides, 5 in the day", "B: begins at 09:15, not 09:10"]


def test_the_track_is_whole_and_of_forty_to_sixty_slides():
    assert list(CHAPTERS) == TRACK
    assert 40 <= sum(slide.title not in ("Break", "Lunch") for slide in SLIDES) <= 60


@pytest.mark.parametrize("number", TRACK)
def test_a_chapter_asks_practises_warns_and_ends(number):
    slides = CHAPTERS[number]
    notes = " ".join(slide.notes for slide in slides).replace("\n", " ")
    assert slides[0].asked.endswith("?")
    assert sum(is_predicted(slide) for slide in slides) >= 3
    assert sum(slide.title.startswith("Exercise:") for slide in slides) == 1
    assert notes.count("The room sticks") + notes.count("the room sticks") >= 2
    assert "hen late" in notes


def test_nearly_a_third_of_the_time_is_at_the_keyboard():
    taught = [slide for slides in CHAPTERS.values() for slide in slides]
    tried = sum(slide.minutes for slide in taught if slide.title.startswith("Exercise:"))
    assert tried >= 0.3 * sum(slide.minutes for slide in taught)


# --- One slide -----------------------------------------------------------------------------------


def words(text: str) -> int:
    """Words that a slide shows of a text; signs and list marks are none."""
    return sum(bool(re.search(r"\w", word)) for word in slides_sources.filled(text).split())


def typed_numbers(text: str) -> list[str]:
    """Figures in a text that neither a cell prints nor a setting is; code and names like 65B are none."""
    text = re.sub(r"`[^`]*`|\{\d\d\w?: [^{}]*\}", " ", text)
    text = re.sub(
        r"\b\d\d–\d\d\b|\bchapters? \d\d(, \d\d)*( to \d\d)?\b|\b\d+(B|-bit|/)", " ", text, flags=re.I
    )
    return [found for found in TYPED.findall(text) if found.rstrip(".,") not in SETTINGS]


@pytest.mark.parametrize("slide", SLIDES, ids=lambda slide: slide.title[:30])
def test_a_slide_says_little_and_shows_one_thing(slide):
    assert words(f"{slide.asked} {slide.told}") <= 25
    assert words(slide.title) <= 8
    assert not {"figure", "table"} <= set(slide.fields)
    assert "Predict:" not in slide.asked[1:]
    assert is_predicted(slide) or not slide.told  # only a question has an answer
    if is_predicted(slide):
        assert slide.told or {"figure", "table", "printed"} & set(slide.fields)


@pytest.mark.parametrize("slide", SLIDES, ids=lambda slide: slide.title[:30])
def test_no_measured_number_is_typed(slide):
    assert typed_numbers(f"{slide.asked} {slide.told} {slide.notes}") == []


@pytest.mark.parametrize("typed", ["65 % are right", "loses 1.5 points", "takes 783 GB", "2,163 tokens"])
def test_a_typed_number_is_found(typed):
    assert typed_numbers(f"With rank 8 in 4 bits, chapter 03 says, `r=12` {typed}.")


def sources(slide: Slide) -> list[tuple[str, str, str]]:
    """(field, chapter, what is wanted) of each thing that a slide shows."""
    shown = [(k, *slide.fields[k].split(" ", 1)) for k in ("figure", "table", "printed") if k in slide.fields]
    said = f"{slide.asked} {slide.told} {slide.notes}"
    return shown + [("number", *one) for one in re.findall(r"\{(\d\d\w?): ([^{}]*)\}", said)]


def test_what_a_slide_shows_is_of_the_chapter_of_its_slot():
    for number, slides in CHAPTERS.items():
        of = {chapter for slide in slides for _, chapter, _ in sources(slide)}
        assert of == {number}


def test_a_figure_with_a_label_is_named_by_it():
    wanted = [(number, name) for s in SLIDES for kind, number, name in sources(s) if kind == "figure"]
    assert len(wanted) >= 20
    assert len(set(wanted)) == len(wanted)
    for number, name in wanted:
        label = slides_sources.figure(number, name).label
        assert label in ("", name), f"chapter {number}: write {label}, not {name!r}"


def test_a_printed_line_is_named_by_what_it_says():
    """A claim's number alone would go on fitting when the claims are counted anew."""
    named = [name for s in SLIDES for kind, _, name in sources(s) if kind == "printed"]
    assert len(named) >= 10
    assert all(len(re.findall(r"[^\W\d]{3,}|×", name)) >= 3 for name in named)


def labels(number: str) -> set[str]:
    """The exercises of a chapter."""
    cells = slides_sources.chapter(number).prose
    return {d.options.get("label") for cell in cells for d in directives(cell.source) if "exercise" in d.name}


@pytest.mark.parametrize("number", TRACK)
def test_exercises_and_sections_that_a_slide_names_are_there(number):
    text = " ".join(f"{s.asked} {s.told} {s.notes}" for s in CHAPTERS[number])
    named = set(re.findall(r"`([a-z0-9]+(?:-[a-z0-9]+)+)`", text))
    assert named
    assert named <= labels(number)
    prose = "\n".join(cell.source for cell in slides_sources.chapter(number).prose)
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "book").glob("*.md"))
    headings = set(re.findall(r"^#+ (.+)$", f"{prose}\n{pages}", re.M))
    (tried,) = [s.asked for s in CHAPTERS[number] if s.title.startswith("Exercise:")]
    assert set(re.findall(r'"(.+?)"', tried)) <= headings
