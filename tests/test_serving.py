"""serving: what is in a GGUF, byte by byte, and that llama.cpp answers with it as transformers does."""

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from llama_cpp import expected, judged, llama_cpp
from lora2qlora.adapters import add_lora, lora_layers, merge_lora
from lora2qlora.lab.models import load_base_model
from lora2qlora.serving import export_adapter, export_model
from served import MODELS, TEXTS, byte_tokenizer, peft_adapter, random_model, small_lm
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

# How far log-probabilities of llama.cpp may be from transformers', by how matrices are stored. Measured were
# 1.6e-5 (5e-6 on the book's small model), 2.6e-3, 5.7e-2 and 0.37.
BOUNDS = {"F32": 5e-5, "F16": 5e-3, "Q8_0": 0.1, "Q4_0": 0.8}
PRES = {"llama 3": "llama-bpe", "qwen2": "qwen2", "qwen3": "qwen2"}


def tokenizer_for(kind):
    return byte_tokenizer(PRES.get(kind, "smollm"))


def read(path):
    """The keys of a GGUF, and its tensors in numpy's order."""
    reader = GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items()}, {
        t.name: t for t in reader.tensors
    }


def judge(path, model, tokenizer, kind="F32", count=12):
    """llama.cpp's tokens for all texts, and transformers'; the log-probabilities must be within the bound."""
    both = []
    with llama_cpp(path) as ask:
        for text in TEXTS:
            ids = tokenizer(text)["input_ids"]
            (got, logs), (wanted, logs_wanted) = judged(ask, ids, count), expected(model, ids, count)
            same = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), len(wanted))
            assert same == 0 or (logs[:same] - logs_wanted[:same]).abs().max() < BOUNDS[kind]
            both.append((got, wanted))
    return both


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_llama_cpp_answers_as_transformers(kind, tmp_path):
    model, tokenizer = small_lm()
    export_model(model, tokenizer, tmp_path / "m.gguf", kind)
    both = judge(tmp_path / "m.gguf", model, tokenizer, kind)
    kept = sum(got == wanted for got, wanted in both)
    assert kept >= {"F32": 7, "F16": 7, "Q8_0": 5, "Q4_0": 0}[kind]


@pytest.mark.parametrize("kind", MODELS)
def test_llama_cpp_answers_as_transformers_for_every_family(kind, tmp_path):
    model, tokenizer = random_model(kind), tokenizer_for(kind)
    export_model(model, tokenizer, tmp_path / "m.gguf", "F32")
    for got, wanted in judge(tmp_path / "m.gguf", model, tokenizer):
        assert got == wanted


@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # it reads no length of heads, biases nor scaling
def test_transformers_reads_the_same_model_back(kind, tmp_path):
    model, tokenizer = random_model(kind), tokenizer_for(kind)
    export_model(model, tokenizer, tmp_path / "m.gguf", "F32")
    again = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file="m.gguf", dtype=torch.float32)
    weights = model.state_dict()
    assert again.state_dict().keys() == weights.keys()
    assert all(weight.equal(weights[name]) for name, weight in again.state_dict().items())


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_llama_cpp_cuts_texts_as_the_tokenizer_does(pre, tmp_path):
    tokenizer = byte_tokenizer(pre)
    export_model(random_model("llama"), tokenizer, tmp_path / "m.gguf", "F32")
    assert read(tmp_path / "m.gguf")[0]["tokenizer.ggml.pre"] == pre
    with llama_cpp(tmp_path / "m.gguf") as ask:
        for text in (*TEXTS, "a<|endoftext|>b"):
            assert (
                ask("/tokenize", content=text, parse_special=True)["tokens"] == tokenizer(text)["input_ids"]
            )


def by_head(rows, heads):
    """The rows of q or k one by one: the halves of a head are dealt out in turn."""
    size = len(rows) // heads
    order = [
        h * size + half * size // 2 + i for h in range(heads) for i in range(size // 2) for half in (0, 1)
    ]
    return rows[order]


def test_every_tensor_is_the_models_byte_by_byte(tmp_path):
    model = random_model("llama")
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    layer = "model.layers.1."
    wanted = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output.weight": weights["lm_head.weight"],
        "output_norm.weight": weights["model.norm.weight"],
        "blk.1.attn_norm.weight": weights[layer + "input_layernorm.weight"],
        "blk.1.attn_q.weight": by_head(weights[layer + "self_attn.q_proj.weight"], 4),
        "blk.1.attn_k.weight": by_head(weights[layer + "self_attn.k_proj.weight"], 2),
        "blk.1.attn_v.weight": weights[layer + "self_attn.v_proj.weight"],
        "blk.1.attn_output.weight": weights[layer + "self_attn.o_proj.weight"],
        "blk.1.ffn_norm.weight": weights[layer + "post_attention_layernorm.weight"],
        "blk.1.ffn_gate.weight": weights[layer + "mlp.gate_proj.weight"],
        "blk.1.ffn_up.weight": weights[layer + "mlp.up_proj.weight"],
        "blk.1.ffn_down.weight": weights[layer + "mlp.down_proj.weight"],
    }
    for kind, dtype in (("F32", "f4"), ("F16", "f2")):
        export_model(model, byte_tokenizer(), tmp_path / "m.gguf", kind)
        tensors = read(tmp_path / "m.gguf")[1]
        assert len(tensors) == len(weights)
        for name, weight in wanted.items():
            stored = weight.astype(dtype if weight.ndim > 1 else "f4")
            assert tensors[name].data.tobytes() == stored.tobytes(), name


def blocks_of(weight, codes, divisor):
    """The float16 scales and the codes of blocks of 32 by hand; `codes` says how."""
    blocks = weight.reshape(-1, 32)
    peaks = blocks[np.arange(len(blocks)), np.abs(blocks).argmax(1)]
    scales = (np.abs(peaks) if divisor > 0 else peaks) / np.float32(divisor)
    return scales.astype("f2")[:, None].view("u1"), codes(blocks / scales[:, None])


def test_blocks_are_those_of_the_format_byte_by_byte(tmp_path):
    weight = small_lm()[0].get_parameter("model.layers.0.mlp.up_proj.weight").detach().numpy()
    stored = {}
    for kind in ("Q8_0", "Q4_0"):
        export_model(*small_lm(), tmp_path / "m.gguf", kind)
        stored[kind] = read(tmp_path / "m.gguf")[1]["blk.0.ffn_up.weight"].data.reshape(-1)
    scales, codes = blocks_of(weight, lambda x: np.rint(x).astype("i1").view("u1"), 127)
    got = stored["Q8_0"].reshape(-1, 34)
    assert np.array_equal(got[:, :2], scales)
    assert (got[:, 2:] != codes).mean() < 1e-4  # ties, and 1 / d before the product
    scales, codes = blocks_of(weight, lambda x: np.clip(np.floor(x + 8.5), 0, 15).astype("u1"), -8)
    got = stored["Q4_0"].reshape(-1, 18)
    assert np.array_equal(got[:, :2], scales)
    assert (got[:, 2:] != (codes[:, :16] | codes[:, 16:] << 4)).mean() < 1e-4


def test_the_keys_say_the_shape_and_the_tokenizer(tmp_path):
    model, tokenizer = random_model("qwen3"), byte_tokenizer("qwen2")
    tokenizer.add_tokens(["<tool>"])
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    export_model(model, tokenizer, tmp_path / "m.gguf", "Q8_0")
    keys, tensors = read(tmp_path / "m.gguf")
    assert "output.weight" in tensors
    shape = {
        "block_count": 2, "context_length": 256, "embedding_length": 64, "feed_forward_length": 96,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 32,
        "attention.value_length": 32, "rope.dimension_count": 32, "rope.freq_base": 10000.0,
        "vocab_size": 2080, "attention.layer_norm_rms_epsilon": np.float32(1e-6),
    }  # fmt: skip
    assert {key: keys[f"qwen3.{key}"] for key in shape} == shape
    words = {
        "general.architecture": "qwen3", "general.type": "model", "general.file_type": 7,
        "general.quantization_version": 2, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False, "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }  # fmt: skip
    assert {key: keys[key] for key in words} == words
    assert "tokenizer.ggml.bos_token_id" not in keys
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert (len(tokens), tokens[0], tokens[2052], tokens[2079]) == (
        2080,
        "<|endoftext|>",
        "<tool>",
        "[PAD2079]",
    )
    assert (kinds[0], kinds[1], kinds[2052], kinds[2079]) == (3, 1, 4, 5)


def test_a_tied_head_is_not_written_twice(tmp_path):
    export_model(random_model("qwen2"), byte_tokenizer("qwen2"), tmp_path / "m.gguf", "F32")
    assert "output.weight" not in read(tmp_path / "m.gguf")[1]


def test_a_merged_adapter_answers_as_the_adapted_model(tmp_path):
    model, tokenizer = load_small_lm_copy()
    torch.manual_seed(0)  # before A is drawn
    add_lora(model, "all-linear", rank=4, alpha=8)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    export_model(merge_lora(model), tokenizer, tmp_path / "m.gguf", "F32")
    both = judge(tmp_path / "m.gguf", model, tokenizer)
    assert all(got == wanted for got, wanted in both)
    assert any(
        wanted != expected(small_lm()[0], tokenizer(text)["input_ids"], 12)[0]
        for text, (_, wanted) in zip(TEXTS, both, strict=True)
    )


def load_small_lm_copy():
    from lora2qlora.lab.models import load_small_lm

    return load_small_lm()


def test_nothing_of_this_machine_is_in_the_file(tmp_path):
    random_model("llama").save_pretrained(tmp_path / "secret")
    byte_tokenizer().save_pretrained(tmp_path / "secret")
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "secret"))
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "secret"))
    export_model(model, tokenizer, tmp_path / "m.gguf", "F32")
    assert b"secret" not in (tmp_path / "m.gguf").read_bytes()
    model.config._name_or_path = model.name_or_path = "owner/model"
    model.name_or_path = "owner/other"  # set by hand: taken for a name
    export_model(model, tokenizer, tmp_path / "m.gguf", "F32")
    assert read(tmp_path / "m.gguf")[0]["general.name"] == "owner/other"


def test_a_tokenizer_that_begins_and_ends_texts_does_so_in_llama_cpp(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    for template in ("<|endoftext|> $A", "<|endoftext|> $A <|endoftext|>"):
        processor = TemplateProcessing(single=template, special_tokens=[("<|endoftext|>", 0)])
        tokenizer.backend_tokenizer.post_processor = processor
        export_model(random_model("llama"), tokenizer, tmp_path / "m.gguf", "F32")
        with llama_cpp(tmp_path / "m.gguf") as ask:
            ids = tokenizer("The whale")["input_ids"]
            assert ids.count(0) == template.count("<")
            assert ask("/tokenize", content="The whale", add_special=True)["tokens"] == ids


@pytest.mark.slow
def test_smollm2_alone_adapted_and_merged_answers_as_transformers(tmp_path):
    model, tokenizer = load_base_model(device="cpu")
    adapted = peft_adapter(model, tmp_path / "adapter", use_rslora=True, rank_pattern={"v_proj": 2})
    export_model(model, tokenizer, tmp_path / "m.gguf", "F32")
    export_adapter(tmp_path / "adapter", model.config, tmp_path / "a.gguf")
    chats = []
    for prompt in ("What is the capital of France?", "Write a haiku about rain.", "Count from 1 to 12."):
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        chats.append((messages, text, tokenizer(text)["input_ids"]))
    answers = []
    with llama_cpp(tmp_path / "m.gguf", tmp_path / "a.gguf") as ask:
        for messages, text, ids in chats:
            assert ask("/apply-template", messages=messages)["prompt"] == text
            assert ask("/tokenize", content=text, parse_special=True)["tokens"] == ids
            for judge_model, scale in ((model, 0.0), (adapted, 1.0)):
                (got, logs), (wanted, wanted_logs) = (
                    judged(ask, ids, 12, [scale]),
                    expected(judge_model, ids, 12),
                )
                assert got == wanted
                assert (logs - wanted_logs).abs().max() < 5e-4  # over 30 layers
                answers.append(got)
    assert answers[::2] != answers[1::2]
    export_model(adapted.merge_and_unload(), tokenizer, tmp_path / "m.gguf", "F32")
    with llama_cpp(tmp_path / "m.gguf") as ask:
        assert [judged(ask, ids, 12)[0] for _, _, ids in chats] == answers[1::2]
