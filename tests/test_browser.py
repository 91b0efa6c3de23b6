"""The built book in a real browser: nothing foreign, nothing broken, readable everywhere.

Each check is a function from a visited page to a list of complaints, and an empty list is good
news. The second half of the file holds every check against a page that is broken on purpose.
"""

import dataclasses
import functools
import hashlib
import http.server
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
import yaml
from book_print import NONE, chromium
from lora2qlora import memory
from lora2qlora.memory import ADAMW_FUSED, SHAPES, Full, MemoryLedger, QLoRA, shape_of, training_memory
from playwright.sync_api import Page, sync_playwright
from playwright.sync_api import TimeoutError as NoAnswer

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "_build" / "html"
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))
NARROW, WIDE = 390, 1400
ZOOMED = 640  # a window of 1280 px at 200 %
# axe-core 4.14.1 as its authors publish it; tests/axe/LICENSE.
AXE = ROOT / "tests" / "axe" / "axe.min.js"
AXE_SHA256 = "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c"


def pages_in(node: dict | list | str) -> list[str]:
    """Return the page names of a table of contents, in reading order."""
    if isinstance(node, list):
        return [page for item in node for page in pages_in(item)]
    if not isinstance(node, dict):
        return []
    own = [node[key] for key in ("root", "file") if key in node]
    return own + [page for value in node.values() for page in pages_in(value)]


PAGES = pages_in(TOC)
CHAPTERS = [page for page in PAGES if (ROOT / f"{page}.ipynb").exists()]


# --- Opening a page ---------------------------------------------------------------------------


@dataclass
class Visit:
    """One page, opened, and what was heard while it loaded."""

    page: Page
    base: str
    foreign: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def listen(self) -> None:
        """Note every request to another host, every failed one, and every script error."""
        self.page.on("request", self.ask)
        self.page.on("response", self.receive)
        self.page.on("requestfailed", lambda request: self.failed.setdefault(request.url, "no answer"))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self.hear)

    def ask(self, request) -> None:
        """Note a request that leaves the book's own server."""
        if not request.url.startswith((self.base, "data:", "blob:")):
            self.foreign.append(request.url)

    def receive(self, response) -> None:
        """Note an answer that is an error."""
        if response.status >= 400:
            self.failed.setdefault(response.url, str(response.status))

    def hear(self, message) -> None:
        """Note an error on the console, save those of requests, which are noted already."""
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            self.errors.append(message.text)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """A file server that does not write a line for every request."""

    def log_message(self, *args) -> None:
        """Say nothing."""


@contextmanager
def served(directory: Path):
    """Serve a directory on a free port of this machine; yield its address."""
    handler = functools.partial(QuietHandler, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@contextmanager
def visited(browser, base: str, path: str, width: int = WIDE, scheme: str = "light"):
    """Open a page, wait until it is quiet and its maths is set, and yield the visit."""
    context = browser.new_context(
        viewport={"width": width, "height": 844}, color_scheme=scheme, reduced_motion="reduce"
    )
    context.set_default_timeout(120_000)  # [ms]; nothing is asserted of how long a page takes
    visit = Visit(context.new_page(), base)
    visit.listen()
    visit.page.goto(base + path, wait_until="networkidle")
    visit.page.evaluate("async () => { await window.MathJax?.startup?.promise; await document.fonts.ready; }")
    yield visit
    context.close()


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium: the one that CHROMIUM names, or the one on the path."""
    program = chromium()
    if not program:
        pytest.fail(NONE)
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        flags += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # no other host
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def book():
    """The address of the built book."""
    missing = [page for page in PAGES if not (HTML / f"{page}.html").exists()]
    if missing:
        pytest.fail(f"not built: {', '.join(missing)}. Run `make book` first.")
    with served(HTML) as base:
        yield base


# --- The checks: each returns a list of complaints --------------------------------------------


def foreign_requests(visit: Visit) -> list[str]:
    """Requests to any other host."""
    return [f"asks another host: {url}" for url in visit.foreign]


def failed_requests(visit: Visit) -> list[str]:
    """Requests that came back with nothing, or with an error."""
    own = {url: why for url, why in visit.failed.items() if url not in visit.foreign}
    return [f"failed request: {why} {url}" for url, why in own.items()]


def script_errors(visit: Visit) -> list[str]:
    """Errors on the console and uncaught exceptions."""
    return [f"script error: {error}" for error in visit.errors]


def maths_not_set(visit: Visit, expected: bool) -> list[str]:
    """Maths that stayed source text, came out as an error, or is missing altogether."""
    bare, wrong, good = visit.page.evaluate(
        """() => [
            [...document.querySelectorAll(".math")].filter(e => !e.querySelector("mjx-container"))
                .map(e => e.textContent.trim().slice(0, 60)),
            [...document.querySelectorAll("mjx-merror")].map(e => e.textContent.slice(0, 60)),
            document.querySelectorAll("mjx-container").length]"""
    )
    missing = ["the source has maths, the page has none"] if expected and not good else []
    return [f"maths not set: {text}" for text in bare + wrong] + missing


def images_without_alt(visit: Visit) -> list[str]:
    """Images whose alternative text is missing, empty, or only a file name."""
    images = visit.page.evaluate(
        "() => [...document.images].map(i => [i.currentSrc || i.src, (i.alt || '').trim()])"
    )
    file_name = re.compile(r"\S+\.(png|svg|jpe?g|gif|webp)", re.IGNORECASE)
    return [
        f"no alternative text: {source[:80]} (alt={alt!r})"
        for source, alt in images
        if not alt or file_name.fullmatch(alt)
    ]


def wider_than_screen(visit: Visit) -> list[str]:
    """What makes the page scroll sideways."""
    width, screen = visit.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    if width <= screen:
        return []
    culprits = visit.page.evaluate(
        """() => [...document.body.querySelectorAll("*")]
            .filter(e => e.getBoundingClientRect().right > innerWidth + 1)
            .slice(0, 5).map(e => `<${e.tagName.toLowerCase()} class="${e.className}">`)"""
    )
    return [f"{width} px wide on a screen of {screen} px: {', '.join(culprits)}"]


# The background of an element is the first opaque one above it; a canvas resolves any colour.
CONTRASTS = """(selectors) => {
    const ink = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const rgba = colour => { ink.clearRect(0, 0, 1, 1); ink.fillStyle = colour;
        ink.fillRect(0, 0, 1, 1); return [...ink.getImageData(0, 0, 1, 1).data]; };
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = e => { for (; e; e = e.parentElement) {
        const colour = rgba(getComputedStyle(e).backgroundColor);
        if (colour[3] === 255) return colour; } return [255, 255, 255, 255]; };
    return selectors.flatMap(s => [...document.querySelectorAll(s)].slice(0, 40).map(e => {
        const [a, b] = [light(rgba(getComputedStyle(e).color)), light(ground(e))];
        return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), s, e.textContent.slice(0, 30)]; }));
}"""
TEXTS = """body; article p; article li; article a:not(.headerlink); article h1; article h2; article pre;
article pre span; article th; article td; article figcaption; article summary; nav a;
article .admonition-title""".split(";")


def low_contrast(visit: Visit, least: float = 4.5) -> list[str]:
    """Texts that stand out too little from their background (WCAG 2 asks for 4.5)."""
    worst: dict[str, str] = {}
    for contrast, selector, text in sorted(visit.page.evaluate(CONTRASTS, TEXTS)):
        if contrast < least:
            worst.setdefault(selector, f"contrast {contrast:.2f} of {selector!r}: {text.strip()!r}")
    return list(worst.values())


def inaccessible(visit: Visit) -> list[str]:
    """What axe calls serious or critical for people who use a keyboard or a screen reader."""
    visit.page.evaluate(AXE.read_text("utf-8"))
    found = visit.page.evaluate(
        """async () => (await axe.run(document, {resultTypes: ["violations"]})).violations
            .map(v => [v.impact, v.id, v.nodes.length, v.nodes[0].html.slice(0, 90)])"""
    )
    return [
        f"{impact}: {rule}, {count} times: {html}"
        for impact, rule, count, html in found
        if impact in {"serious", "critical"}
    ]


def text_cut_off(visit: Visit) -> list[str]:
    """Prose of which a part is hidden, or lies outside the window."""
    cut = visit.page.evaluate(
        """() => [...document.querySelectorAll("article :is(h1, h2, h3, p, li, figcaption)")]
            .filter(e => e.checkVisibility() && !e.closest(".pst-scrollable-table-container, .output, pre"))
            .filter(e => getComputedStyle(e).overflow !== "visible" && e.scrollWidth > e.clientWidth + 1
                || e.getBoundingClientRect().right > innerWidth + 1)
            .map(e => e.textContent.trim().slice(0, 50))"""
    )
    return [f"cut off: {text!r}" for text in cut]


def launch_buttons_wrong(visit: Visit, chapter: str, repository: str, branch: str) -> list[str]:
    """Colab, Binder and download buttons that are missing or lead elsewhere."""
    name = repository.removeprefix("https://github.com/")
    wanted = {
        "Colab": f"https://colab.research.google.com/github/{name}/blob/{branch}/{chapter}.ipynb",
        "Binder": f"https://mybinder.org/v2/gh/{name}/{branch}?urlpath=lab/tree/{chapter}.ipynb",
    }
    links = visit.page.eval_on_selector_all("a[href]", "all => all.map(a => a.href)")
    found = [f"no {place} button to {url}" for place, url in wanted.items() if url not in links]
    downloads = [link for link in links if link.startswith(visit.base) and ".ipynb" in link]
    if not any(visit.page.request.get(link).ok for link in downloads):
        found.append("no download button that gives the notebook")
    return found


def search_fails(browser, base: str, term: str, patience_s: float = 120) -> list[str]:
    """A search that finds nothing, or whose first result is not a page with the term."""
    with visited(browser, base, f"search.html?q={term}") as visit:
        try:
            result = visit.page.wait_for_selector("#search-results li a", timeout=1000 * patience_s)
        except NoAnswer:
            return [f"no search result for {term!r}"]
        url = result.evaluate("a => a.href.split('?')[0].split('#')[0]")
        answer = visit.page.request.get(url)
        if not answer.ok or term.lower() not in answer.text().lower():
            return [f"the search for {term!r} leads to {url}, where it is not"]
        return script_errors(visit) + foreign_requests(visit) + failed_requests(visit)


CURES = r"symptoms|\d\d[a-z]_faq_\w+"


def not_found_first(
    browser, base: str, words: str, pages: str = CURES, most: int = 10, patience_s: float = 120
) -> list[str]:
    """Words for which none of the first `most` results of the search is one of the pages."""
    with visited(browser, base, f"search.html?q={quote(words)}") as visit:
        try:
            visit.page.wait_for_selector("#search-results li a", timeout=1000 * patience_s)
        except NoAnswer:
            return [f"no search result for {words!r}"]
        visit.page.wait_for_timeout(1000)  # results come one after the other
        links = visit.page.eval_on_selector_all("#search-results li a", "all => all.map(a => a.href)")
        if not any(re.search(rf"/({pages})\.html", link) for link in links[:most]):
            return [f"the search for {words!r} leads to {links[:most]}"]
        return []


def map_marks_wrong(visit: Visit, chapters: list[str]) -> list[str]:
    """Chapters that the map or the list of the front page marks otherwise than the contents."""
    stems = {Path(chapter).name for chapter in chapters}
    marks = visit.page.eval_on_selector_all(
        "svg.road-map [data-chapter]",
        "all => all.map(e => [e.dataset.chapter, e.getAttribute('href')])",
    )
    listed = visit.page.eval_on_selector_all("article li a", "all => all.map(a => a.getAttribute('href'))")
    found = [f"not on the map: {stem}" for stem in sorted(stems - {name for name, _ in marks})]
    for name, href in marks:
        if (href == f"{name}.html") != (name in stems):
            found.append(f"the map marks {name} wrongly (link: {href})")
        if (f"{name}.html" in listed) != (name in stems):
            found.append(f"the list of chapters marks {name} wrongly")
    return found


def calculator_disagrees(visit: Visit, ledger: MemoryLedger, card_bytes: int) -> list[str]:
    """Where "Will it fit?" shows other bytes than the ledger, another answer, or a bar of other lengths."""
    rows = visit.page.eval_on_selector_all(
        "#fit-parts tr", "all => all.map(r => r.children[1].textContent.replaceAll(',', ''))"
    )
    wanted = [str(value) for value in (*dataclasses.astuple(ledger), ledger.total)]
    found = [f"the table has {rows}, the ledger {wanted}"] if rows != wanted else []
    answer = visit.page.text_content("#fit-answer")
    if answer.startswith("It fits") != (ledger.total <= card_bytes):
        found.append(f"{answer!r}, for {ledger.total} bytes on a card of {card_bytes}")
    widths = visit.page.eval_on_selector_all(
        ".fit-part", "all => all.map(e => e.getBoundingClientRect().width)"
    )
    line = visit.page.evaluate(
        """() => document.querySelector(".fit-card").getBoundingClientRect().left
            - document.querySelector(".fit-bar").getBoundingClientRect().left"""
    )
    if abs(sum(widths) / line / (ledger.total / card_bytes) - 1) > 0.03:  # a pixel or two
        found.append(f"the bar is {sum(widths):.0f} px long, the card stands at {line:.0f} px")
    return found


def source_has_maths(page: str) -> bool:
    """Whether the prose of a page, its code left out, holds dollar maths."""
    prose = ROOT / f"{page}.md"
    if prose.exists():
        text = prose.read_text("utf-8")
    else:
        cells = json.loads((ROOT / f"{page}.ipynb").read_text("utf-8"))["cells"]
        sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
        text = "\n\n".join(sources)
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    return re.search(r"\$\$.+?\$\$|\$[^$\s][^$\n]*\$", text, flags=re.DOTALL) is not None


# --- The book ---------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_page_on_a_wide_screen(browser, book, page):
    with visited(browser, book, f"{page}.html") as visit:
        assert foreign_requests(visit) == []
        assert failed_requests(visit) == []
        assert script_errors(visit) == []
        assert maths_not_set(visit, source_has_maths(page)) == []
        assert images_without_alt(visit) == []
        assert low_contrast(visit) == []
        assert inaccessible(visit) == []
        visit.page.set_viewport_size({"width": ZOOMED, "height": 422})
        assert wider_than_screen(visit) == []
        assert text_cut_off(visit) == []


@pytest.mark.parametrize("page", ["search", "genindex"])
def test_the_pages_of_the_theme_are_accessible(browser, book, page):
    with visited(browser, book, f"{page}.html") as visit:
        assert inaccessible(visit) == []


def test_axe_is_the_published_one():
    assert hashlib.sha256(AXE.read_bytes()).hexdigest() == AXE_SHA256


@pytest.mark.parametrize("page", PAGES)
def test_page_on_a_narrow_screen_in_the_dark(browser, book, page):
    with visited(browser, book, f"{page}.html", NARROW, "dark") as visit:
        assert visit.page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert wider_than_screen(visit) == []
        assert low_contrast(visit) == []
        assert script_errors(visit) == []
        assert inaccessible(visit) == []


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_can_be_launched(browser, book, chapter):
    repository = CONFIG["repository"]
    with visited(browser, book, f"{chapter}.html") as visit:
        url, branch = repository["url"], repository["branch"]
        assert launch_buttons_wrong(visit, chapter, url, branch) == []


def test_there_is_a_chapter():
    assert CHAPTERS


def test_root_leads_to_the_book(browser, book):
    with visited(browser, book, "index.html") as visit:
        visit.page.wait_for_url(f"**/{TOC['root']}.html")
        assert CONFIG["title"] in visit.page.title()


@pytest.mark.parametrize("term", ["perplexity", "adapter"])
def test_search_finds(browser, book, term):
    assert search_fails(browser, book, term) == []


ERRORS = (
    "element 0 of tensors does not require grad",
    "Found missing adapter keys while loading the checkpoint",
    "got an unexpected keyword argument",
    "CUDA out of memory",
    "incomplete metadata, file not fully covered",
    "may get different generations due to rounding errors",
    "missing pre-tokenizer type",
    "failed to apply lora adapter: tensor has incorrect shape",
    "adapter_model.bin",
    "Found an incompatible version of torchao",
)


@pytest.mark.parametrize("words", ERRORS)
def test_the_search_leads_from_an_error_to_its_cure(browser, book, words):
    assert not_found_first(browser, book, words) == []


# A term's chapter is among the first three; before it stands the glossary, or another page named so.
SUBJECTS = {
    "rank": "01_low_rank",
    "learning rate": "05_rank_across_tasks",
    "NF4": "07_nf4",
    "double quantization": "08_double_quantization",
    "merge adapter": "15_merging",
    "llama.cpp": "16_serving",
    "DoRA": "18_variants",
}


@pytest.mark.parametrize("words", SUBJECTS)
def test_the_search_leads_from_a_term_to_its_chapter(browser, book, words):
    assert not_found_first(browser, book, words, SUBJECTS[words], most=3) == []


def test_the_cheat_sheet_prints_on_one_side(browser, book):
    with visited(browser, book, "book/cheat_sheet.html") as visit:
        assert sides(visit.page.pdf(prefer_css_page_size=True)) == 1
        visit.page.add_style_tag(content=".cheat-sheet { font-size: 16pt !important; }")
        assert sides(visit.page.pdf(prefer_css_page_size=True)) > 1


def sides(pdf: bytes) -> int:
    """The pages of a PDF that Chromium wrote."""
    return len(re.findall(rb"/Type\s*/Page[^s]", pdf))


def test_map_agrees_with_the_contents(browser, book):
    with visited(browser, book, f"{TOC['root']}.html") as visit:
        assert map_marks_wrong(visit, CHAPTERS) == []


def test_will_it_fit_answers(browser, book):
    """LLaMA-65B on 48 GiB, as the QLoRA paper has it: it fits, and without checkpointing it does not."""
    chosen = {"model": "LLaMA-65B", "method": "qlora", "card": "48", "optimizer": "AdamW, fused"}
    chosen["outside"] = "2"  # as loaded
    shape, card_bytes = SHAPES["LLaMA-65B"], 48 * 2**30
    with visited(browser, book, "book/will_it_fit.html") as visit:
        for name, value in chosen.items():
            visit.page.select_option(f"#fit-{name}", value)
        visit.page.fill("#fit-rank", "6")  # 2^6
        for checkpointing in (True, False):
            visit.page.set_checked("#fit-checkpointing", checkpointing)
            ledger = training_memory(shape, QLoRA(64), 1, 512, checkpointing, ADAMW_FUSED)
            assert (ledger.total <= card_bytes) == checkpointing
            assert calculator_disagrees(visit, ledger, card_bytes) == []
        visit.page.select_option("#fit-method", "full")
        assert visit.page.is_disabled("#fit-rank")
        ledger = training_memory(shape, Full(), 1, 512, False, ADAMW_FUSED)
        assert calculator_disagrees(visit, ledger, card_bytes) == []
        assert script_errors(visit) == []


def test_the_interview_shuffles_and_keeps_its_score(browser, book):
    with visited(browser, book, "book/interview.html") as visit:
        page = visit.page
        score, cards = page.locator("#interview-score"), page.locator("details.interview-card")
        page.click("#interview-shuffle")
        assert page.locator("#interview-list details").count() == cards.count() == 30
        cards.first.locator("summary").click()
        cards.first.locator("button[name=known]").click()
        assert score.text_content() == "Known: 1 of 30. Not yet: 0. Not tried: 29."
        page.click("#interview-open")
        assert not cards.first.is_visible()
        page.click("#interview-order")
        ids = cards.evaluate_all("all => all.map(e => e.id)")
        assert ids == [f"interview-{n}" for n in range(1, 31)]
        page.reload(wait_until="networkidle")
        assert score.text_content() == "Known: 1 of 30. Not yet: 0. Not tried: 29."
        page.click("#interview-forget")
        assert score.text_content() == "Known: 0 of 30. Not yet: 0. Not tried: 30."
        assert script_errors(visit) == []


def test_the_interview_is_a_plain_list_without_its_script(browser, book):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{book}book/interview.html")
    assert page.locator("details.interview-card").count() == 30
    assert not page.is_visible("#interview-panel")
    context.close()


def answer_of(visit: Visit) -> str:
    """What "Will it fit?" answers."""
    return visit.page.text_content("#fit-answer")


def test_will_it_fit_says_what_to_change(browser, book):
    with visited(browser, book, "book/will_it_fit.html#model=LLaMA-13B&card=8&batch=4&rank=7") as visit:
        assert visit.page.input_value("#fit-model") == "LLaMA-13B"
        assert visit.page.input_value("#fit-rank") == "4"  # 7 is no rank on the page
        rungs = visit.page.eval_on_selector_all(
            "#fit-rungs tr", "all => all.map(r => [...r.children].map(c => c.textContent))"
        )
        assert answer_of(visit).startswith("It does not fit")
        assert [rung[0].split(" ")[0] for rung in rungs] == [
            "1",
            "optimizer",
            "half",
            "adapters",
            "half",
            "a",
        ]
        first = [rung for rung in rungs if rung[3] == "fits from here on"]
        assert f"down to: {first[0][0]}." in answer_of(visit)
        assert visit.page.eval_on_selector_all(".fit-first", "all => all.length") == len(first) == 1
        visit.page.select_option("#fit-card", "141")
        assert answer_of(visit).startswith("It fits")
        assert not visit.page.is_visible("#fit-ladder")
        assert "card=141" in visit.page.evaluate("location.hash")
        visit.page.reload()
        assert visit.page.input_value("#fit-card") == "141"
        assert script_errors(visit) == []


def test_will_it_fit_reads_a_config(browser, book):
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 99000}
    config = {"model_type": "qwen2", "num_key_value_heads": 8, "intermediate_size": 12800} | sizes
    evil = {"model_type": "<img src=x onerror=console.error('run')>"}
    with visited(browser, book, "book/will_it_fit.html") as visit:
        visit.page.focus("#fit-own summary")
        visit.page.keyboard.press("Enter")
        visit.page.keyboard.press("Tab")
        visit.page.keyboard.insert_text(json.dumps(config))
        assert visit.page.input_value("#fit-model") == "own"
        ledger = training_memory(
            shape_of(config), QLoRA(dtype=torch.float32), 1, 512, True, memory.ADAMW_FOREACH
        )
        assert calculator_disagrees(visit, ledger, 24 * 2**30) == []
        for text, words in (("{", "not JSON"), (json.dumps(evil), "are not known"), ("", "")):
            visit.page.fill("#fit-config", text)
            assert words in visit.page.text_content("#fit-config-said")
        dropped = visit.page.evaluate_handle(
            """text => { const moved = new DataTransfer();
                moved.items.add(new File([text], "config.json")); return moved; }""",
            json.dumps(config | {"model_type": "mixtral"}),
        )
        visit.page.dispatch_event("#fit-own", "drop", {"dataTransfer": dropped})
        visit.page.wait_for_function(
            "document.getElementById('fit-config-said').textContent.includes('mixture of experts')"
        )
        file = {"name": "config.json", "mimeType": "application/json", "buffer": json.dumps(config).encode()}
        visit.page.set_input_files("#fit-file", file)
        visit.page.wait_for_function(
            "document.getElementById('fit-config-said').textContent.includes('qwen2')"
        )
        assert script_errors(visit) == foreign_requests(visit) == failed_requests(visit) == []


def test_every_field_of_will_it_fit_has_a_name(browser, book):
    with visited(browser, book, "book/will_it_fit.html") as visit:
        fields = "#fit select, #fit input, #fit textarea"
        unnamed = "all => all.filter(e => !e.labels.length || !e.labels[0].innerText).map(e => e.id)"
        visit.page.eval_on_selector("#fit-own", "e => { e.open = true; }")
        assert visit.page.eval_on_selector_all(fields, unnamed) == []


def quiz_questions() -> list[dict]:
    """The questions of the page "Quiz", in their order."""
    text = (ROOT / "book" / "_static" / "quiz_data.js").read_text("utf-8")
    data = json.loads(text.partition("var QUIZ = ")[2].rstrip().rstrip(";"))
    return [question for part in data for question in part["questions"]]


def right_answer(question: dict) -> int:
    """The place of the right one among a question's answers."""
    return next(i for i, option in enumerate(question["options"]) if option["right"])


def test_the_quiz_explains_answers_and_keeps_them(browser, book):
    first, second = quiz_questions()[:2]
    with visited(browser, book, "book/quiz.html") as visit:
        page = visit.page
        score, part = page.locator("#quiz-score"), page.locator("#quiz-score-I")
        assert page.locator(".quiz-part fieldset").count() == 25
        one, two = page.locator(f"#quiz-{first['id']}"), page.locator(f"#quiz-{second['id']}")
        one.locator("button").click()
        assert one.locator("[role=status]").text_content() == "Choose an answer first."
        one.locator("input").nth(right_answer(first)).check()
        one.locator("button").click()
        assert one.locator("[role=status]").text_content().startswith("Right. ")
        assert one.locator("code").count() >= 3
        two.locator("input").nth((right_answer(second) + 1) % 3).check()
        two.locator("button").click()
        said = two.locator("[role=status]").text_content()
        assert said.startswith("Not right. ")
        assert f"Right: {second['options'][right_answer(second)]['text']}" in said
        wrong = [option["said"]["url"] for option in second["options"] if "said" in option]
        links = two.locator("a").evaluate_all("all => all.map(a => a.getAttribute('href'))")
        assert sorted(links) == sorted([*wrong, f"{second['chapter']}.html#{second['anchor']}"])
        assert score.text_content() == "Right: 1 of 25. Not right: 1. Not answered: 23."
        assert part.text_content() == "Right: 1 of 5. Not right: 1. Not answered: 3."
        page.reload(wait_until="networkidle")
        assert score.text_content() == "Right: 1 of 25. Not right: 1. Not answered: 23."
        assert one.locator("input").nth(right_answer(first)).is_checked()
        two.locator("button").click()  # try again
        assert score.text_content() == "Right: 1 of 25. Not right: 0. Not answered: 24."
        assert two.locator("[role=status]").text_content() == ""
        page.click("#quiz-forget")
        assert score.text_content() == "Right: 0 of 25. Not right: 0. Not answered: 25."
        assert page.locator("#quiz-said").text_content() == "Your answers are forgotten."
        assert page.locator(".quiz-part input:checked, .quiz-part input:disabled").count() == 0
        page.reload(wait_until="networkidle")
        assert score.text_content() == "Right: 0 of 25. Not right: 0. Not answered: 25."
        assert script_errors(visit) == foreign_requests(visit) == failed_requests(visit) == []


def test_the_quiz_works_by_keyboard_and_names_its_parts(browser, book):
    question = quiz_questions()[0]
    with visited(browser, book, "book/quiz.html") as visit:
        page = visit.page
        field = page.locator(f"#quiz-{question['id']}")
        field.locator("input").first.focus()
        for _ in range(right_answer(question)):
            page.keyboard.press("ArrowDown")
        page.keyboard.press("Space")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Check"
        page.keyboard.press("Enter")
        assert field.locator("[role=status]").text_content().startswith("Right. ")
        assert page.evaluate("document.activeElement.textContent") == "Try again"  # focus is not lost
        unnamed = "all => all.filter(e => !e.labels.length || !e.labels[0].innerText.trim()).length"
        assert page.eval_on_selector_all(".quiz-part input", unnamed) == 0
        legends = page.locator(".quiz-part fieldset > legend:first-child")
        assert legends.count() == 25


@pytest.mark.parametrize(("width", "scheme"), [(WIDE, "light"), (NARROW, "dark")])
def test_the_quiz_is_readable_when_all_is_answered(browser, book, width, scheme):
    with visited(browser, book, "book/quiz.html", width, scheme) as visit:
        for question in quiz_questions():
            field = visit.page.locator(f"#quiz-{question['id']}")
            field.locator("input").nth((right_answer(question) + 1) % 3).check()
            field.locator("button").click()
        selectors = [".quiz-part legend", ".quiz-part label", ".quiz-part button", ".quiz-part p", ".quiz p"]
        selectors += [".quiz-part code", ".quiz-part a"]
        assert [c for c in visit.page.evaluate(CONTRASTS, selectors) if c[0] < 4.5] == []
        assert wider_than_screen(visit) == []


def test_the_quiz_leads_to_sections_that_are_there():
    for question in quiz_questions():
        chapter = (HTML / "book" / f"{question['chapter']}.html").read_text("utf-8")
        assert f'id="{question["anchor"]}"' in chapter, question["id"]


# --- Every check, held against a page that is broken on purpose -------------------------------

GOOD = """<!doctype html><html lang="en"><head><title>page</title>
<link rel="icon" href="data:,"></head><body><article><p>Text.</p>{}</article></body></html>"""
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="
REPOSITORY = "https://github.com/an_account/a-book"


def complaints(visit: Visit) -> list[str]:
    """All that the checks of any page have to say."""
    return (
        foreign_requests(visit)
        + failed_requests(visit)
        + script_errors(visit)
        + maths_not_set(visit, expected=False)
        + images_without_alt(visit)
        + wider_than_screen(visit)
        + low_contrast(visit)
    )


@contextmanager
def visited_page(browser, directory: Path, body: str):
    """Write a page with this body, serve it, and open it on a narrow screen."""
    (directory / "page.html").write_text(GOOD.format(body), "utf-8")
    with served(directory) as base, visited(browser, base, "page.html", NARROW) as visit:
        yield visit


def test_a_good_page_passes(browser, tmp_path):
    body = f'<img src="{PIXEL}" alt="A dot."><span class="math"><mjx-container></mjx-container>'
    with visited_page(browser, tmp_path, body) as visit:
        assert complaints(visit) == []


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ('<script src="https://other.example/x.js"></script>', "asks another host"),
        ('<img alt="A dot." src="https://other.example/x.png">', "asks another host"),
        ('<script src="missing.js"></script>', "failed request: 404"),
        ("<script>console.error('broken')</script>", "script error: broken"),
        ("<script>undefined_name()</script>", "script error: undefined_name is not defined"),
        ('<span class="math">\\(x^2\\)</span>', "maths not set"),
        ('<span class="math"><mjx-container><mjx-merror>x</mjx-merror></mjx-container></span>',
         "maths not set"),
        (f'<img src="{PIXEL}">', "no alternative text"),
        (f'<img src="{PIXEL}" alt=" ">', "no alternative text"),
        (f'<img src="{PIXEL}" alt="../_images/0a1b2c.png">', "no alternative text"),
        ('<div class="wide" style="width: 500px">wide</div>', '<div class="wide">'),
        ('<p style="color: #999">pale</p>', "contrast 2.85"),
        ('<div style="background: #222"><p style="color: rgb(70 70 70)">dark</p></div>',
         "contrast 1.6"),
    ],
)  # fmt: skip
def test_a_broken_page_is_caught(browser, tmp_path, body, complaint):
    with visited_page(browser, tmp_path, body) as visit:
        found = complaints(visit)
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("body", "rule"),
    [
        ("<button></button>", "button-name"),
        ('<input type="text">', "label"),
        ('<a href="x.html"></a>', "link-name"),
        ('<p style="color: #bbb">pale</p>', "color-contrast"),
        ('<button aria-label="Search">Find</button>', "label-content-name-mismatch"),
    ],
)
def test_what_shuts_readers_out_is_caught(browser, tmp_path, body, rule):
    with visited_page(browser, tmp_path, body) as visit:
        found = inaccessible(visit)
    assert [rule] == [line.split(": ")[1].split(",")[0] for line in found]


def test_cut_text_is_caught(browser, tmp_path):
    body = '<p style="width: 50px; overflow: hidden; white-space: nowrap">A sentence that is cut off.</p>'
    with visited_page(browser, tmp_path, f"<p>Good.</p>{body}") as visit:
        assert text_cut_off(visit) == ["cut off: 'A sentence that is cut off.'"]


def test_missing_maths_is_caught(browser, tmp_path):
    with visited_page(browser, tmp_path, "<p>$x^2$</p>") as visit:
        assert maths_not_set(visit, expected=True) == ["the source has maths, the page has none"]


def test_wrong_launch_buttons_are_caught(browser, tmp_path):
    other = "https://colab.research.google.com/github/other/a-book/blob/main/book/01_x.ipynb"
    with visited_page(browser, tmp_path, f'<a href="{other}">C</a><a href="x.ipynb">D</a>') as visit:
        found = launch_buttons_wrong(visit, "book/01_x", REPOSITORY, "main")
    assert [line.split(" button")[0] for line in found] == ["no Colab", "no Binder", "no download"]


def test_right_launch_buttons_pass(browser, tmp_path):
    colab = "https://colab.research.google.com/github/an_account/a-book/blob/main/book/01_x.ipynb"
    binder = "https://mybinder.org/v2/gh/an_account/a-book/main?urlpath=lab/tree/book/01_x.ipynb"
    (tmp_path / "x.ipynb").write_text("{}", "utf-8")
    body = f'<a href="{colab}">C</a> <a href="{binder}">B</a> <a href="x.ipynb">D</a>'
    with visited_page(browser, tmp_path, body) as visit:
        assert launch_buttons_wrong(visit, "book/01_x", REPOSITORY, "main") == []


def test_a_search_that_leads_elsewhere_is_caught(browser, tmp_path):
    found = '<ul id="search-results"><li><a href="{}.html">x</a></li></ul>'
    with served(tmp_path) as base:
        for page, missing in (("symptoms", 0), ("20a_faq_training", 0), ("chapter", 1)):
            (tmp_path / "search.html").write_text(GOOD.format(found.format(page)), "utf-8")
            assert len(not_found_first(browser, base, "an error")) == missing
        (tmp_path / "search.html").write_text(GOOD.format(""), "utf-8")
        assert "no search result" in not_found_first(browser, base, "x", patience_s=0.5)[0]


def test_a_search_that_fails_is_caught(browser, tmp_path):
    page = GOOD.format('<ul id="search-results"><li><a href="found.html">x</a></li></ul>')
    (tmp_path / "search.html").write_text(page, "utf-8")
    (tmp_path / "found.html").write_text(GOOD.format("Here is Perplexity."), "utf-8")
    with served(tmp_path) as base:
        assert search_fails(browser, base, "perplexity") == []
        assert "where it is not" in search_fails(browser, base, "adapter")[0]
        (tmp_path / "search.html").write_text(GOOD.format(""), "utf-8")
        assert search_fails(browser, base, "adapter", patience_s=0.5) == ["no search result for 'adapter'"]


def test_wrong_marks_on_the_map_are_caught(browser, tmp_path):
    body = (
        '<svg class="road-map"><a data-chapter="00_a" href="00_a.html"></a>'
        '<a data-chapter="01_b" href="01_b.html"></a><g data-chapter="02_c"></g></svg>'
        '<ul><li><a href="02_c.html">c</a></li></ul>'
    )
    with visited_page(browser, tmp_path, body) as visit:
        found = map_marks_wrong(visit, ["book/00_a", "book/02_c", "book/03_d"])
    assert found == [
        "not on the map: 03_d",
        "the list of chapters marks 00_a wrongly",
        "the map marks 01_b wrongly (link: 01_b.html)",
        "the map marks 02_c wrongly (link: None)",
    ]


def test_a_wrong_calculator_is_caught(browser, tmp_path):
    body = (
        '<p id="fit-answer">It fits</p><table><tbody id="fit-parts">{}</tbody></table>'
        '<div class="fit-bar" style="position: relative; width: 200px">'
        '<div class="fit-part" style="width: {}px">.</div>'
        '<div class="fit-card" style="position: absolute; left: 100px">.</div></div>'
    )
    rows = "".join(f"<tr><th></th><td>{n}</td></tr>" for n in (5, 0, 0, 0, 0, 0, 0, 0, 5))
    ledger = MemoryLedger(weights=5)
    for cells, width, card_bytes, complaint in (
        (rows, 50, 10, None),
        (rows.replace("5", "6"), 50, 10, "the table has"),
        (rows, 125, 4, "It fits"),
        (rows, 60, 10, "the bar is 60 px long"),
    ):
        with visited_page(browser, tmp_path, body.format(cells, width)) as visit:
            found = calculator_disagrees(visit, ledger, card_bytes)
        assert len(found) == (complaint is not None)
        assert not found or complaint in found[0]


def test_pages_of_a_table_of_contents():
    parts = [{"caption": "p", "chapters": [{"file": "b", "sections": [{"file": "c"}]}]}]
    assert pages_in({"format": "jb-book", "root": "a", "parts": parts}) == ["a", "b", "c"]
