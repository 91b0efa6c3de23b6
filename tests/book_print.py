"""The built book as one PDF, and the cheat sheet on one side of A4, by headless Chromium.

`python tests/book_print.py` prints `book_joined.joined` once, reads on which page each heading came
to stand, writes these numbers into the contents and behind the links, and prints again.
`--cheat-sheet` prints that page alone, and is content where there is no Chromium, or one
that does not start: building the book does not depend on it.
"""

import argparse
import os
import re
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

from book_joined import joined

ROOT = Path(__file__).resolve().parents[1]
BOOK, SHEET = "_build/from_lora_to_qlora.pdf", "_build/html/book/cheat_sheet.pdf"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
FLAGS += ("--host-resolver-rules=MAP * ~NOTFOUND",)  # no host; what it reads lies on this machine
NONE = "no Chromium found, so no PDF: install the package chromium, or set CHROMIUM=/path/to/it"
COLUMN = 665  # [px], A4 less the margins in book_print.css
MATHS = "async () => { await window.MathJax?.startup?.promise; await document.fonts.ready; }"
# What is wider than the column is set smaller, by steps of a tenth down to a half; each step is one layout.
FIT = """() => { let wide = [...document.querySelectorAll("mjx-container[display=true], table")];
  for (let size = 90; size >= 50; size -= 10) {
    wide = wide.filter(e => e.scrollWidth > e.parentElement.clientWidth + 1);
    wide.forEach(e => { e.style.setProperty("font-size", `${size}%`, "important"); }); } }"""
CUT = """() => { const edge = document.body.getBoundingClientRect().right + 1.5;
  const bare = [...document.querySelectorAll(".math")].filter(e => !e.querySelector("mjx-container"));
  return [...document.querySelectorAll("article :is(pre, table, img, svg, p, li, mjx-container, mjx-merror)")]
    .filter(e => e.matches("mjx-merror") || e.getBoundingClientRect().right > edge).concat(bare)
    .map(e => `${e.closest("article").id}: ${e.tagName} ${e.textContent.trim().slice(0, 50)}`); }"""
NUMBER = """pages => document.querySelectorAll("[data-page-of]").forEach(
  e => { e.textContent = pages[e.dataset.pageOf] ?? "?"; })"""


def chromium() -> str | None:
    """The Chromium that CHROMIUM names, or the first on the path."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def opened(program: str, path: Path):
    """The page in `path` in headless Chromium, as wide as the column of print, its maths set."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=[*FLAGS])
        page = browser.new_page(viewport={"width": COLUMN, "height": 1000}, color_scheme="light")
        page.set_default_timeout(600_000)  # [ms]
        page.emulate_media(media="print")
        page.goto(path.resolve().as_uri(), wait_until="load")
        page.evaluate(MATHS)
        yield page
        browser.close()


def objects(pdf: bytes) -> dict[int, bytes]:
    """The numbered objects of a PDF that Chromium wrote, without their streams."""
    bare = re.sub(rb"stream\r?\n.*?endstream", b"", pdf, flags=re.S)
    return {int(n): body for n, body in re.findall(rb"^(\d+) 0 obj\s(.*?)\bendobj", bare, re.S | re.M)}


def page_order(found: dict[int, bytes]) -> list[int]:
    """The numbers of a PDF's page objects, first page first."""

    def below(number: int) -> list[int]:
        kids = re.search(rb"/Kids\s*\[(.*?)\]", found[number], re.S)
        return [p for k in re.findall(rb"(\d+) 0 R", kids[1]) for p in below(int(k))] if kids else [number]

    root = next(body for body in found.values() if re.search(rb"/Type\s*/Catalog", body))
    return below(int(re.search(rb"/Pages\s+(\d+) 0 R", root)[1]))


def destinations(pdf: bytes) -> dict[str, int]:
    """On which page, counted from 1, each id stands that a link of the PDF leads to."""
    found = objects(pdf)
    places = {number: place for place, number in enumerate(page_order(found), 1)}
    targets = rb"/([^\s/\[\]<>()]+)\s*\[(\d+) 0 R\s*/XYZ"
    named = [pair for body in found.values() for pair in re.findall(targets, body)]
    return {_name(name): places[int(number)] for name, number in named}


def outline_once(pdf: bytes) -> bytes:
    """Chromium doubles an outline's title, or its first line, where the heading moved to the next page."""

    def once(m: re.Match) -> bytes:
        rest = (b"0020" if b"FEFF" in m[1] else b" ") + m[3] if m[3] else b""
        return (m[1] + m[2] + rest + m[4]).ljust(len(m[0]))

    pdf = re.sub(rb"(/Title \()([^()\n]+)\2((?:(?<=[^()\n]{24})[^()\n]+)?)(\))", once, pdf)
    return re.sub(rb"(/Title <FEFF)((?:[0-9A-F]{4})+)\2((?:(?<=[0-9A-F]{96})[0-9A-F]+)?)(>)", once, pdf)


def titles(pdf: bytes) -> list[str]:
    """The lines of a PDF's outline."""
    found = re.findall(rb"/Title (?:\((.*?)\)|<FEFF([0-9A-F]*)>)", pdf)
    return [
        plain.decode() if plain else bytes.fromhex(code.decode()).decode("utf-16-be") for plain, code in found
    ]


def _name(raw: bytes) -> str:
    """A PDF's name: `#20` stands for a space."""
    return re.sub(rb"#([0-9a-fA-F]{2})", lambda m: bytes.fromhex(m[1].decode()), raw).decode()


def print_book(root: Path, program: str) -> tuple[bytes, list[str]]:
    """The PDF of the built book, and what is cut on its pages: wider than the column, or maths not set."""
    path = root / "_build" / "print.html"
    path.write_text(joined(root), encoding="utf-8")
    with opened(program, path) as page:
        page.evaluate(FIT)
        cut = page.evaluate(CUT)
        pages: dict[str, int] = {}
        for last in (False, True):  # the tags and the outline take time, and no place
            pdf = page.pdf(prefer_css_page_size=True, print_background=True, outline=last, tagged=last)
            before, pages = pages, destinations(pdf)
            page.evaluate(NUMBER, pages)
    if any(pages.get(name) != place for name, place in before.items()):
        raise ValueError("the page numbers moved what they number; give them more room in book_print.css")
    path.unlink()
    return outline_once(pdf), cut


def print_sheet(root: Path, program: str) -> bytes:
    """The PDF of the cheat sheet, on A4 by its own style."""
    with opened(program, root / "_build/html/book/cheat_sheet.html") as page:
        return page.pdf(prefer_css_page_size=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 when all is well, 1 with what to do when it is not."""
    from playwright.sync_api import Error

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cheat-sheet", action="store_true", help="that page alone")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if not (program := chromium()):
        print(NONE)
        return 0 if given.cheat_sheet else 1
    try:
        (given.root / SHEET).write_bytes(print_sheet(given.root, program))
    except Error as error:
        print(f"{program} printed nothing: {str(error).splitlines()[0]}")
        return 0 if given.cheat_sheet else 1
    print(f"cheat sheet: {SHEET}")
    if given.cheat_sheet:
        return 0
    pdf, cut = print_book(given.root, program)
    (given.root / BOOK).write_bytes(pdf)
    print(f"book: {BOOK}, {len(page_order(objects(pdf)))} pages, {len(pdf) / 1e6:.0f} MB")
    print("\n".join(f"cut: {it}" for it in cut), end="\n" if cut else "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
