"""Descriptions, link previews, the site map and the page for what is not found; a tiny site by Sphinx."""

import struct
import warnings
from pathlib import Path
from xml.etree import ElementTree

import book_online
import pytest
import yaml
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[1]
BASE = "https://an-account.github.io/a-book"
PAGES = {
    "index": "A book & more\n=============\n\nShort. Then a longer one with <angles> and & in it. Last.\n",
    "deep/page": "A page\n======\n\nOne sentence, long enough to stand alone, with :math:`\\alpha`. Two.\n",
}


def built(folder: Path, base: str) -> Path:
    """Build two pages with the extension; the folder of the site."""
    from sphinx.application import Sphinx

    for name, text in PAGES.items():
        path = folder / "source" / f"{name}.rst"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    settings = {
        "extensions": ["book_online"],
        "html_baseurl": base,
        "html_theme": "basic",
        "html_title": "A book",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Sphinx, not of ours
        app = Sphinx(
            folder / "source",
            None,
            folder / "site",
            folder / "doctrees",
            "html",
            settings,
            status=None,
            warning=None,
        )
        app.build()
    return folder / "site"


def metas(path: Path) -> dict[str, str]:
    """The meta tags of a page by name."""
    found = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser").select("meta[content]")
    return {tag.get("name") or tag.get("property"): tag["content"] for tag in found}


def test_a_site_with_an_address(tmp_path):
    site = built(tmp_path, BASE)
    front, page = metas(site / "index.html"), metas(site / "deep" / "page.html")
    assert front["description"] == "Short. Then a longer one with <angles> and & in it."
    assert front["og:title"] == "A book & more"
    assert page["description"] == "One sentence, long enough to stand alone, with alpha."
    assert page["og:url"] == f"{BASE}/deep/page.html"
    assert page["og:image"] == f"{BASE}/_static/preview.png"
    assert f'<link rel="canonical" href="{BASE}/deep/page.html"' in (site / "deep" / "page.html").read_text()
    places = ElementTree.parse(site / "sitemap.xml").getroot()
    assert [loc.text for loc in places.iter() if loc.tag.endswith("loc")] == [
        f"{BASE}/deep/page.html",
        f"{BASE}/index.html",
    ]
    missing = BeautifulSoup((site / "404.html").read_text(encoding="utf-8"), "html.parser")
    assert missing.a["href"] == f"{BASE}/index.html"  # it is shown at any depth
    assert missing.form["action"] == f"{BASE}/search.html"
    assert missing.label["for"] == missing.input["id"]


@pytest.mark.parametrize("base", ["", "https://your_account.github.io/a-book"])
def test_a_site_without_an_address(tmp_path, base):
    site = built(tmp_path, base)
    found = metas(site / "deep" / "page.html")
    assert found["description"]
    assert not [name for name in found if name and name.startswith(("og:", "twitter:"))]
    assert "canonical" not in (site / "deep" / "page.html").read_text(encoding="utf-8")
    assert not (site / "sitemap.xml").exists()
    assert not (site / "404.html").exists()


def test_a_long_first_sentence_is_cut_between_words():
    from docutils.core import publish_doctree

    found = book_online.description(publish_doctree("word " * 100))
    assert found.endswith("word …")
    assert len(found) <= 200


def test_names_hold_what_buttons_show():
    theme = (
        '<button class="btn search-button-field x" title="Search" aria-label="Search" data-x="y">'
        '<span>Search</span><summary aria-label="Toggle hidden content">'
        '<i class="theme-switch fa" data-mode="dark"  title="Dark"></i>'
        '<button aria-label="Search">'
    )
    assert book_online.mend(theme) == (
        '<button class="btn search-button-field x" title="Search" data-x="y">'
        "<span>Search</span><summary>"
        '<i class="theme-switch fa" data-mode="dark" ></i><button aria-label="Search">'
    )


def test_the_address_follows_the_repository():
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    owner, name = config["repository"]["url"].split("/")[-2:]
    assert config["html"]["baseurl"] == f"https://{owner}.github.io/{name}/"


def test_the_picture_has_the_size_of_a_preview():
    picture = (ROOT / "book" / book_online.PICTURE).read_bytes()
    assert struct.unpack(">II", picture[16:24]) == (1200, 630)
    assert len(picture) < 300_000
