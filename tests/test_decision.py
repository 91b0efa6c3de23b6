"""The page "What should I do?": its rules answer any input, and its figures are what their sources say."""

import itertools
import re

import decision_figures
import decision_page
import pytest
from decision_page import LIVE, PAGE, every_rule, rules
from lora2qlora.lab import measured

KINDS, OUTPUTS = rules()
PLACEHOLDER = re.compile(r"\{(\w+)\}")
# Numbers that are names: formats, ranks that a claim compares, sizes of models.
NAMES = re.compile(
    r"NF4|FSDP2|bf16|fp16|float32|\bF(16|32)\b|Q[48]_0|QLoRA paper takes it for \d+B|[Aa]n? (7|8|70)B model"
    r"|(4|8|16|32)[- ]bits?\b|[Rr]ank (1|64)\b|64 unrelated|one of 64|within 5 %|square of 300"
    r"|Adding a thousandth to 1 |better than 1 on"
)


# --- the rules ------------------------------------------------------------------------------------


def gaps(output: dict) -> list[str]:
    """Inputs for which an output has no rule, or several."""
    asked = sorted({kind for rule in output["rules"] for kind in rule["if"]})
    found = []
    for values in itertools.product(*(KINDS[kind] for kind in asked)):
        kinds = dict(zip(asked, values, strict=True))
        hits = [r for r in output["rules"] if all(kinds[kind] in r["if"][kind] for kind in r["if"])]
        if len(hits) != 1:
            found.append(f"{kinds}: {len(hits)} rules")
    return found


@pytest.mark.parametrize("name", OUTPUTS)
def test_any_input_has_one_rule_for_each_output(name):
    assert gaps(OUTPUTS[name]) == []


def test_a_gap_and_an_overlap_are_found():
    few, rest = {"if": {"rows": ["few"]}}, {"if": {"rows": ["like", "many"]}}
    assert gaps({"rules": [few, rest]}) == []
    assert gaps({"rules": [few]}) == ["{'rows': 'like'}: 0 rules", "{'rows': 'many'}: 0 rules"]
    assert gaps({"rules": [few, rest, few]}) == ["{'rows': 'few'}: 2 rules"]


@pytest.mark.parametrize("rule", every_rule(), ids=lambda rule: rule["say"][:40])
def test_a_rule_is_whole(rule):
    assert {"if", "see", "say", "why"} <= set(rule) <= {"if", "see", "say", "why", "open", "set"}
    for kind, values in rule["if"].items():
        assert set(values) <= set(KINDS[kind])
    assert all(rule[part].strip() for part in ("say", "why"))


def unknown_numbers(rule: dict, known: set[str]) -> list[str]:
    """Names in braces that nothing gives, and digits that were typed in."""
    found = []
    for part in ("say", "why", "open"):
        text = rule.get(part, "")
        found += [name for name in PLACEHOLDER.findall(text) if name not in known]
        found += re.findall(r"\d\S*", NAMES.sub("", PLACEHOLDER.sub("", text)))
    return found


def test_every_number_of_a_rule_has_a_source():
    known = {*decision_figures.figures(), *LIVE}
    assert [found for rule in every_rule() if (found := unknown_numbers(rule, known))] == []
    used = {name for rule in every_rule() for part in ("say", "why", "open")
            for name in PLACEHOLDER.findall(rule.get(part, ""))}  # fmt: skip
    assert known - used == set()


def test_a_typed_number_is_found():
    assert unknown_numbers({"say": "Rank 8 in 16 bits, {rnk}."}, {"rank"}) == ["rnk", "8"]


def test_a_section_that_is_not_there_is_found():
    assert decision_page.link_text("05_rank_across_tasks#which-rank") == "chapter 05, “Which rank”"
    with pytest.raises(KeyError):
        decision_page.link_text("05_rank_across_tasks#which-rnk")


# --- what is written ------------------------------------------------------------------------------


def test_the_page_and_its_figures_are_what_would_be_written():
    assert decision_page.FIGURES.read_text(encoding="utf-8") == decision_page.data(), "run make decision-page"
    assert PAGE.read_text(encoding="utf-8") == decision_page.page(), "run make decision-page"


@pytest.mark.parametrize("name", ["rank_sweep", "quantization_atlas", "merging", "speed"])
def test_another_record_is_noticed(name, monkeypatch):
    def altered(asked, *options):
        records = load(asked, *options)
        for r in records if asked == name else ():
            for place, figures in enumerate((r.figures, *r.figures.get("ways", {}).values()), r.seed):
                figures |= {k: v + 0.2 * place for k, v in figures.items() if k in ("test_loss", "loss")}
            if r.configuration.get("part") == "step":
                r.figures["seconds"]["peft_bnb"] = [2 * t for t in r.figures["seconds"]["peft_bnb"]]
        return records

    before, load = decision_figures.of_records(), measured.load
    monkeypatch.setattr(measured, "load", altered)
    assert decision_figures.of_records() != before


def test_a_gpu_record_replaces_the_reports(monkeypatch):
    reports = {"torchtune": "28%", "litgpt": "56%"}
    assert decision_figures.of_gpu(reports)["slower_gpu"]["text"] == "28% to 56%"
    rounds = {"qlora-peft": {"rounds": [1.5, 1.5, 1.5]}, "lora": {"rounds": [1.0, 1.0, 1.0]}}
    run = measured.Record({"device": "X"}, 0, rounds, {})
    monkeypatch.setattr(measured, "on_gpu", lambda *_: [run])
    found = decision_figures.of_gpu(reports)
    assert found["slower_gpu"] == {"text": "50%", "from": "record gpu"}
    assert "one card, X." in found["slower_gpu_basis"]["text"]


def test_an_output_that_says_something_else_is_noticed(monkeypatch):
    monkeypatch.setattr(decision_figures, "printed", lambda chapter: "nothing of the kind")
    with pytest.raises(ValueError, match="gives nothing; mend the pattern"):
        decision_figures.of_chapters()
    with pytest.raises(ValueError, match=r"\['1', '2'\]"):
        decision_figures.only(r"x(\d)", "x1 x2 x1", "x")
