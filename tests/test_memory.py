"""The ledger against measured steps, the tracker against torch's own allocator, and both against sums."""

import gc
import sys
from dataclasses import replace

import bitsandbytes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2qlora.adapters import add_lora, count_parameters
from lora2qlora.double_quantization import bits_per_parameter
from lora2qlora.lora import LoRALinear
from lora2qlora.memory import (
    ADAMW,
    ADAMW_8BIT,
    ADAMW_32,
    ADAMW_FOREACH,
    ADAMW_FUSED,
    COMPONENTS,
    LINEARS,
    PHASES,
    SGD,
    SGD_MOMENTUM,
    SHAPES,
    Full,
    LlamaShape,
    LoRA,
    MemoryLedger,
    Optimizer,
    QLoRA,
    forecast,
    shape_of,
    static_memory,
    storage_bytes,
    track_peak,
    track_step,
    training_memory,
)
from lora2qlora.qlora import NF4Linear, quantize_base
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

BF16, FP32 = torch.bfloat16, torch.float32
TINY = LlamaShape(64, 2, 4, 176, 500, kv_heads=2)
SMALL = LlamaShape(128, 4, 4, 344, 2000)
DEEP = LlamaShape(96, 6, 6, 256, 300, kv_heads=3, tied=True)
WIDE = LlamaShape(192, 2, 3, 512, 4000, kv_heads=1)
FAT = LlamaShape(64, 2, 4, 1024, 64)  # so little vocabulary that the peak is in the forward pass
BROAD = LlamaShape(512, 1, 4, 1376, 600)  # its MLP takes three pieces to dequantize


def config_of(shape: LlamaShape) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads or shape.heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        use_cache=False,
    )


def built(shape: LlamaShape, method, checkpointing: bool = False) -> nn.Module:
    """A model of transformers with this package's layers, ready to train."""
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config_of(shape), dtype=method.dtype)
    if isinstance(method, QLoRA):
        is_double = method.group_size is not None
        quantize_base(model, "all-linear", is_double, method.compute_dtype, method.block_size)
    if isinstance(method, LoRA):
        add_lora(model, list(method.targets), method.rank, alpha=8, dtype=method.adapter_dtype)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


MAKE = {
    ADAMW: lambda p: torch.optim.AdamW(p, foreach=False),
    ADAMW_FOREACH: lambda p: torch.optim.AdamW(p, foreach=True),
    ADAMW_FUSED: lambda p: torch.optim.AdamW(p, fused=True),
    ADAMW_8BIT: bitsandbytes.optim.AdamW8bit,
    SGD: lambda p: torch.optim.SGD(p, lr=1e-3, foreach=False),
    SGD_MOMENTUM: lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, foreach=False),
}


def measured(shape, method, batch, length, checkpointing, optimizer):
    """The static bytes of a model and its optimizer after a step, and the next step's report."""
    model = built(shape, method, checkpointing)
    made = MAKE[optimizer]([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(shape.vocabulary, (batch, length))
    track_step(model, made, ids, watch=lambda *functions, **_: [f() for f in functions])
    return storage_bytes(model, made), track_step(model, made, ids)


QV = ("q_proj", "v_proj")
SETTINGS = [
    (TINY, Full(), 3, 48, False, ADAMW),
    (TINY, Full(), 3, 48, True, ADAMW_FOREACH),
    (TINY, Full(FP32), 1, 7, False, SGD),
    (SMALL, Full(), 1, 32, False, ADAMW_FOREACH),
    (SMALL, Full(FP32), 2, 64, True, SGD_MOMENTUM),
    (DEEP, Full(), 2, 40, True, SGD),
    (DEEP, Full(FP32), 4, 80, False, ADAMW_FUSED),
    (WIDE, Full(), 2, 100, False, ADAMW_8BIT),
    (WIDE, Full(), 1, 33, True, ADAMW),
    (BROAD, Full(), 4, 64, True, SGD),
    (TINY, LoRA(1), 3, 48, False, ADAMW),
    (TINY, LoRA(8, dtype=FP32), 3, 48, True, ADAMW),
    (SMALL, LoRA(4), 1, 96, True, ADAMW_FOREACH),
    (SMALL, LoRA(16, adapter_dtype=BF16), 2, 64, False, SGD),
    (SMALL, LoRA(4, targets=QV), 4, 32, False, ADAMW),
    (SMALL, LoRA(4, targets=QV), 4, 32, True, ADAMW),
    (DEEP, LoRA(2), 2, 40, True, ADAMW_8BIT),
    (DEEP, LoRA(32), 1, 200, False, SGD_MOMENTUM),
    (DEEP, LoRA(4, targets=("o_proj", "gate_proj")), 2, 50, True, ADAMW),
    (WIDE, LoRA(64), 1, 17, True, ADAMW),
    (WIDE, LoRA(8, targets=("down_proj",), dtype=FP32), 2, 64, False, ADAMW),
    (WIDE, LoRA(8, targets=("k_proj", "up_proj")), 2, 64, True, SGD),
    (TINY, QLoRA(4), 3, 48, False, ADAMW),
    (TINY, QLoRA(4, group_size=None, dtype=FP32), 3, 48, True, ADAMW),
    (SMALL, QLoRA(64), 1, 16, True, SGD),
    (SMALL, QLoRA(2, targets=QV), 8, 16, False, ADAMW),
    (DEEP, QLoRA(8, dtype=FP32), 2, 64, False, ADAMW_FUSED),
    (DEEP, QLoRA(8, adapter_dtype=BF16), 1, 128, True, ADAMW),
    (WIDE, QLoRA(4, compute_dtype=FP32), 2, 32, False, ADAMW),
    (WIDE, QLoRA(16, block_size=128), 1, 64, True, ADAMW_8BIT),
    (BROAD, QLoRA(8), 1, 16, False, ADAMW),
    (BROAD, QLoRA(8), 2, 16, True, SGD_MOMENTUM),
    (FAT, LoRA(4), 1, 256, False, ADAMW),
]


NAMES = [f"{s.hidden}-{type(m).__name__}-{batch}x{length}" for s, m, batch, length, *_ in SETTINGS]


@pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)
def test_the_ledger_is_what_a_step_takes(setting):
    shape, method, *_, optimizer = setting
    static, report = measured(*setting)
    predicted = forecast(*setting)
    assert static_memory(shape, method, optimizer).total == static
    assert predicted.curve[0] == static
    assert predicted.peak.total == pytest.approx(report.peak_bytes, rel=0.001)  # the issue asks for 1 %
    for phase, peak in zip(PHASES, report.peaks, strict=True):
        apart = predicted.peaks[phase].total - peak
        if isinstance(method, Full) and shape.tied and phase == "backward":
            # Watched, autograd adds the two gradients of a tied weight into a third tensor.
            assert -2 * shape.vocabulary * shape.hidden * method.dtype.itemsize <= apart <= 0
        else:
            assert apart == 0
    assert predicted.end_bytes == report.end_bytes


def test_the_settings_cover_what_they_should():
    shapes, methods, batches, lengths, checkpointing, optimizers = zip(*SETTINGS, strict=True)
    assert len(set(SETTINGS)) == len(SETTINGS) >= 24
    assert set(optimizers) == set(MAKE)
    for kind in (Full, LoRA, QLoRA):
        assert {c for m, c in zip(methods, checkpointing, strict=True) if type(m) is kind} == {False, True}
    fullest = {max(p := forecast(*s).peaks, key=lambda phase: p[phase].total) for s in SETTINGS}
    assert fullest == set(PHASES)
    assert min(map(len, map(set, (shapes, batches, lengths)))) >= 4
    assert len({m.rank for m in methods if isinstance(m, LoRA)}) >= 5


# --- sums that can be done by hand ---------------------------------------------------------------


def test_a_shape_counts_the_parameters_of_the_model():
    for shape in (TINY, SMALL, DEEP, WIDE):
        with torch.device("meta"):
            model = LlamaForCausalLM(config_of(shape))
        assert shape.parameters == count_parameters(model).total
        assert training_memory(model, LoRA(4)) == training_memory(shape, LoRA(4))
    assert SHAPES["LLaMA-7B"].parameters == 6_738_415_616  # also that of the released files
    assert SHAPES["SmolLM2-135M"].parameters == 134_515_008
    sizes = {"13B": 13.0, "33B": 32.5, "65B": 65.3, "70B": 69.0, "175B": 175.2}
    for name, billions in sizes.items():
        found = next(shape for key, shape in SHAPES.items() if key.endswith(name))
        assert found.parameters / 1e9 == pytest.approx(billions, abs=0.05)


def test_full_fine_tuning_takes_a_fixed_number_of_bytes_a_parameter():
    """Weights, gradients and two states: 4 times the dtype, or 2 + 2 + 8 with 32-bit states."""
    shape = SHAPES["LLaMA-65B"]
    for dtype, optimizer, each in ((BF16, ADAMW_FUSED, 8), (BF16, ADAMW_32, 12), (FP32, ADAMW_FUSED, 16)):
        ledger = forecast(shape, Full(dtype), 1, 1, optimizer=optimizer).peaks["step"]
        tensors = 1 + 80 * 9 + 2
        rotary = 2 * 4 * 64
        assert ledger.total == each * shape.parameters + 4 * tensors + rotary + 8


def test_nf4_takes_the_bits_of_the_format_and_an_offset():
    shape = SHAPES["LLaMA-7B"]
    size = sum(out * in_ for out, in_ in shape.linears.values()) * shape.layers
    for group_size in (256, None):
        method = QLoRA(group_size=group_size)
        ledger = static_memory(shape, method)
        outside = 2 * (shape.parameters - size) + 2 * 4 * 64
        offsets = 4 * 7 * 32 if group_size else 0
        stored = ledger.weights - outside + ledger.constants
        assert stored == size * bits_per_parameter(64, group_size) / 8 + offsets
    layer = NF4Linear.from_linear(nn.Linear(100, 37, bias=False))  # a partial block, a partial group
    assert storage_bytes(layer) == layer.weight.nbytes
    odd = LlamaShape(100, 1, 2, 37, 11)
    static, report = measured(odd, QLoRA(3), 1, 5, False, ADAMW)
    assert static_memory(odd, QLoRA(3)).total == static
    assert forecast(odd, QLoRA(3), 1, 5).peak.total == pytest.approx(report.peak_bytes, rel=0.01)


def test_lora_parts_by_hand():
    shape, method = SHAPES["LLaMA-7B"], LoRA(rank=8, targets=QV)
    ledger = forecast(shape, method, optimizer=ADAMW_FUSED).peaks["step"]
    count = 32 * 2 * 8 * (4096 + 4096)
    assert (ledger.adapters, ledger.gradients) == (4 * count, 4 * count)
    assert ledger.optimizer == 8 * count + 4 * 32 * 4
    assert ledger.weights == 2 * shape.parameters + 2 * 4 * 64
    assert (ledger.constants, ledger.activations, ledger.logits) == (0, 0, 0)


def test_logits_by_hand():
    """At the widest: float32 log-probabilities, and two gradients as wide."""
    tokens, vocabulary = 4 * 128, 128_256
    ledger = training_memory(SHAPES["Llama-3.2-1B"], QLoRA(), 4, 128, checkpointing=True)
    assert ledger.logits == 12 * tokens * vocabulary


def test_a_checkpointed_block_keeps_its_input_alone():
    """One block more costs its weights and adapters, and one hidden state in 16 bits."""
    batch, length, method = 2, 256, LoRA(4)

    def at_the_loss(layers):
        shape = LlamaShape(256, layers, 4, 688, 4000)
        return forecast(shape, method, batch, length, True).peaks["backward"]

    more, less = at_the_loss(9), at_the_loss(8)
    assert more.logits == less.logits > 0
    assert more.activations - less.activations == batch * length * 256 * 2


# --- properties ----------------------------------------------------------------------------------

METHODS = st.one_of(
    st.builds(Full, st.sampled_from([BF16, FP32])),
    st.builds(LoRA, st.integers(1, 64), st.sampled_from([LINEARS, QV, ("down_proj",)])),
    st.builds(QLoRA, st.integers(1, 64), st.sampled_from([LINEARS, QV]), st.sampled_from([BF16, FP32])),
)
SHAPE = st.sampled_from([TINY, SMALL, DEEP, WIDE, BROAD])
PLACES = (SHAPE, METHODS, st.integers(1, 5), st.integers(1, 300), st.booleans(), st.sampled_from(list(MAKE)))


@settings(max_examples=60, deadline=None)
@given(*PLACES)
def test_every_forecast_adds_up(shape, method, batch, length, checkpointing, optimizer):
    predicted = forecast(shape, method, batch, length, checkpointing, optimizer)
    static = static_memory(shape, method, optimizer).total
    assert predicted.curve[0] == static
    assert predicted.end_bytes == static + 8 * batch * length  # nothing but the token ids is left
    bounds = [*predicted.starts, len(predicted.curve)]
    for i, ledger in enumerate(predicted.peaks.values()):
        assert ledger.total == max(predicted.curve[bounds[i] : bounds[i + 1]])
        assert ledger.total == sum(getattr(ledger, name) for name in COMPONENTS)
        assert min(getattr(ledger, name) for name in COMPONENTS) >= 0
    assert predicted.peak.total == max(predicted.curve)
    assert predicted.peaks["step"].logits == predicted.peaks["step"].activations == 0


@settings(max_examples=40, deadline=None)
@given(*PLACES, st.sampled_from(["batch", "length", "rank"]))
def test_more_is_never_less(shape, method, batch, length, checkpointing, optimizer, what):
    before = training_memory(shape, method, batch, length, checkpointing, optimizer).total
    if what == "rank" and isinstance(method, LoRA):
        method = replace(method, rank=method.rank + 1)
    else:
        batch, length = (batch + 1, length) if what == "batch" else (batch, length + 1)
    after = training_memory(shape, method, batch, length, checkpointing, optimizer).total
    assert after > before or (after == before and isinstance(method, Full))  # a step's peak has no batch


def calls(function) -> int:
    """How many calls of Python functions a second call makes: its work, however busy the machine is."""
    function()  # what is cached, is cached now
    made = 0

    def count(frame, event, argument):
        nonlocal made
        made += event == "call"

    before = sys.getprofile()
    gc.disable()  # it may call what others left
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
        gc.enable()
    return made


@pytest.mark.parametrize("method", [QLoRA(), LoRA(), Full()], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_work_grows_with_the_layers_and_with_nothing_else(method, checkpointing):
    def work(shape=TINY, batch=2, length=16):
        return calls(lambda: training_memory(shape, method, batch, length, checkpointing))

    few, more, most = (work(replace(TINY, layers=layers)) for layers in (4, 8, 16))
    assert most - more == 2 * (more - few) > 0
    assert work(WIDE) == work(replace(WIDE, hidden=4 * WIDE.hidden)) == work(WIDE, 64, 4096)


def test_a_preset_takes_few_calls():
    for name, shape in SHAPES.items():
        assert calls(lambda s=shape: training_memory(s, QLoRA(), 1, 256, True)) < 200_000, name


# --- the tracker ---------------------------------------------------------------------------------


def test_the_tracker_counts_what_lives():
    kept = torch.zeros(1000)
    made = []

    def first():
        a = kept + 1  # 4000
        b = a[:10].clone()  # 40
        del a
        made.append(b * 2)  # 40

    def second():
        made.append(made[0].expand(50, 10) + 0)  # 2000

    report = track_peak(first, second)
    assert report.start_bytes == 4000
    assert report.peaks == (8040, 6040)
    assert (report.peak_bytes, report.end_bytes) == (8040, 6040)
    assert [report.curve[i] for i in report.starts] == [4000, 4040]
    unused = torch.zeros(5)
    assert track_peak(first, held=[unused]).start_bytes == 4020


def test_the_tracker_agrees_with_the_allocator():
    """torch's profiler hears every allocation; it also hears workspaces inside operations."""
    for method, checkpointing in ((LoRA(4), False), (LoRA(4, dtype=FP32), True), (Full(), False)):
        model = built(SMALL, method, checkpointing)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        ids = torch.randint(SMALL.vocabulary, (2, 64))
        tracked = track_step(model, optimizer, ids)  # the first, which makes the states
        tracked = track_step(model, optimizer, ids)
        changes = []

        def listen(*functions, changes=changes, **_):
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as p:
                for function in functions:
                    function()
            pending = list(p.profiler.kineto_results.experimental_event_tree())
            while pending:
                event = pending.pop()
                pending += event.children
                if event.tag.name == "Allocation":
                    changes.append((event.start_time_ns, event.extra_fields.alloc_size))

        track_step(model, optimizer, ids, watch=listen)
        live = peak = 0
        for _, change in sorted(changes):
            live += change
            peak = max(peak, live)
        ours = tracked.peak_bytes - tracked.start_bytes
        assert 0 <= peak - ours < 0.02 * ours


def test_shared_storages_weigh_once():
    model = nn.ModuleList([nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)])
    assert storage_bytes(model) == 2 * 160
    model[1].weight = model[0].weight
    assert storage_bytes(model) == 160
    part = torch.zeros(100)[:3]
    assert storage_bytes(part) == 400
    assert storage_bytes(part, part[:1], model) == 560
    assert storage_bytes(nn.Linear(4, 10, device="meta"), nn.Linear(4, 10, device="meta")) == 2 * 200
    with pytest.raises(TypeError, match="got dict"):
        storage_bytes({})


@pytest.mark.gpu
def test_the_ledger_on_a_gpu():
    """The allocator rounds every tensor up to 512 bytes, and kernels take workspaces."""
    shape = replace(SMALL, hidden=512, intermediate=1376)
    for method in (Full(), LoRA(8), QLoRA(8)):
        model = built(shape, method).cuda()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=True)
        ids = torch.randint(shape.vocabulary, (4, 256), device="cuda")
        track_step(model, optimizer, ids)
        report = track_step(model, optimizer, ids)
        predicted = training_memory(shape, method, 4, 256, optimizer=ADAMW_FOREACH).total
        assert predicted == pytest.approx(report.peak_bytes, rel=0.1)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: LlamaShape(0, 1, 1, 1, 1), ValueError, "hidden must be an int of at least 1, got 0"),
        (lambda: LlamaShape(64, 1, 6, 1, 1), ValueError, "heads must divide hidden"),
        (lambda: LlamaShape(64, 1, 4, 1, 1, kv_heads=3), ValueError, "kv_heads divide heads"),
        (lambda: LlamaShape(62, 1, 2, 1, 1), ValueError, "heads of an even size, got 31"),
        (lambda: LlamaShape(64, 1, 2, 1, 1, head_size=31), ValueError, "heads of an even size, got 31"),
        (lambda: LlamaShape(64, 1, 2, 1, 1, tied="no"), TypeError, "tied must be True or False, got 'no'"),
        (lambda: Full(torch.int8), TypeError, r"^dtype must be one of .*float32.* got torch.int8"),
        (lambda: LoRA(dtype=torch.int8), TypeError, r"^dtype must be one of .* got torch.int8"),
        (lambda: LoRA(adapter_dtype=torch.uint8), TypeError, r"adapter_dtype must be .* got torch.uint8"),
        (lambda: QLoRA(dtype=torch.int8), TypeError, r"^dtype must be one of .* got torch.int8"),
        (lambda: QLoRA(compute_dtype="bf16"), TypeError, "compute_dtype must be one of .* got 'bf16'"),
        (lambda: QLoRA(0), ValueError, "rank must be an int of at least 1, got 0"),
        (lambda: QLoRA(block_size=-64), ValueError, "block_size must be .* at least 1, got -64"),
        (lambda: QLoRA(block_size=0), ValueError, "block_size must be .* at least 1, got 0"),
        (lambda: QLoRA(group_size=0), ValueError, "group_size must be .* at least 1, got 0"),
        (lambda: LoRA(0), ValueError, "rank must be an int of at least 1, got 0"),
        (lambda: LoRA(4, targets=("q",)), ValueError, "targets are some of .* got"),
        (lambda: LoRA(4, targets=()), ValueError, "targets are some of"),
        (lambda: training_memory(TINY, "lora"), TypeError, "method is a Full, LoRA or QLoRA, got 'lora'"),
        (lambda: training_memory(TINY, Full(), batch=0), ValueError, "batch must be .* got 0"),
        (lambda: training_memory(TINY, Full(), length=1.5), ValueError, "length must be .* got 1.5"),
        (lambda: training_memory(TINY, Full(), optimizer="adam"), TypeError, "optimizer is an Optimizer"),
        (lambda: training_memory("7B", Full()), TypeError, r"LlamaShape or a Llama-like model .* got str"),
        (lambda: training_memory(nn.Linear(2, 2), Full()), TypeError, "got Linear"),
        (lambda: track_peak(), ValueError, "a function to call"),
    ],
)
def test_what_does_not_fit_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_model_of_another_form_is_refused():
    with torch.device("meta"):
        adapted, other = (LlamaForCausalLM(config_of(TINY)) for _ in range(2))
    add_lora(adapted, "all-linear", 4, 8)
    other.model.layers[0].self_attn.q_proj = nn.Linear(64, 64, device="meta")  # one with a bias
    for model in (adapted, other):
        with pytest.raises(ValueError, match=r"parameters, a Llama of its sizes .*: pass the base model"):
            shape_of(model)


LLAMAS = ("llama", "mistral", "ministral", "cwm")  # whose blocks are a Llama's, tensor for tensor


@pytest.mark.parametrize("family", LLAMAS)
def test_every_family_takes_what_the_ledger_says(family):
    sizes = config_of(SMALL).to_dict() | {"sliding_window": 64}
    wanted = ("hidden", "num", "intermediate", "vocab", "tie", "head_dim", "sliding", "use_cache")
    config = AutoConfig.for_model(family, **{k: v for k, v in sizes.items() if k.startswith(wanted)})
    model = AutoModelForCausalLM.from_config(config, dtype=BF16)
    window = None if family == "llama" else 64
    assert shape_of(model) == replace(SMALL, kv_heads=4, head_size=32, window=window)
    predicted = forecast(model, LoRA(4), 2, 63)
    add_lora(model, "all-linear", 4, 8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
    ids = torch.randint(3, SMALL.vocabulary, (2, 63))
    track_step(model.train(), optimizer, ids)
    found = track_step(model, optimizer, ids)
    assert [ledger.total for ledger in predicted.peaks.values()] == list(found.peaks)


def test_what_the_ledger_does_not_model_is_refused():
    def on_meta(family="llama", **options):
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                AutoConfig.for_model(family, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                    num_attention_heads=4, num_key_value_heads=4, head_dim=16, vocab_size=50, pad_token_id=0),
                **options,
            )  # fmt: skip

    assert training_memory(on_meta(), Full()) == training_memory(LlamaShape(64, 1, 4, 64, 50), Full())
    quantized, with_bnb = on_meta(), on_meta()
    quantize_base(quantized, "all-linear")
    four_bit = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
    with_bnb.set_submodule("model.layers.0.self_attn.q_proj", four_bit)
    for model, words in (
        (on_meta(attn_implementation="eager"), "has 'eager' attention, need 'sdpa'"),
        (on_meta("gemma"), "is of type 'gemma', the ledger knows the block of .*'llama'"),
        (quantized, "has linear layers of type NF4Linear, need nn.Linear"),
        (with_bnb, "has linear layers of type Linear4bit, need nn.Linear"),
    ):
        for method in (Full(), LoRA(4), QLoRA(4)):
            with pytest.raises(ValueError, match=words):
                training_memory(model, method)
    windowed = on_meta("mistral")
    windowed.config.sliding_window = 64
    with pytest.raises(ValueError, match=r"window of 64 tokens takes a mask.* got length 64"):
        training_memory(windowed, LoRA(4), length=64)


def test_dropout_a_mask_and_autocast_are_not_counted():
    """What the docstring of `training_memory` says of them."""
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[0, :9] = 0

    def above(dropout=0.0, mask=None, autocast=False):
        model = built(DEEP, LoRA(4))
        for layer in model.modules():
            if isinstance(layer, LoRALinear):
                layer.dropout = nn.Dropout(dropout)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
        plain = model.forward

        def forward(**inputs):
            with torch.autocast("cpu", BF16, enabled=autocast):
                return plain(attention_mask=mask, **inputs)

        model.forward = forward
        ids = torch.randint(DEEP.vocabulary, (2, 40))
        track_step(model, optimizer, ids)
        found = track_step(model, optimizer, ids).peak_bytes
        return found / training_memory(DEEP, LoRA(4), 2, 40).total - 1

    assert above() == 0
    assert above(dropout=0.1) > 0.1
    assert 0.005 < above(mask=mask) < 0.05
    assert abs(above(autocast=True)) > 0.01


def test_a_failing_function_leaves_no_watch_behind():
    with pytest.raises(RuntimeError, match="out of memory"):
        track_peak(lambda: (_ for _ in ()).throw(RuntimeError("out of memory")))
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert MemoryLedger(weights=1, transient=2).total == 3
    assert Optimizer().bytes_for(10, 20) == 44
