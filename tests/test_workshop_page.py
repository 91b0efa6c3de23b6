"""The workshop page says what the chapters and the record of runs say, and its tracks fit their hours."""

import itertools
import json
import re

import pytest
import workshop_page
import workshop_tracks
from book_sizes import minutes, section

TRACKS = {name: getattr(workshop_page, name) for name in workshop_page.MOST}


def test_the_page_is_what_would_be_written():
    text = (workshop_page.ROOT / workshop_page.PAGE).read_text(encoding="utf-8")
    assert text == workshop_page.page(), "run make workshop-page"


@pytest.mark.parametrize("name", TRACKS)
def test_a_track_fits_its_hours_and_leaves_little_over(name):
    most = workshop_page.MOST[name]
    assert 0.6 * most < workshop_page.total(TRACKS[name]) <= most


@pytest.mark.parametrize("name", TRACKS)
def test_the_minutes_add_up_in_the_table(name):
    rows = re.findall(r"(?m)^\| (\d+):(\d\d) \| (\d*) \|", workshop_page.timetable(TRACKS[name]))
    starts = [60 * int(hours) + int(rest) for hours, rest, _ in rows]
    lengths = [int(length) for *_, length in rows[:-1]]
    assert [b - a for a, b in itertools.pairwise(starts)] == lengths
    assert sum(lengths) == starts[-1]


def test_the_day_has_the_chapters_that_it_names():
    worked = {item.number for item in workshop_page.DAY if isinstance(item, workshop_tracks.Work)}
    assert worked == {"00", "03", "04", "07", "10", "11", "13"}
    second = {i.number for i in workshop_page.SECOND_DAY if isinstance(i, workshop_tracks.Claims)}
    assert worked | second | {"20a", "20b", "20c"} == set(workshop_tracks.numbers())


def test_a_chapter_that_was_not_measured_is_named_and_waits_longest(monkeypatch, tmp_path):
    changed = tmp_path / "seconds.json"
    changed.write_text(json.dumps({"03_lora": 40, "04_adapters": 61}))
    monkeypatch.setattr(workshop_tracks, "SECONDS", changed)
    assert [workshop_tracks.waiting(number) for number in ("03", "04", "19")] == [1, 2, 2]
    others = [number for number in workshop_tracks.numbers() if number not in {"03", "04"}]
    assert f"set to the longest wait: {', '.join(others)}." in workshop_page.page()


def test_a_longer_run_and_longer_prose_are_noticed(monkeypatch, tmp_path):
    before = workshop_page.page()
    found = workshop_tracks.measured()
    changed = tmp_path / "seconds.json"
    changed.write_text(json.dumps(found | {"00_quickstart": 999}))
    monkeypatch.setattr(workshop_tracks, "SECONDS", changed)
    assert workshop_page.page() != before
    monkeypatch.undo()
    monkeypatch.setattr(workshop_tracks, "minutes", lambda part: minutes(part) + 3)
    assert workshop_page.page() != before


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (workshop_tracks.Work("00", ("No such section",)), "has no section 'No such section', it has"),
        (workshop_tracks.Picture("01", "No such figure", "x"), "has not one figure that begins"),
        (workshop_tracks.Exercise("00", "no-such-exercise", "x"), "no-such-exercise"),
    ],
)
def test_what_a_chapter_no_longer_has_is_an_error(item, message):
    with pytest.raises(KeyError, match=message):
        item.row()


def test_sections_are_parts_of_a_chapter():
    whole = workshop_tracks.chapter("03")
    found = (re.search(r"(?m)^## (.+)$", cell.source) for cell in whole.prose)
    titles = [title[1] for title in found if title]
    parts = sum(minutes(section(whole, title)) for title in titles)
    assert 0.9 * minutes(whole) < parts <= minutes(whole) + 1
