"""The file of the slides: its figures are the notebooks' own, it needs nothing else, and faults are told."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import slides_deck
import slides_page
from slides_deck import read_slides

ROOT = Path(__file__).resolve().parents[1]
DECK = slides_deck.DECK.read_text(encoding="utf-8")
SLIDES = read_slides(DECK)
REVEAL = slides_page.FOLDER / "reveal"
GOOD = "# 09:00–09:10 A\nminutes: 10\n\nText.\n\nNotes: Say it.\n"


def foreign(page: str) -> list[str]:
    """Addresses that a page would load or lead to, other than those that hold their content."""
    page = re.sub(r"<!--.*?-->", "", page, flags=re.S)
    found = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]*)|url\(["']?([^)]*)""", page)
    return [one[:60] for pair in found for one in pair if one and not one.startswith("data:")]


@pytest.fixture(scope="module")
def page():
    return slides_page.page(DECK)


def test_two_runs_give_the_same_bytes(page):
    code = "import slides_page as s, sys; sys.stdout.buffer.write(s.page(s.DECK.read_text('utf-8')).encode())"
    for seed in ("1", "2"):
        path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
        assert done.stdout == page.encode()


def test_the_file_needs_no_other_file_and_no_other_host(page):
    assert foreign(page) == []
    assert "http" not in re.sub(r"<!--.*?-->|base64,[\w+/=]+", "", page, flags=re.S)
    assert not re.search(r"@[A-Z_]+@", page)
    assert len(page) < 4_000_000


@pytest.mark.parametrize("text", ["![x](https://example.org/x.png)", "![x](figures/x.png)"])
def test_another_file_or_host_is_found(text):
    assert foreign(slides_page.page(GOOD.replace("Text", text)))


def test_the_figures_are_the_notebooks_own(page):
    there = {
        base64.b64decode("".join(output["data"]["image/png"]))
        for path in (ROOT / "book").glob("[01]*.ipynb")
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", ())
    }
    shown = [base64.b64decode(one) for one in re.findall(r'<img src="data:image/png;base64,([^"]+)"', page)]
    assert len(shown) == sum("figure" in slide.fields for slide in SLIDES)
    assert set(shown) <= there


def test_an_answer_waits_for_the_next_key():
    deck = GOOD.replace("10\n", "10\nfigure: 03 fig-lora-shapes\nprinted: 03 Claim 1\n")
    asked, told = slides_page.page(deck.replace("Text.", "Predict: what?\n\nAnswer: This.")).split(
        '<div class="answer fragment">'
    )
    assert "Predict: what?" in asked
    assert all(mark not in asked for mark in ("This.", "<figure", 'class="printed"'))
    assert all(mark in told for mark in ("This.", "<figure", 'class="printed"'))
    assert "fragment" not in slides_page.page(deck).split("<body>")[1].split("<script")[0]


def test_the_notes_tell_the_minutes_and_the_clock(page):
    asides = re.findall(r'<aside class="notes"><p><strong>(.+?)</strong>', page)
    assert len(asides) == len(SLIDES)
    assert asides[0] == "3 minutes, 09:00 to 09:03"
    assert asides[-1].endswith("to 17:00")
    assert sum(map(int, re.findall(r'data-timing="(\d+)"', page))) == 8 * 3600


def test_reveal_is_as_it_was_published():
    lines = (REVEAL / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    assert set(sums) == {path.name for path in REVEAL.iterdir()} - {"SHA256SUMS"}
    for name, digest in sums.items():
        assert hashlib.sha256((REVEAL / name).read_bytes()).hexdigest() == digest
    licence = (REVEAL / "LICENSE").read_text(encoding="utf-8")
    assert "Permission is hereby granted, free of charge" in licence
    assert licence.strip() in slides_page.page(GOOD)
    assert "6.0.2" in (REVEAL / "reveal.js").read_text(encoding="utf-8")
    for place in ("LICENSE", "book/_slides/deck.html"):
        assert "reveal.js 6.0.2" in (ROOT / place).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD.replace("# 09:00–09:10 A", "# Morning"), "a slot's heading reads"),
        (GOOD.replace("minutes: 10\n", ""), "needs a line `minutes: 3`, got None"),
        (GOOD.replace("10\n", "ten\n"), "needs a line `minutes: 3`, got 'ten'"),
        (GOOD.replace("minutes", "picture: 1\nminutes"), "the field 'picture' is unknown"),
        (GOOD.replace("minutes", "minutes: 1\nminutes"), "the field 'minutes' is unknown or stands twice"),
        (GOOD.replace("Notes: Say it.", ""), "has no `Notes:`"),
        (GOOD + "Notes: Again.", "has 'Notes:' twice"),
        (GOOD.replace("10\n", "10\nfigure: 03 fig-no-such\n"), "0 figures for 'fig-no-such'.*\n.*fig-lora"),
        (GOOD.replace("10\n", "10\nfigure: 03 rank\n"), "[2-9] figures for 'rank'.*\n.*fig-lora"),
        (GOOD.replace("10\n", "10\nfigure: 99 fig-lora-shapes\n"), "no chapter '99'"),
        (GOOD.replace("10\n", "10\ntable: 03 no such\n"), "0 tables for 'no such'; they begin"),
        (GOOD.replace("10\n", "10\nprinted: 03 Claim\n"), "prints 4 lines that begin with 'Claim'"),
        (GOOD.replace("Text", "{00: always 'artifact': ?% wrong}"), "prints 0 numbers"),
        (GOOD.replace("Text", "{03: Claim ?}"), "prints 4 numbers"),
        (GOOD.replace("Text", "{03: Claim}"), "must have one \\?"),
    ],
)
def test_a_fault_in_the_text_is_told_with_its_slide(text, said):
    with pytest.raises(ValueError, match=rf"(?s)(A|Morning)'.*{said}"):
        slides_page.page(text)
