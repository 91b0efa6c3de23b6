"""What slides take from the chapters' stored outputs: a figure, a table, a printed line, a number.

Each function names a chapter by its number, `"03"`, and raises ValueError, which says what there is instead,
if not exactly one thing fits.
"""

import base64
import html
import re
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from book_notebook import Chapter, join, read_chapter

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("image/png", "image/svg+xml")
NUMBER = r"([-−+]?\d[\d,]*(?:\.\d+)?)"


@dataclass(frozen=True)
class Figure:
    """A figure with its label, its caption, its description, and its bytes: base64, or the text of an SVG."""

    label: str
    caption: str
    alt: str
    kind: str
    content: str

    @property
    def is_tall(self) -> bool:
        """Whether a PNG is so high that it does better beside the words than below them."""
        if self.kind != "image/png":
            return False
        width, height = struct.unpack(">II", base64.b64decode(self.content)[16:24])
        return height > 0.55 * width


@cache
def chapter(number: str) -> Chapter:
    """The chapter whose file begins with `number`."""
    found = sorted((ROOT / "book").glob(f"{number}_*.ipynb"))
    if len(found) != 1:
        raise ValueError(f"no chapter {number!r} in book/; write its number, as in 03")
    return read_chapter(found[0])


@cache
def figures(number: str) -> tuple[Figure, ...]:
    """The figures of a chapter, in order."""
    found = []
    for cell in chapter(number).code:
        said = cell.metadata.get("mystnb", {})
        named = said.get("figure", {})
        alt = said.get("image", {}).get("alt", "")
        for output in cell.outputs:
            kind = next((kind for kind in KINDS if kind in output.get("data", {})), None)
            if kind:
                content = join(output["data"][kind]).strip()
                found.append(Figure(named.get("name", ""), named.get("caption", ""), alt, kind, content))
    return tuple(found)


def figure(number: str, wanted: str) -> Figure:
    """The figure with the label `wanted`, or else the one with these words in its caption or description."""
    labelled = [f for f in figures(number) if f.label == wanted]
    found = labelled or [f for f in figures(number) if wanted.lower() in f"{f.caption}\n{f.alt}".lower()]
    if len(found) != 1:
        there = "\n".join(f"  {f.label or 'no label'}: {(f.caption or f.alt)[:100]}" for f in figures(number))
        raise ValueError(
            f"chapter {number} has {len(found)} figures for {wanted!r}; its figures are\n{there}"
        )
    return found[0]


@cache
def printed(number: str) -> str:
    """All that a chapter's cells print, solutions left out."""
    cells = [cell for cell in chapter(number).code if "solution" not in cell.tags]
    return "\n".join(text for cell in cells for text in cell.output_texts)


def line(number: str, start: str) -> str:
    """The one printed line that begins with `start`, whole."""
    found = [text.strip() for text in printed(number).splitlines() if text.strip().startswith(start)]
    if len(set(found)) != 1:
        raise ValueError(f"chapter {number} prints {len(found)} lines that begin with {start!r}")
    return found[0]


def table(number: str, start: str) -> list[list[str]]:
    """The rows of the one printed table whose first row begins with `start`; the first row is the head."""
    tables = re.findall(r"^\|.*\|$(?:\n\|.*\|$)+", printed(number), re.M)
    heads = [text.splitlines()[0].strip("| ") for text in tables]
    found = [text for text, head in zip(tables, heads, strict=True) if head.startswith(start)]
    if len(set(found)) != 1:
        raise ValueError(f"chapter {number} has {len(found)} tables for {start!r}; they begin {heads}")
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in found[0].splitlines()]
    return [rows[0], *rows[2:]]


def number(of: str, pattern: str) -> str:
    """The number that a chapter prints at the `?` of `pattern`, in which `…` stands for a few other words."""
    text = re.sub(r"\s+", " ", printed(of))
    words = [re.escape(part).replace("…", ".{1,40}?") for part in re.sub(r"\s+", " ", pattern).split("?")]
    if len(words) != 2:
        raise ValueError(f"{pattern!r} must have one ?, where the number is")
    found = set(re.findall(NUMBER.join(words), text))
    if len(found) != 1:
        raise ValueError(f"chapter {of} prints {len(found)} numbers at {pattern!r}: {sorted(found)}")
    return found.pop()


def filled(text: str) -> str:
    """`text` with each `{03: both start ? times}` replaced by what chapter 03 prints at the `?`."""
    return re.sub(r"\{(\d\d\w?): ([^{}]*)\}", lambda found: number(found[1], found[2]), text)


def as_html_table(rows: list[list[str]]) -> str:
    """The table for a slide; its cells are text, with `code` as the only mark."""

    def cells(row: list[str], tag: str) -> str:
        marked = [re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(cell)) for cell in row]
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in marked) + "</tr>"

    body = "\n".join(cells(row, "td") for row in rows[1:])
    return f"<table>\n<thead>{cells(rows[0], 'th')}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"
