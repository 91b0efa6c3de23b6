"""vLLM's column of the table of conformance, where its environment is (`make serve-vllm` builds it).

One start for all kinds over one base, with a slot more than adapters, so that none is taken for another.
"""

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from conformance import TOKENS, Case, apart, case_of, judge, refused
from conformance_kinds import KINDS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "companion" / "experiments"))
import serve_vllm

WAY = "vLLM"


def groups() -> list[list[str]]:
    """The kinds' names by their base."""
    found: dict[str, list[str]] = {}
    for name, kind in KINDS.items():
        found.setdefault(repr((kind.config, kind.is_resized, kind.is_moe)), []).append(name)
    return list(found.values())


def measure(names: list[str], python: Path = serve_vllm.PYTHON) -> tuple[dict[str, dict], dict]:
    """The cells of kinds that share a base, and vLLM's versions; FileNotFoundError where vLLM is not."""
    python = serve_vllm.find_python(python)
    with ExitStack() as stack:
        cases = {name: stack.enter_context(case_of(name)) for name in names}
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        next(iter(cases.values())).base().save_pretrained(place / "base")
        request = {
            "model": str(place / "base"), "context": 128, "rank": 16, "slots": len(names) + 1,
            "adapters": {name: str(case.folder) for name, case in cases.items()},
            "batches": {
                name: serve_vllm.batch(case.prompts, [name], TOKENS, []) for name, case in cases.items()
            },
        }  # fmt: skip
        answers = serve_vllm.ask(python, request, place)
        return {name: _cell(name, case, answers) for name, case in cases.items()}, answers["versions"]


def _cell(name: str, case: Case, answers: dict) -> dict:
    """One kind's cell, over the tokens that vLLM said."""
    if name in answers["refused"]:
        return refused(answers["refused"][name].partition(": ")[2])
    said = answers["batches"][name]
    rows = zip(case.prompts, said["tokens"], said["logprobs"], strict=True)
    return judge(max(apart(torch.tensor(logs), case.of_answer(ids, answer)) for ids, answer, logs in rows))
