"""The page "What should I do?" in a browser: by keyboard, by address, narrow and dark, and its links."""

import json
import re

import pytest
from decision_page import every_rule
from test_browser import (
    NARROW,
    Visit,
    foreign_requests,
    low_contrast,
    script_errors,
    visited,
    wider_than_screen,
)
from test_browser import book as book  # the fixtures
from test_browser import browser as browser
from test_decision_script import QUESTIONS, fits_of, method_said

pytestmark = pytest.mark.browser
PAGE = "book/decision.html"


def address_of(question: dict) -> str:
    """A question as the page's address has it."""
    return PAGE + "#" + "&".join(f"{key}={value}" for key, value in question.items())


def answer(visit: Visit, output: str) -> str:
    """What the page says for one output."""
    return visit.page.inner_text(f"#decision-answer-{output}")


def fits_shown(visit: Visit) -> list[list[str]]:
    """The table of bytes."""
    return visit.page.eval_on_selector_all(
        "#decision-fits tr", "all => all.map(r => [...r.children].map(c => c.textContent))"
    )


@pytest.mark.parametrize("name", QUESTIONS)
def test_an_address_is_answered_with_the_ledgers_bytes(browser, book, name):
    question = QUESTIONS[name]
    fits = fits_of(question)
    words = {"one": "on one card", "divided": "divided", "no": "no"}
    titles = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}
    with visited(browser, book, address_of(question)) as visit:
        assert fits_shown(visit) == [
            [titles[m], f"{f['alone']:,}", f"{f['each']:,}" if f["each"] else "–", words[f["place"]]]
            for m, f in fits.items()
        ]
        method = titles[method_said(question, fits)]
        assert answer(visit, "method").lower().startswith(method.lower())
        assert visit.page.is_visible("#decision-ladder") == name.startswith("qlora no")
        assert visit.page.input_value("#decision-rows") == str(question["rows"])
        assert script_errors(visit) == foreign_requests(visit) == []


def test_it_is_used_by_keyboard_alone(browser, book):
    with visited(browser, book, PAGE) as visit:
        page, keys = visit.page, visit.page.keyboard
        page.focus("#decision-model")
        reached = []
        for _ in range(10):
            reached.append(page.evaluate("document.activeElement.id.replace('decision-', '')"))
            keys.press("Tab")
        assert reached == [
            "model",
            "chip",
            "card",
            "cards",
            "rows",
            "length",
            "task",
            "keep",
            "aim",
            "deploy",
        ]
        assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
        page.focus("#decision-chip")
        keys.press("ArrowDown")
        page.focus("#decision-rows")
        keys.press("Control+a")
        keys.type("50")
        assert "fp16 under autocast" in answer(visit, "dtype") or "Base in fp16" in answer(visit, "dtype")
        assert "Hold out 30%" in answer(visit, "data")
        assert page.evaluate("location.hash").startswith(
            "#model=Llama-3.1-8B&card=24&cards=1&chip=fp16&rows=50"
        )
        page.reload(wait_until="networkidle")
        assert page.input_value("#decision-chip") == "fp16"
        assert "Hold out 30%" in answer(visit, "data")


def test_no_number_of_rows_is_told(browser, book):
    with visited(browser, book, PAGE) as visit:
        for text in ("", "0", "2.5", "1000000001"):
            visit.page.fill("#decision-rows", text)
            assert "whole number" in visit.page.text_content("#decision-short")
            assert not visit.page.is_visible("#decision-result")
            assert visit.page.get_attribute("#decision-rows", "aria-invalid") == "true"
        visit.page.fill("#decision-rows", "7")
        assert visit.page.is_visible("#decision-result")
        assert script_errors(visit) == []


def test_a_config_is_read_or_refused(browser, book):
    config = {"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 3, "intermediate_size": 512}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 999}
    evil = {"model_type": "<img src=x onerror=console.error('run')>"}
    with visited(browser, book, PAGE) as visit:
        visit.page.focus("#decision-own summary")
        visit.page.keyboard.press("Enter")
        visit.page.keyboard.press("Tab")
        visit.page.keyboard.insert_text(json.dumps(config))
        assert visit.page.input_value("#decision-model") == "own"
        assert visit.page.text_content("#decision-config-said").startswith("Read: llama, 0.00B")
        assert "0.0032" in answer(visit, "rate")
        assert "model=" not in visit.page.evaluate("location.hash")
        for text, words in (("{", "not JSON"), (json.dumps(evil), "are not known")):
            visit.page.fill("#decision-config", text)
            assert words in visit.page.text_content("#decision-config-said")
        assert script_errors(visit) == []


def test_a_model_that_the_ledger_refuses_is_told(browser, book):
    with visited(browser, book, f"{PAGE}#model=Gemma-3-1B&length=512") as visit:
        assert "window of 512 tokens" in visit.page.text_content("#decision-short")
        assert not visit.page.is_visible("#decision-result")


def test_will_it_fit_shows_the_same_bytes(browser, book):
    with visited(browser, book, address_of(QUESTIONS["qlora one"])) as visit:
        chosen = visit.page.text_content("#decision-fits .decision-chosen td")
        visit.page.click("#decision-fit-link")
        visit.page.wait_for_url("**/will_it_fit.html*")
        assert visit.page.text_content("#fit-parts .fit-total td") == chosen


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_on_a_narrow_screen(browser, book, scheme):
    with visited(browser, book, address_of(QUESTIONS["qlora no"]), NARROW, scheme) as visit:
        visit.page.eval_on_selector_all("article details", "all => all.forEach(e => { e.open = true; })")
        assert wider_than_screen(visit) == []
        assert low_contrast(visit) == []


def test_every_field_has_a_name(browser, book):
    with visited(browser, book, PAGE) as visit:
        unnamed = "all => all.filter(e => !e.labels.length || !e.labels[0].textContent).map(e => e.id)"
        fields = "#decision select, #decision input, #decision textarea"
        assert visit.page.eval_on_selector_all(fields, unnamed) == []


def test_every_link_leads_to_its_section(browser, book):
    """The anchors of all rules, in the built pages."""
    with visited(browser, book, PAGE) as visit:
        pages, missing = {}, []
        for see in sorted({rule["see"] for rule in every_rule()}):
            name, anchor = see.split("#")
            if name not in pages:
                pages[name] = visit.page.request.get(f"{book}book/{name}.html").text()
            if not re.search(rf'\bid="{re.escape(anchor)}"', pages[name]):
                missing.append(see)
        assert missing == []
        links = visit.page.eval_on_selector_all(
            "#decision-answers a", "all => all.map(a => a.getAttribute('href'))"
        )
        assert len(links) == 17
        assert set(links) <= {rule["see"].replace("#", ".html#") for rule in every_rule()}


def test_without_its_script_the_rules_are_there(browser, book):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{book}{PAGE}")
    assert page.is_visible("text=This page needs JavaScript")
    page.click("article details.sd-dropdown summary")
    assert page.locator("article details.sd-dropdown table").count() == 17
    assert page.is_visible("text=Rank 8, with α = 16.")
    context.close()
