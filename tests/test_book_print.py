"""The book on paper: joined without loss, every link and number right, nothing cut. Chromium prints it."""

import re
from pathlib import Path

import book_print
import pytest
from book_joined import joined
from book_print import chromium, destinations, objects, outline_once, page_order, print_book, titles
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[1]
HEAD = """<html><head><link href="../_static/a.css?v=1" rel="stylesheet">
<script>window.MathJax = {}</script></head>"""
FIRST = """<article><section id="one"><h1>1 One<a class="headerlink" href="#one">#</a></h1>
<p id="x">See <a href="two.html#x">x in two</a>, <a href="#x">here</a>, <a href="https://a.example/">out</a>,
<a href="two.html">two</a>, <a href="../_images/a.png">a picture</a>, <a href="glossary.html#t">term</a>.</p>
<details><summary>Show</summary><img src="../_images/a.png"></details><div class="tag_colab">install</div>
<label for="x">x</label><script>1</script></section></article>"""
SECOND = """<article><section id="two"><h1>2 Two</h1><p id="x">x</p>%s
<section id="sub"><span id="label"></span><h2>Part</h2><p>text</p></section></section></article>"""
TERMS = '<article><section id="g"><h1>Glossary</h1><p id="t">t</p></section></article>'


@pytest.fixture
def site(tmp_path):
    """A built book of three pages; the second takes several sheets."""
    folder = tmp_path / "_build" / "html" / "book"
    folder.mkdir(parents=True)
    long = "<p>many words that fill the page</p>" * 120
    for name, text in {"one": FIRST, "two": SECOND % long, "glossary": TERMS}.items():
        (folder / f"{name}.html").write_text(f"{HEAD}<body>{text}</body></html>", encoding="utf-8")
    toc = "{root: book/one, parts: [{caption: Part I, chapters: [{file: book/two}, {file: book/glossary}]}]}"
    (tmp_path / "_toc.yml").write_text(toc, encoding="utf-8")
    (tmp_path / "_config.yml").write_text('title: T\nauthor: A\ncopyright: "2026"\n', encoding="utf-8")
    return tmp_path


def test_the_pages_are_joined(site):
    page = BeautifulSoup(joined(site), "html.parser")
    ids = [tag["id"] for tag in page.select("[id]")]
    assert len(ids) == len(set(ids))
    links = [a["href"] for a in page.select("article a")]
    assert links == [
        "#two--x", "#one--x", "https://a.example/", "#two", "html/_images/a.png", "#glossary--t",
    ]  # fmt: skip
    assert [a["href"][1:] for a in page.select('a[href^="#"]') if a["href"][1:] not in ids] == []
    assert page.select_one("details").has_attr("open")
    assert page.label["for"] == "one--x"
    assert page.select("article script, .tag_colab, .headerlink") == []
    assert [tag["data-page-of"] for tag in page.select("article [data-page-of]")] == ["two--x", "two"]
    lines = [p.get_text() for p in page.select(".book-contents p")]
    assert lines == ["1 One000", "Part I", "2 Two000", "Part000", "Glossary000"]


def test_a_doubled_title_is_written_once():
    pdf = b"<</Title (OneOne)\n/Title (Two)\n/Title <FEFF00410041>\n/Title <FEFF0042>"
    once = outline_once(pdf)
    assert len(once) == len(pdf)
    assert titles(once) == ["One", "Two", "A", "B"]


def test_a_doubled_first_line_is_written_once():
    line, code = "20b When memory surprises", "20b Schätzung und Speicher".encode("utf-16-be").hex().upper()
    wrong = f"/Title ({line}{line}you)\n/Title <FEFF{code}{code}0041>\n/Title (papa said)\n".encode()
    once = outline_once(wrong)
    assert len(once) == len(wrong)
    assert titles(once) == [f"{line} you", "20b Schätzung und Speicher A", "papa said"]


def test_without_chromium_a_clear_line_and_no_failure_of_the_build(monkeypatch, capsys, site):
    monkeypatch.setattr(book_print, "chromium", lambda: None)
    assert book_print.main(["--cheat-sheet", "--root", str(site)]) == 0
    assert book_print.main(["--root", str(site)]) == 1
    assert capsys.readouterr().out == f"{book_print.NONE}\n" * 2


@pytest.mark.parametrize("program", ["/bin/false", "/nowhere/chromium"])
def test_a_chromium_that_does_not_start_is_named_and_does_not_fail_the_build(
    monkeypatch, capsys, site, program
):
    monkeypatch.setenv("CHROMIUM", program)
    assert book_print.main(["--cheat-sheet", "--root", str(site)]) == 0
    assert book_print.main(["--root", str(site)]) == 1
    assert capsys.readouterr().out.count(f"{program} printed nothing: ") == 2


@pytest.mark.browser
def test_numbers_name_the_page(site):
    pdf, cut = print_book(site, chromium())
    places = destinations(pdf)
    assert cut == []
    assert places["one"] == 3  # after the cover and the contents
    assert places["two"] == places["two--x"] == 4
    assert places["glossary"] == places["two--sub"] + 1 == len(page_order(objects(pdf)))
    assert places["two--sub"] > 5
    assert set(titles(pdf)) == {"T", "Contents", "1 One", "2 Two", "Part", "Glossary"}


@pytest.mark.browser
def test_what_is_cut_is_named(site):
    path = site / "_build" / "html" / "book" / "two.html"
    wide = '<p style="width: 2000px">wide</p><span class="math">\\(x\\)</span>'
    path.write_text(path.read_text("utf-8").replace("<p>text</p>", wide), encoding="utf-8")
    assert print_book(site, chromium())[1] == ["two: P wide", "two: SPAN \\(x\\)"]


@pytest.mark.browser
def test_the_whole_book_prints():
    text = joined(ROOT)
    page = BeautifulSoup(text, "html.parser")
    chapters = [a.h1.get_text().strip() for a in page.select("article")]
    pdf, cut = print_book(ROOT, chromium())
    assert cut == []
    assert 5 * len(chapters) < len(page_order(objects(pdf))) < 25 * len(chapters)
    assert [title for title in chapters if title not in titles(pdf)] == []
    wanted = {a["href"][1:] for a in page.select('a[href^="#"]')}
    assert wanted - destinations(pdf).keys() == set()
    assert not re.search(r'<(?:img|link|script)\b[^>]*(?:src|href)="(?:https?:)?//', text)
