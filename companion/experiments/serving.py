"""What llama.cpp keeps of greedy answers, by kind of GGUF and by forgotten step; mixed batches timed.

The judge is transformers in float32. Appends to records/serving.jsonl; what has a record is skipped.

    python companion/experiments/serving.py answers
    python companion/experiments/serving.py speed      # on a machine that does nothing else
"""

import argparse
import copy
import json
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from lora2qlora import serving
from lora2qlora.adapters import load_adapter
from lora2qlora.lab import measured
from lora2qlora.lab.models import load_base_model
from lora2qlora.lab.tasks import load_task
from lora2qlora.serving import gguf, gguf_adapter, gguf_tokenizer
from lora2qlora.serving.server import DIRECT
from peft import LoraConfig, PeftModel, get_peft_model

SETTINGS = {"model": "smollm2-135m", "prompts": 50, "tokens": 16}
ADAPTER = {"r": 16, "lora_alpha": 16, "use_rslora": True, "target_modules": "all-linear"}
ADAPTER |= {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"v_proj": 8}}
TASKS = ("wordnet", "spam")
# Speed: adapters, each for a row of its own, and the tokens of a row.
SIZES = [(count, 1) for count in (1, 2, 4, 8, 16, 32, 64)] + [(8, 32)]
STD = 0.03  # of B; how many answers such an adapter changes is recorded
# Part, kind, with an adapter, and what was forgotten.
CASES = [(kind, False, None) for kind in ("F32", "F16", "Q8_0", "Q4_0")]
CASES += [("F32", False, step) for step in ("order of q and k", "pre type", "template")]
CASES += [(kind, True, None) for kind in ("F32", "F16", "Q8_0", "Q4_0")]
CASES += [("F32", True, step) for step in ("order of B", "rsLoRA", "patterns")]


def forget(step: str | None, stack: ExitStack) -> None:
    """Leave out a step of the converters for as long as the stack is open."""
    read = gguf_adapter.read_adapter

    def other(change):
        return lambda base, folder: {n: change(*rest) for n, rest in read(base, folder).items()}

    replaced = {
        "order of q and k": (gguf, "in_llama_cpp_order", lambda rows, module, config: rows),
        "order of B": (gguf_adapter, "in_llama_cpp_order", lambda rows, module, config: rows),
        "pre type": (gguf_tokenizer.GGUFWriter, "add_tokenizer_pre", lambda writer, pre: None),
        "rsLoRA": (gguf_adapter, "read_adapter", other(lambda r, a, A, B: (r, a / r**0.5, A, B))),
        "patterns": (gguf_adapter, "read_adapter", other(lambda r, a, A, B: (r, 16 * r**0.5, A, B))),
    }
    if step in replaced:
        stack.enter_context(patch.object(*replaced[step]))


def random_adapter(model, folder: Path, seed: int = 0, **changed):
    """An adapter over all linears whose B is noise, saved by PEFT; returns PEFT's model."""
    torch.manual_seed(seed)
    adapted = get_peft_model(sharing(model), LoraConfig(**ADAPTER | changed)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=STD)
    adapted.save_pretrained(str(folder))
    return adapted


def asked(tokenizer, count: int) -> list[str]:
    """Questions in the model's chat template: words and mails in turn: digits tell pre types."""
    texts = [load_task(name).test["input"][:count] for name in TASKS]
    rows = [text[:200] for pair in zip(*texts, strict=True) for text in pair]
    chats = [[{"role": "user", "content": f"What is this? {row}"}] for row in rows[:count]]
    return [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]


@torch.no_grad()
def wanted_answers(model, tokenizer, prompts: list[str], count: int) -> list[list[int]]:
    """transformers' greedy tokens for each prompt, with the end token."""
    answers = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=count, do_sample=False)
        answers.append(out[0, ids["input_ids"].shape[1] :].tolist())
    return answers


def post(address: str, **body) -> dict:
    """What a route of the server answers."""
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with DIRECT.open(request, timeout=600) as answer:
        return json.load(answer)


def kept(address: str, tokenizer, prompts: list[str], wanted: list[list[int]], count: int, step) -> dict:
    """How many prompts are tokenized alike, have the same first token, and the same whole answer."""
    alike = first = whole = 0
    for prompt, answer in zip(prompts, wanted, strict=True):
        if step == "template":
            prompt = prompt.split("user\n")[-1].split("<|im_end|>")[0]
        ids = post(f"{address}/tokenize", content=prompt, parse_special=True)["tokens"]
        said = post(
            f"{address}/completion", prompt=prompt, n_predict=count, temperature=0, return_tokens=True,
            cache_prompt=False, lora=[{"id": 0, "scale": 1.0}],
        )["tokens"]  # fmt: skip
        alike += ids == tokenizer(prompt)["input_ids"]
        first += said[:1] == answer[:1]
        whole += said == answer
    return {"tokenized_alike": alike, "first_token": first, "whole_answer": whole}


def run_answers(settings: dict) -> None:
    """One record for each case."""
    model, tokenizer = load_base_model(settings["model"], device="cpu")
    prompts, count = asked(tokenizer, settings["prompts"]), settings["tokens"]
    wanted: dict[bool, list[list[int]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        adapted = random_adapter(model, place / "adapter")
        for kind, has_adapter, step in CASES:
            configuration = {
                **settings,
                "part": "answers",
                "kind": kind,
                "adapter": has_adapter,
                "forgotten": step,
            }
            if measured.is_recorded("serving", configuration, 0):
                continue
            for judge in (adapted, model) if has_adapter else (model,):
                if (judge is adapted) not in wanted:
                    wanted[judge is adapted] = wanted_answers(judge, tokenizer, prompts, count)
            with ExitStack() as stack:
                forget(step, stack)
                serving.export_model(model, tokenizer, place / "base.gguf", kind)
                serving.export_adapter(place / "adapter", model.config, place / "adapter.gguf")
            adapters = [place / "adapter.gguf"] if has_adapter else []
            with serving.serve(place / "base.gguf", adapters, exact=True) as address:
                figures = kept(address, tokenizer, prompts, wanted[has_adapter], count, step)
            figures["changed_by_adapter"] = sum(map(list.__ne__, wanted[has_adapter], wanted[False]))
            measured.record("serving", configuration, figures, 0)
            print(kind, has_adapter, step, figures, flush=True)


def sharing(model):
    """A copy of a model with modules of its own and the same weights, which take no more memory."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


@torch.no_grad()
def seconds(ways: dict, rounds: int) -> dict[str, list[float]]:
    """How long each call takes [s], in rounds in which all take turns, after one to warm up."""
    times = {name: [] for name in ways}
    for number in range(1 + rounds):
        for name, call in ways.items():
            start = time.perf_counter()
            call()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def run_speed(settings: dict) -> None:
    """A forward pass of a batch in which every row has an adapter of its own, in each way."""
    model, _ = load_base_model(settings["model"], device="cpu")
    for count, tokens in SIZES:
        configuration = {"model": settings["model"], "part": "speed", "adapters": count, "tokens": tokens}
        if measured.is_recorded("serving", configuration, 0):
            continue
        with tempfile.TemporaryDirectory() as folder:
            figures = _times(model, Path(folder), count, tokens)
        measured.record("serving", configuration, figures, 0)
        print(configuration, {name: min(times) for name, times in figures.items()}, flush=True)


def _times(model, place: Path, count: int, tokens: int, rounds: int = 6) -> dict[str, list[float]]:
    """Seconds of each way in each round: base, one adapter for all, mixed here, by PEFT, row by row."""
    names = [f"adapter{i}" for i in range(count)]
    for seed, name in enumerate(names):
        random_adapter(model, place / name, seed)
    x = torch.randint(1000, (count, tokens), generator=torch.Generator().manual_seed(0))
    mixed, alone = sharing(model), sharing(model)
    serving.load_adapters(mixed, {name: place / name for name in names})
    serving.use_adapters(mixed, names)
    load_adapter(alone, place / names[0])
    peft = PeftModel.from_pretrained(sharing(model), str(place / names[0]), names[0]).eval()
    for name in names[1:]:
        peft.load_adapter(str(place / name), name)

    def row_by_row():
        for i, name in enumerate(names):
            peft.set_adapter(name)
            peft(x[i : i + 1])

    ways = {
        "base": lambda: model(x),
        "one_for_all": lambda: alone(x),
        "mixed": lambda: mixed(x),
        "peft_mixed": lambda: peft(x, adapter_names=names),
        "row_by_row": row_by_row,
    }
    return seconds(ways, rounds)


def main(arguments: list[str] | None = None) -> None:
    """Run the part that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=("answers", "speed"))
    parser.add_argument("--prompts", type=int, default=SETTINGS["prompts"])
    options = parser.parse_args(arguments)
    print(measured.provenance())
    {"answers": run_answers, "speed": run_speed}[options.part](SETTINGS | {"prompts": options.prompts})


if __name__ == "__main__":
    main()
