"""serving: each step that a converter may forget, planted, is one that the judge notices.

The file stays valid and llama.cpp loads it without a word, but for the unknown pre type.
"""

from contextlib import suppress

import pytest
from llama_cpp import expected, judged, llama_cpp
from lora2qlora.serving import export_adapter, export_model, gguf, gguf_adapter, gguf_tokenizer
from served import TEXTS, byte_tokenizer, peft_adapter, random_model, small_lm

OPTIONS = {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}}


def as_it_is(rows, module, config):
    return rows


def kept(tmp_path, model, tokenizer, adapter_options=None):
    """On how many of five texts llama.cpp's answers and probabilities are those of transformers."""
    adapted, files = model, [tmp_path / "base.gguf"]
    export_model(model, tokenizer, files[0], "F32")
    if adapter_options is not None:
        adapted = peft_adapter(model, tmp_path, **adapter_options)
        files.append(tmp_path / "adapter.gguf")
        export_adapter(tmp_path, model.config, files[1])
    same = 0
    with llama_cpp(*files) as ask:
        for text in TEXTS[:5]:
            ids = tokenizer(text)["input_ids"]
            (got, logs), (wanted, logs_wanted) = (
                judged(ask, ids, 12, [1.0] * (len(files) - 1)),
                expected(adapted, ids, 12),
            )
            same += got == wanted and bool((logs - logs_wanted).abs().max() < 5e-5)
    return same


def test_nothing_forgotten(tmp_path):
    assert kept(tmp_path, *small_lm(), OPTIONS) == 5


def test_rows_of_q_and_k_left_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "in_llama_cpp_order", as_it_is)
    assert kept(tmp_path, *small_lm()) <= 1


def test_rows_of_an_adapters_b_left_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_adapter, "in_llama_cpp_order", as_it_is)
    assert kept(tmp_path, *small_lm(), OPTIONS) <= 1


def other_alphas(monkeypatch, alpha_of):
    """The exporter reads alphas by `alpha_of(rank, alpha)`, where alpha is r times the scaling."""
    read = gguf_adapter.read_adapter
    change = lambda rank, alpha, A, B: (rank, alpha_of(rank, alpha), A, B)  # noqa: E731
    replaced = lambda base, folder: {name: change(*found) for name, found in read(base, folder).items()}  # noqa: E731
    monkeypatch.setattr(gguf_adapter, "read_adapter", replaced)


def test_rslora_forgotten(tmp_path, monkeypatch):
    other_alphas(monkeypatch, lambda rank, alpha: alpha / rank**0.5)
    assert kept(tmp_path, *small_lm(), OPTIONS) <= 1


def test_patterns_forgotten(tmp_path, monkeypatch):
    other_alphas(monkeypatch, lambda rank, alpha: 16 * rank**0.5)
    assert kept(tmp_path, *small_lm(), OPTIONS) <= 1


def test_scaling_of_rotary_embedding_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "rope_factors", lambda config: None)
    assert kept(tmp_path, random_model("llama 3"), byte_tokenizer("llama-bpe")) <= 1


def tokenized_alike(tmp_path, tokenizer):
    export_model(random_model("llama"), tokenizer, tmp_path / "m.gguf", "F32")
    with llama_cpp(tmp_path / "m.gguf") as ask:
        return [ask("/tokenize", content=text)["tokens"] == tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize(("pre", "other"), [("gpt-2", "qwen2"), ("smollm", "gpt-2"), ("qwen2", "llama-bpe")])
def test_another_pre_type(pre, other, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_tokenizer, "pre_type", lambda rules: other)
    assert not all(tokenized_alike(tmp_path, byte_tokenizer(pre)))


def test_no_pre_type(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_tokenizer.GGUFWriter, "add_tokenizer_pre", lambda writer, pre: None)
    assert not all(tokenized_alike(tmp_path, byte_tokenizer("gpt-2")))


def test_an_unknown_pre_type_is_the_one_that_llama_cpp_refuses(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_tokenizer, "pre_type", lambda rules: "ours")
    with pytest.raises(RuntimeError), suppress(ZeroDivisionError):
        tokenized_alike(tmp_path, byte_tokenizer())
