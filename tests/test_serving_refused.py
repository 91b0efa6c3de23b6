"""serving: what no GGUF can hold is refused in clear words, and nothing is left on the disk."""

import copy
import os
import resource
import signal

import numpy as np
import pytest
import torch
from lora2qlora.adapters import add_lora
from lora2qlora.qlora import quantize_base
from lora2qlora.serving import export_model
from peft import LoraConfig, get_peft_model
from served import LLAMA3, SHAPE, byte_tokenizer, random_model
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM


def refused(tmp_path, model, match, tokenizer=None, kind="F32", error=ValueError):
    """export_model raises, and the folder stays as it was."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=match):
        export_model(model, tokenizer or byte_tokenizer(), tmp_path / "m.gguf", kind)
    assert sorted(tmp_path.iterdir()) == before


def set_config(model, **values):
    for key, value in values.items():
        setattr(model.config, key, value)
    return model


def of(kind="llama", change=None, **config):
    model = set_config(random_model(kind), **config)
    if change:
        change(model)
    return model


def scale_one(number):
    def change(model):
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] = number

    return change


def untie(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)


class Wrapped(torch.nn.Linear):
    pass


def replace_a_layer(model):
    model.model.layers[0].mlp.up_proj = Wrapped(64, 96)


MODELS_REFUSED = {
    "gemma": (lambda: of(change=lambda m: setattr(m.config, "model_type", "gemma")), "'gemma'"),
    "another class": (lambda: random_model("llama").model, "got LlamaModel"),
    "no model": (lambda: torch.nn.Linear(2, 2), "got Linear"),
    "gelu": (lambda: of(hidden_act="gelu"), "hidden_act='gelu'"),
    "yarn": (lambda: of(rope_parameters={**LLAMA3, "rope_type": "yarn"}), "'rope_type': 'yarn'"),
    "llama3 in qwen": (lambda: of("qwen2", rope_parameters=LLAMA3), "'rope_type': 'llama3'"),
    "half a head": (
        lambda: of(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        "partial_rotary_factor",
    ),
    "sliding": (
        lambda: Qwen2ForCausalLM(
            Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=1, **SHAPE)
        ),
        "sliding_attention",
    ),
    "adapted": (lambda: of(change=lambda m: add_lora(m, ["q_proj"], 2, 4)), "q_proj carries an adapter"),
    "adapted by PEFT": (
        lambda: get_peft_model(of(), LoraConfig(target_modules=["q_proj"])).base_model.model,
        "q_proj carries an adapter",
    ),
    "wrapped by PEFT": (
        lambda: get_peft_model(of(), LoraConfig(target_modules=["q_proj"])),
        "merge_and_unload",
    ),
    "NF4": (lambda: of(change=quantize_base), "NF4Linear.*merge_quantized"),
    "both": (
        lambda: of(change=lambda m: (quantize_base(m), add_lora(m, ["q_proj"], 2, 4))),
        "merge_quantized",
    ),
    "a tied head that differs": (lambda: of("qwen2", change=untie), "tie_word_embeddings = False"),
    "another layer": (lambda: of(change=replace_a_layer), "up_proj is a Wrapped"),
    "inf": (lambda: of(change=scale_one(float("inf"))), "up_proj.weight has numbers up to inf"),
    "nan": (lambda: of(change=scale_one(float("nan"))), "up_proj.weight has numbers up to nan"),
    "no numbers": (lambda: of().to("meta"), "on meta"),
}


@pytest.mark.parametrize("case", MODELS_REFUSED)
def test_a_model_that_a_gguf_cannot_hold_is_refused(case, tmp_path):
    make, match = MODELS_REFUSED[case]
    refused(tmp_path, make(), match)


@pytest.mark.parametrize(
    ("kind", "largest"), [("F16", 65504.0), ("Q8_0", 65504.0 * 127), ("Q4_0", 65504.0 * 8)]
)
def test_numbers_beyond_a_kind_are_refused_and_the_largest_is_kept(kind, largest, tmp_path):
    refused(tmp_path, of(change=scale_one(1.001 * largest)), f"more than {kind} holds", kind=kind)
    export_model(of(change=scale_one(largest)), byte_tokenizer(), tmp_path / "m.gguf", kind)
    from gguf import GGUFReader
    from gguf.quants import dequantize

    stored = next(t for t in GGUFReader(tmp_path / "m.gguf").tensors if t.name == "blk.0.ffn_up.weight")
    assert np.isclose(dequantize(stored.data, stored.tensor_type)[0, 0], largest, rtol=1e-6)


def test_rows_that_blocks_do_not_divide_are_refused(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "hidden_size": 72, "head_dim": 16}))
    refused(tmp_path, model, r"embed_tokens.weight has rows of 72, .*Q4_0's blocks of 32", kind="Q4_0")
    export_model(model, byte_tokenizer(), tmp_path / "m.gguf", "F16")


def test_an_unknown_kind_is_refused(tmp_path):
    refused(tmp_path, random_model("llama"), "one of F32, F16, Q8_0, Q4_0, got 'Q4_K_M'", kind="Q4_K_M")


def with_backend(change):
    tokenizer = copy.deepcopy(byte_tokenizer())
    change(tokenizer.backend_tokenizer)
    return tokenizer


def adding(token, *others):
    tokenizer = copy.deepcopy(byte_tokenizer())
    tokenizer.add_tokens([token, *others])
    return tokenizer


def other_start():
    from tokenizers.processors import TemplateProcessing

    def change(backend):
        backend.post_processor = TemplateProcessing(single="whale $A", special_tokens=[("whale", 5)])

    return with_backend(change)


TOKENIZERS_REFUSED = {
    "unknown cuts": (
        lambda: with_backend(lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.Whitespace())),
        '"type": "Whitespace".*Known are gpt-2, smollm, qwen2, llama-bpe',
    ),
    "a space first": (
        lambda: with_backend(lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.ByteLevel())),
        '"add_prefix_space": true',
    ),
    "merges ignored": (
        lambda: with_backend(lambda b: setattr(b.model, "ignore_merges", True)),
        "with ignore_merges",
    ),
    "lower case": (
        lambda: with_backend(lambda b: setattr(b, "normalizer", normalizers.Lowercase())),
        "normalizes texts.*Lowercase",
    ),
    "words": (
        lambda: PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), eos_token="a"
        ),
        "byte-level BPE, got .* with model WordLevel",
    ),
    "no end": (
        lambda: PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer),
        "no eos",
    ),
    "too many": (lambda: adding(*[f"<{i}>" for i in range(40)]), "tokens up to 2091 and the model 2080 rows"),
    "stripping": (lambda: adding(AddedToken("<mask>", lstrip=True)), r"strip or need spaces: \['<mask>'\]"),
    "another start": (other_start, "more than its bos and eos"),
    "none": (object, "byte-level BPE, got object"),
}


@pytest.mark.parametrize("case", TOKENIZERS_REFUSED)
def test_a_tokenizer_that_llama_cpp_would_read_as_another_is_refused(case, tmp_path):
    make, match = TOKENIZERS_REFUSED[case]
    refused(tmp_path, random_model("llama"), match, tokenizer=make())


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "m.gguf").mkdir()
    refused(tmp_path, random_model("llama"), "is a folder", error=IsADirectoryError)


def test_a_full_disk_is_an_oserror_and_the_old_file_stays(tmp_path):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    (tmp_path / "m.gguf").write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        refused(tmp_path, random_model("llama"), ".", error=OSError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "m.gguf").read_bytes() == b"old"
    export_model(random_model("llama"), byte_tokenizer(), tmp_path / "m.gguf", "F32")
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_the_old_file_is_replaced_at_once(tmp_path, monkeypatch):
    """A reader finds the old file or the new one at any time: nothing removes the old one first."""
    (tmp_path / "m.gguf").write_bytes(b"old")
    seen = []
    put = os.replace
    monkeypatch.setattr(
        os, "replace", lambda old, new: (seen.append((tmp_path / "m.gguf").read_bytes()), put(old, new))
    )
    export_model(random_model("llama"), byte_tokenizer(), tmp_path / "m.gguf", "F32")
    assert seen == [b"old"]
