"""`make slides`: the deck for the one-day track, one HTML file that opens from a disk with no network.

The text is book/_slides/one_day.md; figures, tables, printed lines and numbers come from the chapters'
stored outputs. `python tests/slides_page.py` writes _build/slides/index.html; test_slides.py holds the
deck to its rules, test_slides_page.py the file.
"""

import base64
import html
import re
import sys
from pathlib import Path

import slides_sources
from markdown_it import MarkdownIt
from slides_deck import DECK, Slide, clock, is_predicted, read_slides

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "book" / "_slides"
FONTS = ROOT / "book" / "_static" / "fonts"
PAGE = ROOT / "_build" / "slides" / "index.html"
MARKDOWN = MarkdownIt("commonmark", {"html": False, "typographer": True}).enable("smartquotes")
VERDICTS = re.compile(r"\b(HOLDS|FAILS|FALSE|UNDECIDED)\b")


def rendered(text: str) -> str:
    """A piece of the deck as HTML, its numbers filled in."""
    return MARKDOWN.render(slides_sources.filled(text)).strip()


def shown(slide: Slide) -> list[str]:
    """The figure, the table and the printed line that a slide asks for, as HTML."""
    parts = []
    for field in ("figure", "table", "printed"):
        if field in slide.fields:
            number, _, wanted = slide.fields[field].partition(" ")
            parts.append(SHOW[field](number, wanted.strip()))
    return parts


def show_figure(number: str, wanted: str) -> str:
    """An image with its bytes inside."""
    found = slides_sources.figure(number, wanted)
    content = found.content.replace("\n", "")
    if found.kind == "image/svg+xml":
        content = base64.b64encode(found.content.encode()).decode()
    source = f"data:{found.kind};base64,{content}"
    kind = ' class="tall"' if found.is_tall else ""
    return f'<figure{kind}><img src="{source}" alt="{html.escape(found.alt)}"></figure>'


def show_table(number: str, wanted: str) -> str:
    """A table that a chapter prints."""
    return slides_sources.as_html_table(slides_sources.table(number, wanted))


def show_printed(number: str, wanted: str) -> str:
    """A line that a chapter prints, its verdict set off."""
    line = VERDICTS.sub(r"<strong>\1</strong>", html.escape(slides_sources.line(number, wanted)))
    return f'<p class="printed">{line}</p>'


SHOW = {"figure": show_figure, "table": show_table, "printed": show_printed}


def kinds(slide: Slide) -> list[str]:
    """What deck.css has to know of a slide."""
    found = ["slot"] if slide.slot else []
    found += ["predict"] if is_predicted(slide) else []
    found += ["exercise"] if slide.title.startswith("Exercise:") else []
    return found + ([] if {"figure", "table"} & set(slide.fields) else ["words"])


def section(slide: Slide, start: int, slot: str) -> str:
    """One slide. `start` is its time in minutes of the day, `slot` the title of the slot it stands in."""
    told = [*([rendered(slide.told)] if slide.told else []), *shown(slide)]
    if is_predicted(slide):
        told = ['<div class="answer fragment">', *told, "</div>"]
    minutes = f"{slide.minutes} minute{'s' * (slide.minutes > 1)}"
    said = f"{minutes}, {clock(start)} to {clock(start + slide.minutes)}"
    top = ""
    if slide.slot:
        top = f'<p class="time">{clock(slide.slot[0])}–{clock(slide.slot[1])}</p>'
    elif "exercise" in kinds(slide):
        top = f'<p class="time">{minutes}</p>'
    parts = [
        f'<section class="{" ".join(kinds(slide))}" data-timing="{60 * slide.minutes}">',
        top,
        f"<h2>{html.escape(slide.title)}</h2>",
        rendered(slide.asked),
        *told,
        "" if slide.slot else f'<p class="where">{html.escape(slot)} · CC BY 4.0</p>',
        f'<aside class="notes"><p><strong>{said}</strong></p>\n{rendered(slide.notes)}</aside>',
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def sections(slides: list[Slide]) -> str:
    """All slides. A fault is told with the title of its slide."""
    found, now, slot = [], 0, ""
    for slide in slides:
        if slide.slot:
            now, slot = slide.slot[0], slide.title
        try:
            found.append(section(slide, now, slot))
        except ValueError as fault:
            raise ValueError(f"slide {slide.title!r}: {fault}") from fault
        now += slide.minutes
    return "\n".join(found)


def embedded(path: Path, kind: str) -> str:
    """A file as an address that holds it, byte for byte."""
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def page(deck: str) -> str:
    """The whole deck as one HTML file."""
    style = (FOLDER / "deck.css").read_text(encoding="utf-8")
    style = re.sub(r"url\(([\w-]+\.woff2)\)", lambda m: f"url({embedded(FONTS / m[1], 'font/woff2')})", style)
    parts = {
        "LICENCE": (FOLDER / "reveal" / "LICENSE").read_text(encoding="utf-8").strip(),
        "REVEAL_CSS": embedded(FOLDER / "reveal" / "reveal.css", "text/css"),
        "STYLE": style.strip(),
        "SLIDES": sections(read_slides(deck)),
        "REVEAL_JS": embedded(FOLDER / "reveal" / "reveal.js", "text/javascript"),
        "NOTES_JS": embedded(FOLDER / "reveal" / "notes.js", "text/javascript"),
    }
    frame = (FOLDER / "deck.html").read_text(encoding="utf-8")
    return re.sub(r"@(\w+)@", lambda found: parts[found[1]], frame)


def main() -> None:
    """Write the deck and say where it is."""
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(DECK.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"Open file://{PAGE}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as fault:
        sys.exit(str(fault))
