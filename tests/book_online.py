"""What search engines, link previews and screen readers ask of the built pages: a Sphinx extension.

Each page gets a description, its first sentence. Once `make repository` has set an address, each also
names its canonical address and a picture, and the site gets sitemap.xml and 404.html.
"""

import re
from html import escape, unescape
from pathlib import Path

from docutils import nodes

PLACEHOLDER = "your_account"
PICTURE, PICTURE_ALT = "_static/preview.png", "From LoRA to QLoRA: fine-tuning from the mathematics up."
# A button's name must hold the words that it shows (WCAG 2.5.3): (what the theme writes, what is right).
MENDED = (
    (r'(<button class="btn search-button-field[^>]*?) aria-label="Search"', r"\1"),
    (r'(<summary) aria-label="Toggle hidden content"', r"\1"),
    (r'<div role="list" class="citation-list">', '<div class="citation-list">'),  # no listitems
    (r'(<i class="theme-switch[^>]*?) title="[^"]*"', r"\1"),
)
NOT_FOUND = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex"><title>Not found: {title}</title>
<style>body {{ font: 1.1rem/1.6 serif; max-width: 34rem; margin: 15vh auto; padding: 0 1rem; }}</style>
</head><body><main><h1>This page is not here</h1>
<p>It may have moved. <a href="{base}index.html">The book begins here</a>, and its search finds the rest:</p>
<form action="{base}search.html" method="get" role="search"><label for="q">Search the book</label>
<input id="q" name="q" type="search"> <button type="submit">Search</button></form></main></body></html>
"""


def address(base: str) -> str:
    """The address of the site with a slash at its end; "" where it is still the placeholder."""
    return "" if not base or PLACEHOLDER in base else base.rstrip("/") + "/"


def description(doctree: nodes.document, least: int = 50, most: int = 200) -> str:
    """The first sentence of a page; more where it has fewer than `least` letters, cut at `most`."""
    plain = (re.sub(r"\\([A-Za-z]+)", r"\1", p.astext()) for p in doctree.findall(nodes.paragraph))
    texts = (re.sub(r"\s+", " ", text) for text in plain)  # no backslash of TeX, no line ends
    found = ""
    for sentence in (s for text in texts for s in re.split(r"(?<=[.!?])\s", text)):
        if len(found) >= least:
            break
        found = f"{found} {sentence}".strip()
    return found if len(found) <= most else found[: most - 2].rsplit(" ", 1)[0] + " …"


def tags(title: str, text: str, url: str, base: str, site: str) -> str:
    """The meta tags of a page; those of a link preview only where the site has an address."""
    named = {"description": text} if text else {}
    shown = {}
    if base:
        named["twitter:card"] = "summary_large_image"
        shown = {"og:title": title, "og:description": text, "og:type": "article", "og:url": url}
        shown |= {"og:site_name": site, "og:image": base + PICTURE, "og:image:alt": PICTURE_ALT}
    lines = [f'<meta name="{name}" content="{escape(value)}" />' for name, value in named.items()]
    lines += [f'<meta property="{name}" content="{escape(value)}" />' for name, value in shown.items()]
    return "\n".join(["", *lines, ""])


def set_address(app, config) -> None:
    """Sphinx writes canonical addresses from html_baseurl; a placeholder must not become one."""
    config.html_baseurl = address(config.html_baseurl)


def describe(app, pagename, templatename, context, doctree) -> None:
    """Add the meta tags to a page that has a text."""
    if doctree is None:
        return
    base = app.config.html_baseurl
    title = unescape(re.sub(r"<[^>]+>", "", context.get("title", "")))
    found = tags(title, description(doctree), f"{base}{pagename}.html", base, app.config.html_title)
    context["metatags"] = context.get("metatags", "") + found


def mend(text: str) -> str:
    """A built page whose buttons are named as they read."""
    for wrong, right in MENDED:
        text = re.sub(wrong, right, text)
    return text


def finish(app, error) -> None:
    """Mend the pages; where there is an address, write the site map and the page for what is not found."""
    if error or app.builder.format != "html":
        return
    out, base = Path(app.outdir), app.config.html_baseurl
    for path in out.rglob("*.html"):
        before = path.read_text(encoding="utf-8")
        if (after := mend(before)) != before:
            path.write_text(after, encoding="utf-8")
    if base:
        urls = "".join(
            f"<url><loc>{escape(base + name)}.html</loc></url>\n" for name in sorted(app.env.all_docs)
        )
        head = '<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n'
        (out / "sitemap.xml").write_text(f"{head}{urls}</urlset>\n", encoding="utf-8")
        page = NOT_FOUND.format(title=escape(app.config.html_title), base=escape(base))
        (out / "404.html").write_text(page, encoding="utf-8")


def setup(app) -> dict:
    """Connect with Sphinx."""
    app.connect("config-inited", set_address)
    app.connect("html-page-context", describe)
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
