"""llama.cpp as the judge of what `serving` writes, and transformers' own answers to hold against it.

Its server runs in this process, on loopback: no flash attention and a float32 cache, as the defaults round.
"""

import json
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
import torch
from lora2qlora.serving.server import DIRECT


@contextmanager
def llama_cpp(path, *adapters, context=256):
    """A function (route, body) -> what llama.cpp's server answers, with this model and these adapters."""
    x = pytest.importorskip("xllamacpp")
    params = x.CommonParams()
    params.model.path = str(path)
    params.lora_adapters = [_adapter(x, one) for one in adapters]
    params.n_ctx, params.verbosity, params.warmup, params.cache_ram_mib = context, -1, False, 0
    params.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = x.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.fit_params = params.ui = False
    server = x.Server(params)
    try:
        address = server.listening_address
        yield lambda route, **body: post(address + route, body)
    finally:
        del server


def _adapter(x, path):
    adapter = x.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = str(path), 1.0
    return adapter


def post(address, body):
    """What a route answers to a JSON body; RuntimeError with the server's words otherwise."""
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with DIRECT.open(request, timeout=120) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise RuntimeError(error.read().decode()) from error


def judged(ask, ids, count, scales=()):
    """llama.cpp's greedy tokens after these, and the log-probabilities [count] that it gives them."""
    said = ask(
        "/completion", prompt=ids, n_predict=count, temperature=0, samplers=["temperature"], n_probs=1,
        return_tokens=True, ignore_eos=False, cache_prompt=False,
        lora=[{"id": index, "scale": scale} for index, scale in enumerate(scales)],
    )  # fmt: skip
    return said["tokens"], torch.tensor([one["logprob"] for one in said["completion_probabilities"]])


@torch.no_grad()
def expected(model, ids, count):
    """transformers' greedy tokens and their log-probabilities, up to and with the end token."""
    found, logs = [], []
    ends = model.generation_config.eos_token_id
    for _ in range(count):
        logits = model(torch.tensor([ids + found], device=model.device)).logits[0, -1].log_softmax(-1)
        found.append(int(logits.argmax()))
        logs.append(float(logits.max()))
        if found[-1] == ends:
            break
    return found, torch.tensor(logs)
