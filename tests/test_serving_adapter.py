"""serving: an adapter's GGUF, byte by byte, and llama.cpp with it over a base against PEFT."""

import json
import os
import resource
import signal

import pytest
import torch
from gguf import GGUFReader
from llama_cpp import expected, judged, llama_cpp
from lora2qlora.adapters import add_lora, lora_layers, save_adapter
from lora2qlora.lab.models import load_small_lm
from lora2qlora.serving import export_adapter, export_model
from safetensors.torch import load_file, save_file
from served import MODELS, TEXTS, byte_tokenizer, peft_adapter, random_model, small_lm
from torch import nn
from transformers import Gemma2Config

BOUND = 5e-5  # 1.6e-5 was the largest measured
PATTERNS = {
    "use_rslora": True,
    "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 12},
    "alpha_pattern": {"k_proj": 3, "up_proj": 40},
}


def agrees(base, tokenizer, adapted, path, adapter, scale=1.0):
    """llama.cpp with the adapter over the base says what `adapted` says, and not what the base says."""
    changed = 0
    with llama_cpp(path, adapter) as ask:
        for text in TEXTS[:5]:
            ids = tokenizer(text)["input_ids"]
            (got, logs), (wanted, logs_wanted) = judged(ask, ids, 12, [scale]), expected(adapted, ids, 12)
            assert got == wanted
            assert (logs - logs_wanted).abs().max() < BOUND
            plain = expected(base, ids, 12)
            assert judged(ask, ids, 12, [0.0])[0] == plain[0]
            changed += got != plain[0]
    return changed


@pytest.mark.parametrize("options", [{}, PATTERNS], ids=["plain", "rsLoRA and patterns"])
def test_llama_cpp_with_an_adapter_answers_as_peft(options, tmp_path):
    model, tokenizer = small_lm()
    adapted = peft_adapter(model, tmp_path, **options)
    export_model(model, tokenizer, tmp_path / "base.gguf", "F32")
    export_adapter(tmp_path, model.config, tmp_path / "adapter.gguf")
    assert agrees(model, tokenizer, adapted, tmp_path / "base.gguf", tmp_path / "adapter.gguf") >= 3


@pytest.mark.parametrize("kind", set(MODELS) - {"llama 3"})
def test_llama_cpp_with_an_adapter_answers_as_peft_for_every_family(kind, tmp_path):
    model, tokenizer = random_model(kind), byte_tokenizer("qwen2" if "qwen" in kind else "smollm")
    adapted = peft_adapter(model, tmp_path, **PATTERNS)
    export_model(model, tokenizer, tmp_path / "base.gguf", "F32")
    export_adapter(tmp_path, model.config, tmp_path / "adapter.gguf")
    assert agrees(model, tokenizer, adapted, tmp_path / "base.gguf", tmp_path / "adapter.gguf") >= 3


def test_our_own_adapter_goes_the_same_way(tmp_path):
    (model, tokenizer), (base, _) = load_small_lm(), small_lm()
    torch.manual_seed(0)  # before A is drawn
    add_lora(model, ["q_proj", "v_proj"], rank=4, alpha=8)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.2)
    save_adapter(model, tmp_path)
    export_model(base, tokenizer, tmp_path / "base.gguf", "F32")
    export_adapter(tmp_path, model.config, tmp_path / "adapter.gguf")
    assert agrees(base, tokenizer, model, tmp_path / "base.gguf", tmp_path / "adapter.gguf") >= 3


def tensors_of(path):
    reader = GGUFReader(path)
    return {k: f.contents() for k, f in reader.fields.items()}, {t.name: t.data for t in reader.tensors}


def test_the_file_holds_the_update_and_nothing_else(tmp_path):
    """scale(alpha, rank) · B A of the file is α/√r · B A of the folder, to one rounding of B."""
    model = random_model("llama")
    peft_adapter(model, tmp_path, **PATTERNS)
    export_adapter(tmp_path, model.config, tmp_path / "adapter.gguf")
    keys, tensors = tensors_of(tmp_path / "adapter.gguf")
    words = {
        "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora",
        "adapter.lora.alpha": 12.0,
    }  # fmt: skip
    assert {key: value for key, value in keys.items() if not key.startswith("GGUF.")} == words
    assert len(tensors) == 2 * 2 * 7
    source = load_file(tmp_path / "adapter_model.safetensors")
    settings = {
        "q_proj": (2, 16),
        "k_proj": (8, 3),
        "v_proj": (8, 16),
        "up_proj": (8, 40),
        "down_proj": (12, 16),
    }
    names = {
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }
    for module, (rank, alpha) in settings.items():
        part = "mlp" if "ffn" in names[module] else "self_attn"
        stem = f"base_model.model.model.layers.1.{part}.{module}"
        A, B = (source[f"{stem}.lora_{side}.weight"] for side in "AB")
        got_A, got_B = (torch.tensor(tensors[f"blk.1.{names[module]}.weight.lora_{side}"]) for side in "ab")
        assert got_A.equal(A)
        heads = {"q_proj": 4, "k_proj": 2}.get(module)
        if heads:
            B = B.reshape(heads, 2, -1, rank).transpose(1, 2).reshape(B.shape)
        wanted = alpha / rank**0.5 * B.double()
        got = keys["adapter.lora.alpha"] / rank * got_B.double()
        assert (got - wanted).abs().max() <= 2**-23 * wanted.abs().max()


def test_a_scaling_that_is_a_power_of_two_loses_no_bit(tmp_path):
    model = random_model("qwen2")
    peft_adapter(model, tmp_path, r=4, lora_alpha=8)
    export_adapter(tmp_path, model.config, tmp_path / "adapter.gguf")
    source = load_file(tmp_path / "adapter_model.safetensors")
    B = source["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    assert torch.tensor(tensors_of(tmp_path / "adapter.gguf")[1]["blk.0.attn_q.weight.lora_b"]).equal(2 * B)


def test_no_path_is_in_the_file(tmp_path):
    folder = tmp_path / "secret"
    model = random_model("llama")
    model.config._name_or_path = model.name_or_path = str(folder)
    model.config.save_pretrained(folder)  # PEFT looks for one there
    peft_adapter(model, folder)
    assert "secret" in (folder / "adapter_config.json").read_text()
    export_adapter(folder, model.config, tmp_path / "adapter.gguf")
    assert b"secret" not in (tmp_path / "adapter.gguf").read_bytes()


def refused(tmp_path, config, match, error=ValueError):
    with pytest.raises(error, match=match):
        export_adapter(tmp_path / "adapter", config, tmp_path / "adapter.gguf")
    assert "adapter.gguf" not in os.listdir(tmp_path)


CHANGES = {
    "DoRA": ({"use_dora": True}, "use_dora=True"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "biases": ({"bias": "all"}, "bias='all'"),
    "new tokens": ({"trainable_token_indices": [5]}, "trainable_token_indices"),
    "another method": ({"peft_type": "LOHA"}, "peft_type"),
    "ranks that are not there": ({"r": 4}, "mis-shaped"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_no_plain_lora_is_refused_by_name(change, tmp_path):
    entries, match = CHANGES[change]
    model = random_model("llama")
    peft_adapter(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    refused(tmp_path, model.config, match)


def test_another_base_is_refused(tmp_path):
    peft_adapter(random_model("llama"), tmp_path / "adapter")
    refused(tmp_path, small_lm()[0].config, "it may be for another")
    refused(tmp_path, random_model("llama of long heads").config, "mis-shaped: base_model")
    refused(tmp_path, Gemma2Config(), "'gemma2'")
    refused(tmp_path, "llama", "got model type None")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_head_or_an_embedding_in_the_file_is_refused(tmp_path):
    model = random_model("llama")
    peft_adapter(model, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    refused(tmp_path, model.config, "embed_tokens")


def test_whole_embeddings_in_the_file_are_refused(tmp_path):
    model = random_model("llama")
    peft_adapter(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(2080, 64)
    save_file(tensors, path)
    refused(tmp_path, model.config, "1 extra: base_model.model.model.embed_tokens.weight")


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    model = random_model("llama")
    peft_adapter(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    tensors[name][0, 0] = 3e38  # finite, but not when doubled
    save_file(tensors, path)
    refused(tmp_path, model.config, "beyond the range of float32")
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path)
    refused(tmp_path, model.config, "not finite")


def test_no_adapter_there(tmp_path):
    refused(tmp_path, random_model("llama").config, "no adapter_config.json", error=FileNotFoundError)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    model = random_model("llama")
    peft_adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter.gguf").write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"."):
            export_adapter(tmp_path / "adapter", model.config, tmp_path / "adapter.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "adapter.gguf").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["adapter", "adapter.gguf"]
