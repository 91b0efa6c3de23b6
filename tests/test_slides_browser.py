"""The deck in a real browser, from a file: the keys lead on, nothing overflows, no other host is asked."""

import os
import re
import shutil
from dataclasses import dataclass, field

import pytest
import slides_page
from playwright.sync_api import Page, sync_playwright
from slides_deck import DECK, is_predicted, read_slides

pytestmark = pytest.mark.browser

GOOD = (
    "# 09:00–09:10 A\nminutes: 5\n\nText.\n\nNotes: Say it.\n\n## B\nminutes: 5\n\nMore.\n\nNotes: Again.\n"
)
# What stands outside of its slide, or is covered; and how large the figure is.
LOOK = """() => {
  const slide = Reveal.getCurrentSlide(), frame = slide.getBoundingClientRect(), found = [];
  const within = (a, b) => a.left >= b.left - 1 && a.top >= b.top - 1 && a.right <= b.right + 1
    && a.bottom <= b.bottom + 1;
  if (slide.scrollHeight > slide.clientHeight + 1) found.push(`is ${slide.scrollHeight} high`);
  if (slide.scrollWidth > slide.clientWidth + 1) found.push(`is ${slide.scrollWidth} wide`);
  const shown = [...slide.querySelectorAll("h2, p, li, figure, table, pre")].filter(e => !e.closest("aside"));
  for (const part of shown)
    if (!within(part.getBoundingClientRect(), frame)) found.push(`${part.tagName} stands outside`);
  const apart = (a, b) => a.right <= b.left + 1 || b.right <= a.left + 1 || a.bottom <= b.top + 1
    || b.bottom <= a.top + 1;
  for (const one of shown) for (const other of shown)
    if (one !== other && !one.contains(other) && !other.contains(one)
      && !apart(one.getBoundingClientRect(), other.getBoundingClientRect()))
      found.push(`${one.tagName} lies over ${other.tagName}`);
  const image = slide.querySelector("img"), scale = Reveal.getScale();
  if (image) {
    const box = image.getBoundingClientRect();
    if (!image.naturalWidth) found.push("a figure that does not load");
    if (box.width < 640 * scale || box.height < 320 * scale)
      found.push(`a figure of ${box.width} × ${box.height}`);
  }
  return found;
}"""


@dataclass
class Shown:
    """A deck on the screen, what was heard while it was shown, and the places passed."""

    page: Page
    heard: list[str] = field(default_factory=list)
    passed: list[tuple[int, int]] = field(default_factory=list)

    def listen(self, page: Page) -> None:
        """Note each error and each request that leaves the file."""
        page.on("pageerror", lambda error: self.heard.append(f"error: {error}"))
        page.on("console", lambda said: said.type == "error" and self.heard.append(f"console: {said.text}"))
        page.on("request", self.ask)

    def ask(self, request) -> None:
        """Note a request for anything but the deck itself and what it holds."""
        if not request.url.startswith(("data:", "blob:", "about:")) and ".html" not in request.url:
            self.heard.append(f"asks for {request.url}")

    def where(self) -> tuple[int, int]:
        """The slide, and how many of its answers are shown."""
        return tuple(
            self.page.evaluate(
                """() => [Reveal.getIndices().h,
                Reveal.getCurrentSlide().querySelectorAll(".fragment.visible").length]"""
            )
        )

    def steps(self):
        """Press the key to the right until nothing moves; yield each place."""
        before = None
        while before != self.where():
            before = self.where()
            yield before
            self.page.keyboard.press("ArrowRight")

    def complaints(self) -> list[str]:
        """What is wrong with any slide, and what was heard."""
        found = []
        for slide, answers in self.steps():
            self.passed.append((slide, answers))
            found += [f"slide {slide + 1}, {answers} answers: {one}" for one in self.page.evaluate(LOOK)]
        return found + self.heard


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium: the one that CHROMIUM names, or the one on the path."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not chromium:
        pytest.fail("no Chromium found: install the package chromium, or set CHROMIUM=/path/to/it")
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def show(browser, tmp_path):
    """A function that writes a deck's text as a file and opens that."""
    contexts = []

    def opened(text: str, width: int = 1280, height: int = 720, scheme: str = "light") -> Shown:
        path = tmp_path / "deck.html"
        path.write_text(slides_page.page(text), encoding="utf-8")
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
        )
        contexts.append(context)
        context.set_default_timeout(120_000)  # [ms]; nothing is asserted of how long a page takes
        shown = Shown(context.new_page())
        shown.listen(shown.page)
        shown.page.goto(path.as_uri())
        shown.page.wait_for_function("window.Reveal && Reveal.isReady()")
        shown.page.evaluate("document.fonts.ready")
        return shown

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def deck():
    return DECK.read_text(encoding="utf-8")


@pytest.mark.parametrize(("width", "height", "scheme"), [(1280, 720, "light"), (1024, 768, "dark")])
def test_the_keys_lead_through_it_every_slide_is_whole_and_no_network_is_asked(
    show, deck, width, height, scheme
):
    expected = []
    for number, slide in enumerate(read_slides(deck)):
        expected += [(number, 0), (number, 1)] if is_predicted(slide) else [(number, 0)]
    shown = show(deck, width, height, scheme)
    assert shown.complaints() == []
    assert shown.passed == expected


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("More.\n\n" + "- A line.\n" * 20, "is 1"),
        ("`" + "long" * 40 + "`", "stands outside|wide"),
        ("![x](https://example.org/x.png)", "asks for https://example.org/x.png"),
        ("![x](x.png)", "asks for file:"),
    ],
)
def test_a_slide_that_is_not_whole_is_found(show, changed, said):
    found = show(GOOD.replace("More.", changed)).complaints()
    assert any(re.search(said, one) for one in found), found


def test_a_script_that_fails_is_heard(show, monkeypatch):
    page, fails = slides_page.page, "<script>absent();</script>\n</body>"
    monkeypatch.setattr(slides_page, "page", lambda text: page(text).replace("</body>", fails))
    assert show(GOOD).complaints() == ["error: absent is not defined"]


def test_an_answer_is_hidden_until_the_key(show):
    text = GOOD.replace("More.", "Predict: what?\n\nAnswer: This.")
    shown = show(text)
    seen = "getComputedStyle(document.querySelector('.answer')).visibility"
    shown.page.keyboard.press("ArrowRight")
    assert shown.page.evaluate(seen) == "hidden"
    shown.page.keyboard.press("ArrowRight")
    assert shown.page.evaluate(seen) == "visible"


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_the_key_t_changes_between_light_and_dark(show, scheme, dark):
    shown = show(GOOD, scheme=scheme)
    ground = "getComputedStyle(document.body).backgroundColor"
    first = shown.page.evaluate(ground)
    assert (first == "rgb(255, 255, 255)") is not dark
    shown.page.keyboard.press("t")
    assert shown.page.evaluate(ground) != first
    shown.page.keyboard.press("t")
    assert shown.page.evaluate(ground) == first


def test_the_notes_open_in_a_window_of_their_own(show):
    shown = show(GOOD)
    with shown.page.expect_popup() as opened:
        shown.page.keyboard.press("s")
    notes = opened.value
    notes.wait_for_function(
        "document.querySelector('.speaker-controls-notes .value').innerText.includes('Say it')"
    )
    shown.page.keyboard.press("ArrowRight")
    notes.wait_for_function(
        "document.querySelector('.speaker-controls-notes .value').innerText.includes('Again')"
    )
    assert shown.heard == []
