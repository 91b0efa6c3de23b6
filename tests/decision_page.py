"""book/decision.md: `make decision-page` writes it, with its figures and a table of all its rules.

`python tests/decision_page.py` writes the page and book/_static/decision_figures.js. The rules themselves are
written by hand, in book/_static/decision_rules.js and decision_rules_after.js: where a number belongs, a name
stands in braces. test_decision.py holds the written files to what would be written.
"""

import json
import re
from functools import cache
from pathlib import Path

from book_notebook import read_chapter
from decision_figures import figures
from docutils.nodes import make_id

ROOT = Path(__file__).resolve().parents[1]
STATIC = ROOT / "book" / "_static"
PAGE, FIGURES = ROOT / "book" / "decision.md", STATIC / "decision_figures.js"
RULES = ("decision_rules.js", "decision_rules_after.js")
HEAD = "/* Written by tests/decision_page.py (make decision-page) from records and chapters' outputs. */\n"
# What the page computes for the reader's own setting.
LIVE = ("gb", "room", "cards", "cure", "saved", "steps", "adapter_mb", "model_gb")


def rules() -> tuple[dict, dict]:
    """The kinds of input, and the outputs with their rules."""
    parts = []
    for name in RULES:
        text = (STATIC / name).read_text(encoding="utf-8")
        parts.append(json.loads(text[text.index(" = ") + 3 :].rstrip().removesuffix(";")))
    return parts[0]["kinds"], {**parts[0]["outputs"], **parts[1]["outputs"]}


def every_rule() -> list[dict]:
    """All rules of all outputs."""
    return [rule for output in rules()[1].values() for rule in output["rules"]]


@cache
def sections(page: str) -> dict[str, str]:
    """The titles of a page's sections by their anchors: a label, and what Sphinx makes of the title."""
    path = ROOT / "book" / f"{page}.ipynb"
    if path.exists():
        text = "\n\n".join(cell.source for cell in read_chapter(path).prose)
    else:
        text = (ROOT / "book" / f"{page}.md").read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    found = re.findall(r"(?:^\(([\w-]+)\)=\n+)?^#+ (.+)$", text, re.M)
    return {anchor: title for label, title in found for anchor in {label or make_id(title), make_id(title)}}


def link_text(see: str) -> str:
    """What the link to a section says."""
    page, anchor = see.split("#")
    title = sections(page)[anchor]
    number = re.match(r"\d\d[a-c]?", page)
    name = f"chapter {number.group()}" if number else sections(page)[next(iter(sections(page)))]
    return f"{name}, “{title}”"


def data() -> str:
    """What decision_figures.js must hold."""
    links = {rule["see"]: link_text(rule["see"]) for rule in every_rule()}
    found = json.dumps({"figures": figures(), "links": links}, indent=1, ensure_ascii=False)
    return f"{HEAD}var DECISION_FIGURES = {found};\n"


# --- the table of all rules -------------------------------------------------------------------------


def filled(text: str, known: dict) -> str:
    """A rule's words with its figures; what only the reader's setting gives is an ellipsis."""
    return re.sub(r"\{(\w+)\}", lambda m: "…" if m[1] in LIVE else known[m[1]]["text"], text).strip()


def condition(rule: dict, kinds: dict) -> str:
    """For which input a rule is."""
    parts = []
    for kind, values in rule["if"].items():
        others = [value for value in kinds[kind] if value not in values]
        negated = 2 * len(others) < len(values)
        words = " or ".join(kinds[kind][value] for value in (others if negated else values))
        parts.append(f"{NAMES[kind]}: {'not ' * negated}{words}")
    return "; ".join(parts)


NAMES = {
    "task": "task",
    "deploy": "deployment",
    "chip": "hardware",
    "aim": "aim",
    "keep": "to keep",
    "rows": "rows",
    "size": "size",
    "several": "cards",
    "full": "full fine-tuning",
    "lora": "LoRA",
    "qlora": "QLoRA",
    "train": "training",
    "method": "method",
    "place": "place",
}


def sources(rule: dict, known: dict) -> str:
    """Where a rule's numbers are from."""
    names = re.findall(r"\{(\w+)\}", rule["say"] + rule["why"] + rule.get("open", ""))
    found = ["the ledger, on this page" if name in LIVE else known[name]["from"] for name in names]
    return ", ".join(dict.fromkeys(found)) or "–"


def table(output: dict, kinds: dict, known: dict) -> str:
    """The rules of one output."""
    lines = ["| if | then | because | numbers from |", "|:--|:--|:--|:--|"]
    for rule in output["rules"]:
        page = rule["see"].split("#")[0]
        because = filled(rule["why"], known)
        if "open" in rule:
            because += f" **UNDECIDED**: {filled(rule['open'], known)}"
        suffix = "ipynb" if (ROOT / "book" / f"{page}.ipynb").exists() else "md"
        because += f" [{link_text(rule['see'])}]({page}.{suffix})"
        cells = (condition(rule, kinds), filled(rule["say"], known), because, sources(rule, known))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def page() -> str:
    """The page's text."""
    (kinds, outputs), known = rules(), figures()
    tables = [f"**{o['title']}**\n\n{table(o, kinds, known)}" for o in outputs.values()]
    template = (Path(__file__).parent / "decision_template.txt").read_text(encoding="utf-8")
    return template.replace("{RULES}", "\n\n".join(tables))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    FIGURES.write_text(data(), encoding="utf-8")
