"""The table of adapter conformance is measured again: each cell ends as the record and the page say.

Results must be the same, and what is wrong by as much, to a twentieth; how equal is equal may differ.
"""

import copy

import conformance
import conformance_page
import conformance_vllm
import pytest
import serve_vllm
import torch
from conformance_kinds import KINDS
from lora2qlora.lab import measured
from lora2qlora.lora import LoRALinear
from peft import PeftModel
from peft.tuners.lora import LoraLayer

ROOT = conformance_page.ROOT
RECORD = conformance_page.stored()
FOUR_BITS = "PEFT's merge over 4 bits"  # a load by transformers each, and slower than all others together
QUICK = tuple(way for way in conformance.WAYS if way != FOUR_BITS)


def same(found: dict, recorded: dict) -> bool:
    """Whether a cell ended as another did."""
    if found["result"] == recorded["result"] == "wrong":
        close = found["largest"] == pytest.approx(recorded["largest"], rel=0.05)
        return close and bool(found["warned"]) == bool(recorded["warned"])
    return found["result"] == recorded["result"] and found.get("words") == recorded.get("words")


def differ(found: dict[str, dict], recorded: dict[str, dict]) -> dict:
    return {way: (cell, recorded[way]) for way, cell in found.items() if not same(cell, recorded[way])}


@pytest.mark.parametrize("kind", KINDS)
def test_each_way_ends_as_on_record(kind):
    pytest.importorskip("xllamacpp")
    found = conformance.measure(kind, QUICK)
    assert found["effect"] == pytest.approx(RECORD["kinds"][kind]["effect"], rel=0.05)
    assert found["effect"] > 100 * conformance.WRONG  # an adapter that were left out would be seen
    assert differ(found["cells"], RECORD["kinds"][kind]["cells"]) == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_pefts_merge_over_bitsandbytes_ends_as_on_record(kind):
    found = conformance.measure(kind, [FOUR_BITS])
    assert differ(found["cells"], RECORD["kinds"][kind]["cells"]) == {}


@pytest.mark.slow
@pytest.mark.parametrize("kinds", conformance_vllm.groups(), ids=lambda kinds: kinds[0])
def test_vllm_ends_as_on_record(kinds):
    try:
        found, _ = conformance_vllm.measure(kinds)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    recorded = {kind: RECORD["kinds"][kind]["cells"]["vLLM"] for kind in kinds}
    assert differ(found, recorded) == {}


def test_the_record_has_every_kind_and_every_way():
    assert list(RECORD["kinds"]) == list(KINDS)
    ways = {way for table in conformance_page.TABLES.values() for way in table}
    assert set(conformance.WAYS) | {conformance_vllm.WAY} == ways
    assert all(set(entry["cells"]) == ways for entry in RECORD["kinds"].values())


def test_this_package_is_nowhere_wrong():
    ours = conformance_page.TABLES[conformance_page.OURS]
    assert [(k, way) for k, way, _ in conformance_page.cells(RECORD, "wrong") if way in ours] == []
    assert set(conformance.OURS) == set(ours)


def test_the_page_says_what_the_record_says():
    text = (ROOT / conformance_page.PAGE).read_text(encoding="utf-8")
    assert text == conformance_page.page(ROOT, RECORD)


# --- that the advice works -------------------------------------------------------------------------

TIED = "LoRA on a tied head"
LLAMAS = [name for name, kind in KINDS.items() if not kind.is_moe and name != TIED]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", LLAMAS)
def test_merged_by_peft_and_exported_it_is_equal_in_llama_cpp(kind):
    pytest.importorskip("xllamacpp")
    with conformance.case_of(kind) as case:
        merged = conformance.merged_and_saved(case, case.base())
        assert conformance.in_llama_cpp(case, merged) <= conformance.BOUND


@pytest.mark.filterwarnings("ignore")
def test_a_head_of_its_own_is_merged_right():
    with conformance.case_of(TIED) as case:
        base = case.base()
        base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
        base.config.tie_word_embeddings = False
        merged = conformance.merged_and_saved(case, base)
        assert conformance.apart(case.says(merged), case.wanted) <= conformance.BOUND


@pytest.mark.filterwarnings("ignore")
def test_a_sum_of_rslora_is_equal_with_scaling_1():
    with conformance.case_of("rsLoRA") as case:
        model = conformance.summed(case)
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.scaling["sum"] = 1.0
        assert conformance.apart(case.says(model), case.wanted) <= conformance.BOUND


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_base_of_four_bits_is_merged_right_when_dequantized_first():
    with conformance.case_of("rsLoRA") as case:
        folder = str(case.folder)
        kept = case.says(PeftModel.from_pretrained(case.four_bits(), folder).eval())
        merged = conformance.merged_and_saved(case, case.four_bits().dequantize())
        assert conformance.apart(case.says(merged), kept) <= conformance.BOUND


# --- that the checks can fail ----------------------------------------------------------------------


def test_an_adapter_at_half_its_scale_is_wrong(monkeypatch):
    def halved(case):
        model = case.base()
        conformance.load_adapter(model, case.folder)
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.alpha /= 2
        return conformance.apart(case.says(model), case.wanted)

    monkeypatch.setitem(conformance.WAYS, "`load_adapter`", halved)
    found = conformance.measure("plain LoRA", ["`load_adapter`"])["cells"]
    assert found["`load_adapter`"]["result"] == "wrong"
    assert list(differ(found, RECORD["kinds"]["plain LoRA"]["cells"])) == ["`load_adapter`"]


def test_what_is_neither_rounding_nor_an_error_is_no_result():
    assert conformance.judge(9e-5)["result"] == "equal"
    assert conformance.judge(2e-2)["result"] == "wrong"
    with pytest.raises(AssertionError, match="neither"):
        conformance.judge(1e-3)


def test_a_fault_is_no_refusal(monkeypatch):
    def broken(case):
        raise TypeError("a fault")

    monkeypatch.setitem(conformance.WAYS, "`load_adapter`", broken)
    with pytest.raises(TypeError, match="a fault"):
        conformance.measure("plain LoRA", ["`load_adapter`"])


def test_other_words_warnings_and_figures_are_seen():
    cell = {"result": "wrong", "largest": 2.0, "warned": ""}
    assert same(cell | {"largest": 2.05}, cell)
    assert not same(cell | {"largest": 2.2}, cell)
    assert not same(cell | {"warned": "x"}, cell)
    assert not same({"result": "refused", "words": "a"}, {"result": "refused", "words": "b"})


def changed(kind, way, cell):
    record = copy.deepcopy(RECORD)
    record["kinds"][kind]["cells"][way] = cell
    return record


def test_what_is_wrong_needs_advice_and_advice_something_wrong():
    wrong = {"result": "wrong", "largest": 2.0, "warned": ""}
    with pytest.raises(ValueError, match="nothing in WRONG says what to do"):
        conformance_page.tables(changed("plain LoRA", "PEFT, loaded again", wrong))
    equal = {"result": "equal", "largest": 0.0}
    with pytest.raises(ValueError, match="is not wrong any more"):
        conformance_page.tables(changed("rsLoRA", "PEFT's sum, weights 1 and 0", equal))


# --- vLLM, on record -------------------------------------------------------------------------------


def test_vllms_rows_without_an_adapter_get_the_last_one_where_all_slots_are_taken():
    """The advice about `max_loras`; every other row answers as transformers does."""
    records = [r for r in measured.load("serving_vllm") if r.configuration["prompts"] == 20]
    assert {r.configuration["slots"] for r in records} == {2, 3}
    for record in records:
        assert record.figures["largest_difference"] < 1e-3
        assert min(record.figures["changed_by_adapter"].values()) > 15
        for name, row in record.figures["batches"].items():
            is_taken = name == "mixed: base" and record.configuration["slots"] == 2
            assert row["right"] == (0 if is_taken else row["rows"]), name
            assert not is_taken or row["as_the_last_adapter"] == row["rows"]


# --- vLLM without vLLM -----------------------------------------------------------------------------


def test_without_vllm_its_column_stays_and_the_reason_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vLLM is not installed: .*make serve-vllm"):
        conformance_vllm.measure(["plain LoRA"], tmp_path / "bin" / "python")
    assert (ROOT / "Makefile").read_text(encoding="utf-8").count("\nserve-vllm: ") == 1
    with pytest.raises(SystemExit, match="skipped: vLLM is not installed"):
        serve_vllm.main(["--python", str(tmp_path / "python")])


def test_vllms_words_and_numbers_become_cells(monkeypatch):
    """A stand-in answers for one kind with what the trained model says, and refuses another."""

    def ask(python, request, place):
        assert request["slots"] == 3
        rows = {"tokens": [[1, 2]] * 3, "logprobs": [[0.0, 0.0]] * 3}
        return {"versions": {}, "refused": {"DoRA": "ValueError: no DoRA."}, "batches": {"rsLoRA": rows}}

    monkeypatch.setattr(serve_vllm, "ask", ask)
    monkeypatch.setattr(serve_vllm, "find_python", lambda python: python)
    found, _ = conformance_vllm.measure(["DoRA", "rsLoRA"])
    assert found["DoRA"] == {"result": "refused", "words": "no DoRA."}
    assert found["rsLoRA"]["result"] == "wrong"


def test_a_vllm_that_ends_without_an_answer_is_an_error_with_its_last_words(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho first >&2\necho the reason >&2\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"exit code 3\):\nfirst\nthe reason"):
        serve_vllm.ask(python, {}, tmp_path)


def test_mixed_rows_are_counted_by_what_they_should_have_said():
    """Rows of the base that got the last adapter's answer, as with vLLM's slots all taken."""
    wanted = {None: [[1], [1], [1]], "a": [[2], [2], [2]], "b": [[3], [3], [3]]}
    logs = {name: [torch.tensor([-0.5])] * 3 for name in wanted}
    request = {"batches": {"mixed": serve_vllm.batch([[7], [8], [9]], ["a", None, "b"], 1, [])}}
    said = {"tokens": [[2], [3], [3]], "logprobs": [[-0.5], [-0.1], [-0.75]]}
    found = serve_vllm.figures(request, {"batches": {"mixed": said}}, wanted, logs)
    assert found["largest_difference"] == 0.25
    assert found["batches"]["mixed: base"] == {"rows": 1, "right": 0, "as_the_last_adapter": 1}
    assert found["batches"]["mixed: b"] == {"rows": 1, "right": 1, "as_the_last_adapter": 0}
