"""The pages of the built book joined into one HTML page, for print: ids unique, every fold open."""

import re
from collections import Counter
from html import escape
from pathlib import Path, PurePosixPath

import yaml
from bs4 import BeautifulSoup, Tag

STYLE = Path(__file__).with_name("book_print.css")
UNNUMBERED = {"glossary", "bibliography"}  # a page number at every other word would stand in the way
# What is of no use on paper: scripts and their controls, the cell that readies Colab.
GONE = "script, .headerlink, form, #interview-panel, [hidden], .sd-summary-state-marker, .tag_colab"
CALCULATOR = "<p><em>The calculator itself stands on this page of the book on the screen.</em></p>"
PAGE = """<!doctype html><html lang="en" data-theme="light" data-mode="light"><head><meta charset="utf-8">
<title>{title}</title>{links}<style>{style}</style>
<script>{maths}</script>
<script src="html/_static/mathjax/tex-mml-chtml.js"></script></head><body>
<section class="cover"><img src="html/_static/logo.svg" alt=""><p class="title">{title}</p>
<p>Fine-tuning large language models from the mathematics up</p>
<p class="by">{author}<br>{year}. Text and figures: CC BY 4.0. Code: MIT.</p></section>
{contents}{articles}</body></html>"""


def parts(root: Path) -> list[tuple[str, list[str]]]:
    """(caption, names of pages) of each part of _toc.yml; the front page comes first, without a caption."""
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    listed = [
        (part.get("caption", ""), [chapter["file"] for chapter in part["chapters"]]) for part in toc["parts"]
    ]
    return [("", [toc["root"]]), *listed]


def joined(root: Path) -> str:
    """All pages of the table of contents as one page, to be read from _build/."""
    config = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))
    names = [name for _, listed in parts(root) for name in listed]
    texts = {name: (root / "_build/html" / f"{name}.html").read_text(encoding="utf-8") for name in names}
    stems = {Path(name).stem for name in names}
    articles = {Path(name).stem: article(Path(name).stem, text, stems) for name, text in texts.items()}
    styles = re.findall(r'<link\b[^>]*\bhref="\.\./([^"?]*\.css)', texts[names[0]])
    return PAGE.format(
        title=config["title"],
        author=config["author"],
        year=config["copyright"],
        links="".join(f'<link rel="stylesheet" href="html/{style}">' for style in styles),
        style=STYLE.read_text(encoding="utf-8") + "".join(map(running_title, articles, articles.values())),
        maths=re.search(r"<script>(window\.MathJax = .*?)</script>", texts[names[0]])[1],
        contents=contents(parts(root), articles),
        articles="".join(map(str, articles.values())),
    )


def article(stem: str, text: str, stems: set[str]) -> Tag:
    """A built page's article: ids begin with `stem--`, folds are open, links lead into the book."""
    found = BeautifulSoup(re.search(r"<article.*?</article>", text, re.S)[0], "html.parser").article
    for tag in found.select(GONE):
        tag.decompose()
    for calculator in found.select(".fit"):
        calculator.replace_with(BeautifulSoup(CALCULATOR, "html.parser"))
    for fold in found.select("details"):
        fold["open"] = ""
    for section in found.select("section[id]"):
        _to_heading(section)
    for tag in found.find_all(True):
        for name in ("id", "for", "aria-labelledby", "aria-describedby", "aria-controls"):
            if name in tag.attrs:
                tag[name] = " ".join(f"{stem}--{word}" for word in tag[name].split())
        for name in ("src", "href"):
            if name in tag.attrs:
                tag[name] = _moved(stem, tag[name], stems)
    for link in found.select('a[href^="#"]'):
        _number(link, stem)
    found["id"] = stem
    return found


def _to_heading(section: Tag) -> None:
    """Move a section's ids to its heading: a heading can stand on the page after its section's begin."""
    heading = section.find(re.compile("^h[1-6]$"), recursive=False)
    if heading:
        for label in section.find_all("span", id=True, recursive=False):
            heading.insert(0, label.extract())
        heading["id"] = section.attrs.pop("id")


def _moved(stem: str, address: str, stems: set[str]) -> str:
    """An address on the page `stem` as it must read on the joined page."""
    if re.match(r"[a-z]+:", address):
        return address
    path, _, fragment = address.partition("#")
    page = PurePosixPath(path).stem if path else stem
    if not path or (path.endswith(".html") and page in stems):
        return f"#{page}--{fragment}" if fragment else f"#{page}"
    return f"html/{path.removeprefix('../')}"


def _number(link: Tag, stem: str) -> None:
    """Set the place for a page number behind a link to another page of the book."""
    target = link["href"][1:]
    page = target.partition("--")[0]
    if page != stem and page not in UNNUMBERED and not link.find("svg") and link.find_parent("svg") is None:
        mark = BeautifulSoup(
            f'<span class="page-of"> p.&nbsp;<span data-page-of="{target}">000</span></span>', "html.parser"
        )
        link.append(mark)


def title_of(found: Tag) -> str:
    """The heading of an article."""
    return found.h1.get_text().strip()


def running_title(stem: str, found: Tag) -> str:
    """The rule that puts a page's title at the foot of the pages it takes."""
    name = "page-" + re.sub(r"\W", "-", stem)
    text = title_of(found).replace('"', "'")
    return f'@page {name} {{ @bottom-left {{ content: "{text}"; }} }} [id="{stem}"] {{ page: {name}; }}\n'


def contents(listed: list[tuple[str, list[str]]], articles: dict[str, Tag]) -> str:
    """The table of contents: parts, pages, and those headings that do not stand on every other page."""
    common = Counter(h.get_text() for found in articles.values() for h in found.select("h2"))
    lines = []
    for caption, names in listed:
        lines += [f'<p class="part">{escape(caption)}</p>'] if caption else []
        for stem in (Path(name).stem for name in names):
            lines.append(_line("page", stem, title_of(articles[stem])))
            for heading in articles[stem].select("h2[id]"):
                if common[heading.get_text()] < 3:
                    lines.append(_line("heading", heading["id"], heading.get_text()))
    return f'<nav class="book-contents"><h1 id="contents">Contents</h1>{"".join(lines)}</nav>'


def _line(kind: str, target: str, text: str) -> str:
    return (
        f'<p class="{kind}"><a href="#{target}"><span>{escape(text)}</span>'
        f'<span class="dots"></span><span data-page-of="{target}">000</span></a></p>'
    )
