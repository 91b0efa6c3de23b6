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
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**ADAPTER | changed)).eval()
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


@torch.no_grad()
def seconds(function, rounds: int = 5) -> float:
    """The least time of a call [s] after one to warm up."""
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def run_speed(settings: dict, rows: int = 8) -> None:
    """A forward pass of a batch: the base, one adapter for all, mixed here, mixed by PEFT, row by row."""
    model, _ = load_base_model(settings["model"], device="cpu")
    for count in (1, 8, 64):
        for tokens in (1, 32):
            configuration = {"part": "speed", "adapters": count, "rows": rows, "tokens": tokens}
            if measured.is_recorded("serving", configuration, 0):
                continue
            with tempfile.TemporaryDirectory() as folder:
                figures = _times(model, Path(folder), count, rows, tokens)
            measured.record("serving", configuration, figures, 0)
            print(configuration, figures, flush=True)


def _times(model, place: Path, count: int, rows: int, tokens: int) -> dict[str, float]:
    """Seconds of each way, for a batch whose rows take turns among the adapters."""
    names = [f"adapter{i}" for i in range(count)]
    for seed, name in enumerate(names):
        random_adapter(model, place / name, seed)
    x, own = torch.randint(1000, (rows, tokens)), [names[i % count] for i in range(rows)]
    mixed, alone = copy.deepcopy(model), copy.deepcopy(model)
    serving.load_adapters(mixed, {name: place / name for name in names})
    serving.use_adapters(mixed, own)
    load_adapter(alone, place / names[0])
    peft = PeftModel.from_pretrained(copy.deepcopy(model), str(place / names[0]), names[0]).eval()
    for name in names[1:]:
        peft.load_adapter(str(place / name), name)

    def row_by_row():
        for i, name in enumerate(own):
            peft.set_adapter(name)
            peft(x[i : i + 1])

    return {
        "base": seconds(lambda: model(x)),
        "one_for_all": seconds(lambda: alone(x)),
        "mixed": seconds(lambda: mixed(x)),
        "peft_mixed": seconds(lambda: peft(x, adapter_names=own)),
        "row_by_row": seconds(row_by_row),
    }


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
