"""vLLM with two adapters at once against transformers: alone, and mixed in one batch with rows of the base.

vLLM has an environment of its own: `make serve-vllm` builds it in .vllm and runs this. The wanted answers
are computed here, vLLM's by serve_vllm_inside.py there. Appends to records/serving_vllm.jsonl; a run with the
settings and versions of an older one is not recorded again.

    python companion/experiments/serve_vllm.py [--python .vllm/bin/python]
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import torch
from lora2qlora.lab import measured
from lora2qlora.lab.models import load_base_model
from serving import asked, random_adapter, wanted_answers

HERE = Path(__file__).resolve().parent
PYTHON = HERE.parents[1] / ".vllm" / "bin" / "python"
INSIDE = HERE / "serve_vllm_inside.py"
SETTINGS = {"model": "smollm2-135m", "prompts": 20, "tokens": 16}
NAMES = ("a", "b")
PLAIN = {"rank_pattern": {}, "alpha_pattern": {}}
RANK = 16
MINUTES = 20  # a start takes half a minute to three
# With as many slots as adapters, rows without one read the last slot (vLLM's pull requests 48421 and 49656).
SLOTS = (2, 3)


def find_python(python: Path = PYTHON) -> Path:
    """The interpreter of vLLM's environment; FileNotFoundError, saying how to get it, where there is none."""
    if not python.is_file():
        raise FileNotFoundError(
            f"vLLM is not installed: no {python.name} in its environment; make serve-vllm"
        )
    return python


def ask(python: Path, request: dict, place: Path) -> dict:
    """What vLLM answers to a request of serve_vllm_inside.py; RuntimeError with its last words if nothing."""
    paths = [place / "request.json", place / "answer.json"]
    paths[0].write_text(json.dumps(request), encoding="utf-8")
    paths[1].unlink(missing_ok=True)
    command = [str(find_python(python)), "-P", str(INSIDE), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES, check=False)
    if not paths[1].exists():
        last = "\n".join(done.stderr.strip().splitlines()[-4:])
        raise RuntimeError(f"vLLM gave no answer (exit code {done.returncode}):\n{last}")
    return json.loads(paths[1].read_text(encoding="utf-8"))


def batch(prompts: list[list[int]], adapters: list[str | None], tokens: int, ends: list[int]) -> dict:
    """A batch of token ids whose rows take these adapters in turn; `ends` are tokens that end an answer."""
    taken = [adapters[i % len(adapters)] for i in range(len(prompts))]
    return {"prompts": prompts, "adapters": taken, "tokens": tokens, "ends": ends}


@torch.no_grad()
def log_probabilities(model, ids: list[int], answer: list[int]) -> torch.Tensor:
    """What a model gives the tokens of an answer to a prompt, one forward pass for all."""
    logits = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def figures(request: dict, answers: dict, wanted: dict, logs: dict) -> dict:
    """How many answers are as wanted, by batch and kind of row, and how far apart their log-probabilities."""
    found, largest = {}, 0.0
    for name, asked_for in request["batches"].items():
        said = answers["batches"][name]
        for row, adapter in enumerate(asked_for["adapters"]):
            key = f"{name}: {adapter or 'base'}"
            counts = found.setdefault(key, {"rows": 0, "right": 0, "as_the_last_adapter": 0})
            counts["rows"] += 1
            is_right = said["tokens"][row] == wanted[adapter][row]
            counts["right"] += is_right
            counts["as_the_last_adapter"] += adapter is None and said["tokens"][row] == wanted[NAMES[-1]][row]
            if is_right:
                apart = (torch.tensor(said["logprobs"][row]) - logs[adapter][row]).abs().max().item()
                largest = max(largest, apart)
    return {"batches": found, "largest_difference": largest}


def run(settings: dict, python: Path) -> None:
    """One record for each number of slots."""
    model, tokenizer = load_base_model(settings["model"], device="cpu")
    texts, count = asked(tokenizer, settings["prompts"]), settings["tokens"]
    prompts, ends = [tokenizer(text)["input_ids"] for text in texts], [tokenizer.eos_token_id]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model.save_pretrained(place / "model")
        judges = {None: model} | {
            n: random_adapter(model, place / n, i, **PLAIN) for i, n in enumerate(NAMES)
        }
        wanted = {name: wanted_answers(judge, tokenizer, texts, count) for name, judge in judges.items()}
        logs = {
            name: [log_probabilities(judge, *row) for row in zip(prompts, wanted[name], strict=True)]
            for name, judge in judges.items()
        }
        changed = {name: sum(map(list.__ne__, wanted[name], wanted[None])) for name in NAMES}
        rows = {"base": [None], "a": ["a"], "b": ["b"], "a and b": ["a", "b"], "mixed": ["a", None, "b"]}
        request = {
            "model": str(place / "model"), "context": 512, "rank": RANK,
            "adapters": {name: str(place / name) for name in NAMES},
            "batches": {name: batch(prompts, adapters, count, ends) for name, adapters in rows.items()},
        }  # fmt: skip
        for slots in SLOTS:
            request["slots"] = slots
            answers = ask(python, request, place)
            configuration = {**settings, "slots": slots, "vllm": answers["versions"]}
            result = figures(request, answers, wanted, logs) | {"changed_by_adapter": changed}
            if not measured.is_recorded("serving_vllm", configuration, 0):
                measured.record("serving_vllm", configuration, result, 0)
            print(slots, "slots:", json.dumps(result, indent=1), flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run it with the interpreter that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--python", type=Path, default=PYTHON)
    parser.add_argument("--prompts", type=int, default=SETTINGS["prompts"])
    options = parser.parse_args(arguments)
    try:
        python = find_python(options.python)
    except FileNotFoundError as error:
        raise SystemExit(f"skipped: {error}") from None
    run(SETTINGS | {"prompts": options.prompts}, python)


if __name__ == "__main__":
    main()
