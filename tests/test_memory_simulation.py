"""Simulated steps against measured ones, family by family, and against the ledger at full shape."""

from functools import partial

import pytest
import torch
from lora2qlora.adapters import add_lora
from lora2qlora.memory import (
    ADAMW,
    ADAMW_8BIT,
    ADAMW_32,
    ADAMW_FOREACH,
    ADAMW_FUSED,
    SGD,
    SGD_MOMENTUM,
    SHAPES,
    Full,
    LlamaShape,
    LoRA,
    QLoRA,
    forecast,
    shape_of,
    simulate_step,
    static_memory,
    static_of,
    storage_bytes,
    track_step,
    training_memory,
)
from lora2qlora.optimizers import AdamW8bit
from lora2qlora.qlora import quantize_base
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, masking_utils

BF16, FP32 = torch.bfloat16, torch.float32
SIZES = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "intermediate_size": 200,
    "vocab_size": 500,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "smollm3", "olmo2", "granite")
EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
ADAM = partial(torch.optim.AdamW, foreach=False)


def config_of(family: str, **sizes):
    return AutoConfig.for_model(family, **(SIZES | EXPERTS.get(family, {}) | sizes))


def measured(config, method, batch, length, checkpointing=False, make=ADAM, targets="all-linear"):
    """The report of a real model's second step."""
    torch.manual_seed(0)
    config.use_cache = False
    model = AutoModelForCausalLM.from_config(config, dtype=method.dtype)
    if isinstance(method, QLoRA):
        is_double = method.group_size is not None
        quantize_base(model, "all-linear", is_double, method.compute_dtype, method.block_size)
    if isinstance(method, LoRA):
        add_lora(model, targets, method.rank, alpha=8, dtype=method.adapter_dtype)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = make([p for p in model.train().parameters() if p.requires_grad])
    ids = torch.randint(3, config.vocab_size, (batch, length))
    track_step(model, optimizer, ids)
    return track_step(model, optimizer, ids)


def parts(report):
    """What a simulation must tell to the byte. Its curve lacks two of the allocations: those of a few bytes
    by which transformers looks whether sequences are packed."""
    return report.start_bytes, report.peaks, report.end_bytes


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize(
    "setting",
    [(LoRA(4), 2, 40, False), (QLoRA(4, dtype=FP32), 1, 70, True), (Full(FP32), 3, 17, False)],
    ids=lambda setting: type(setting[0]).__name__,
)
def test_a_simulated_step_is_a_measured_one(family, setting):
    config = config_of(family)
    assert parts(simulate_step(config, *setting)) == parts(measured(config, *setting))


@pytest.mark.filterwarnings("ignore:.* stay at full size")
@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("setting", [(QLoRA(4), 1, 40, False), (Full(), 2, 20, True)])
def test_so_is_one_of_a_mixture_of_experts(family, setting):
    config = config_of(family)
    assert parts(simulate_step(config, *setting)) == parts(measured(config, *setting))
    with pytest.raises(ValueError, match=r"mixture of experts.* in torch.bfloat16, got torch.float32"):
        simulate_step(config, LoRA(dtype=FP32))


@pytest.mark.filterwarnings("ignore:.* stay at full size")
@pytest.mark.parametrize("family", [*EXPERTS, "llama", "phi3", "smollm3"])  # the last is tied
@pytest.mark.parametrize("method", [QLoRA(4), LoRA(4), Full()], ids=lambda method: type(method).__name__)
def test_what_is_held_between_two_steps(family, method):
    config = config_of(family)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=method.dtype)
    stacks = {name: p.nbytes for name, p in model.named_parameters() if p.ndim > 2}
    if isinstance(method, QLoRA):
        quantize_base(model, "all-linear")
    if isinstance(method, LoRA):
        add_lora(model, "all-linear", method.rank, alpha=8)
    optimizer = ADAM([p for p in model.parameters() if p.requires_grad])
    model(input_ids=torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    optimizer.step()
    report = static_of(config, method)
    assert report.ledger.total == storage_bytes(model, optimizer)
    assert sum(report.dense.values()) == sum(stacks.values())
    assert bool(stacks) == (family in EXPERTS)
    assert all(".experts." in name and ".*." in name for name in report.dense)
    after = {name: p.nbytes for name, p in model.named_parameters() if p.ndim > 2}
    assert after == stacks  # neither quantized nor adapted
    if family == "llama":
        assert report.ledger == static_memory(shape_of(config), method)
    if family in EXPERTS:
        with pytest.raises(ValueError, match=f"is of type '{family}'.* simulate_step takes any"):
            training_memory(AutoModelForCausalLM.from_config(config), method)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("mistral", {"sliding_window": 16}),  # a window within the length takes a mask
        ("gemma3_text", {"sliding_window": 16, "num_hidden_layers": 6}),
        ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
        ("gpt2", {"n_embd": 96, "n_head": 6, "n_layer": 2, "n_positions": 64}),
        ("cohere", {}),
    ],
)
def test_other_forms_too(family, sizes):
    config, setting = config_of(family, **sizes), (Full(), 2, 40, False)
    assert parts(simulate_step(config, *setting)) == parts(measured(config, *setting))


@pytest.mark.parametrize(
    ("method", "targets"),
    [
        (QLoRA(8, targets=("q_proj", "v_proj"), group_size=None), ["q_proj", "v_proj"]),
        (QLoRA(2, adapter_dtype=BF16, block_size=32, compute_dtype=FP32), "all-linear"),
        (LoRA(16, targets=("down_proj",), dtype=FP32, adapter_dtype=BF16), ["down_proj"]),
    ],
)
def test_a_methods_fields_count(method, targets):
    config = config_of("qwen3")
    assert parts(simulate_step(config, method, 2, 30)) == parts(
        measured(config, method, 2, 30, targets=targets)
    )


def test_groups_of_constants_of_any_size():
    """`quantize_base` knows 256; the ledger has the sum for others."""
    shape = LlamaShape(96, 2, 6, 200, 500, kv_heads=3)
    for size in (None, 10, 256):
        method = QLoRA(group_size=size)
        found = simulate_step(config_of("llama"), method, 1, 9)
        assert found.peaks == tuple(p.total for p in forecast(shape, method, 1, 9).peaks.values())


@pytest.mark.parametrize(
    ("optimizer", "make"),
    [
        (ADAMW_FOREACH, partial(torch.optim.AdamW, foreach=True)),
        (ADAMW_FUSED, partial(torch.optim.AdamW, fused=True)),
        (SGD, partial(torch.optim.SGD, lr=1e-3, foreach=False)),
        (SGD_MOMENTUM, partial(torch.optim.SGD, lr=1e-3, momentum=0.9, foreach=False)),
        (AdamW8bit, AdamW8bit),
    ],
)
def test_every_optimizer_steps(optimizer, make):
    config = config_of("qwen2", hidden_size=192)
    found = simulate_step(config, Full(), 1, 5, optimizer=optimizer)
    assert parts(found) == parts(measured(config, Full(), 1, 5, make=make))


def test_a_model_its_config_and_a_dict_of_it_are_one():
    config = config_of("phi3")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    before = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    report = simulate_step(model, QLoRA(4), 1, 8)
    assert report == simulate_step(config, QLoRA(4), 1, 8) == simulate_step(config.to_dict(), QLoRA(4), 1, 8)
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == before
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert config.use_cache


def test_nothing_is_left_behind():
    search = masking_utils.find_packed_sequence_indices

    def refuse(parameters):
        raise RuntimeError("no optimizer today")

    with pytest.raises(RuntimeError, match="today"):
        simulate_step(config_of("llama"), LoRA(4), optimizer=refuse)
    assert masking_utils.find_packed_sequence_indices is search
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert type(torch.zeros(1)) is torch.Tensor


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("method", [QLoRA(), Full()], ids=lambda method: type(method).__name__)
def test_at_full_shape_it_is_the_ledger(method):
    config = AutoConfig.for_model(
        "llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=14336, vocab_size=128256,
    )  # fmt: skip
    shape = SHAPES["Llama-3.1-8B"]
    found = simulate_step(config, method, 2, 1024, checkpointing=True)
    predicted = forecast(shape, method, 2, 1024, checkpointing=True)
    assert found.start_bytes == static_memory(shape, method).total
    assert found.peaks == tuple(ledger.total for ledger in predicted.peaks.values())


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((nn.Linear(2, 2), LoRA()), TypeError, "causal language model .* got Linear"),
        ((17, LoRA()), TypeError, "causal language model .* got int"),
        (("t5", LoRA()), TypeError, "causal language model, got T5Config of type 't5'"),
        (("vit", LoRA()), TypeError, "causal language model, got ViTConfig of type 'vit'"),
        (({"model_type": "llamma"}, LoRA()), ValueError, "model_type is 'llamma'"),
        (("llama", "lora"), TypeError, "method is a Full, LoRA or QLoRA, got 'lora'"),
        (("llama", LoRA(), 0), ValueError, "batch must be .* got 0"),
        (("llama", LoRA(), 1, 2.5), ValueError, "length must be .* got 2.5"),
        (("llama", LoRA(), 1, 2, False, ADAMW_8BIT), TypeError, "no optimizer of torch .*AdamW8bit"),
        (("llama", LoRA(), 1, 2, False, ADAMW_32), TypeError, "no optimizer of torch"),
        (("llama", LoRA(), 1, 2, False, "adam"), TypeError, "optimizer is .* got 'adam'"),
        (
            ("phi3", LoRA(targets=("q_proj",))),
            ValueError,
            r"named \['q_proj'\]; the candidates are .*qkv_proj",
        ),
    ],
)
def test_what_cannot_be_simulated_is_named(arguments, error, words):
    source, *others = arguments
    if isinstance(source, str):
        source = AutoConfig.for_model(source) if source in ("t5", "vit") else config_of(source)
    with pytest.raises(error, match=words):
        simulate_step(source, *others)


def test_a_model_must_be_a_base_with_its_head():
    with torch.device("meta"):
        adapted, quantized = (AutoModelForCausalLM.from_config(config_of("llama")) for _ in range(2))
        headless = AutoModel.from_config(config_of("llama"))
    add_lora(adapted, "all-linear", 4, 8)
    quantize_base(quantized)
    for model in (adapted, quantized):
        with pytest.raises(ValueError, match="pass the base model, before it is adapted or quantized"):
            simulate_step(model, LoRA())
    with pytest.raises(TypeError, match="with its head; got LlamaModel"):
        simulate_step(headless, LoRA())


def test_a_course_that_depends_on_numbers_is_refused():
    def make(parameters):
        optimizer = ADAM(parameters)
        optimizer.register_step_pre_hook(lambda *_: parameters[0].nonzero())
        return optimizer

    with pytest.raises(ValueError, match=r"LlamaForCausalLM goes by its numbers in aten.nonzero"):
        simulate_step(config_of("llama"), LoRA(), optimizer=make)


def test_the_default_is_adamw():
    config = config_of("llama")
    assert simulate_step(config, LoRA(), 1, 9) == simulate_step(config, LoRA(), 1, 9, optimizer=ADAMW)
