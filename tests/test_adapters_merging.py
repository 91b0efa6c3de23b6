"""adapters.merging: a quantized base and its adapters as plain linears, held to PEFT over bitsandbytes."""

import copy
import logging

import bitsandbytes as bnb
import pytest
import torch
from accelerate import cpu_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2qlora import fast
from lora2qlora.adapters import (
    ParameterCount,
    add_lora,
    count_parameters,
    load_adapter,
    lora_layers,
    merge_cost,
    merge_lora,
    merge_quantized,
    save_adapter,
)
from lora2qlora.double_quantization import QuantizedAbsmax
from lora2qlora.lora import LoRALinear, merge
from lora2qlora.nf4 import dequantize_nf4, quantize_nf4
from lora2qlora.qlora import NF4Linear, quantize_base
from peft import LoraConfig, PeftModel, get_peft_model
from test_adapters import SUFFIXES, logits, randomize
from test_qlora import stored_by, tiny_llama, to_bitsandbytes
from torch import nn
from transformers import LlamaForCausalLM

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALVES]
Q = "model.layers.0.self_attn.q_proj"


def qlora(targets="all-linear", quantized="all-linear", double_quant=True, **options):
    """A small Llama over NF4 with adapters that are not zero; computes in float32."""
    model = tiny_llama()
    quantize_base(model, quantized, double_quant=double_quant, compute_dtype=torch.float32)
    add_lora(model, targets, 4, 8, **options)
    return randomize(model, seed=1)


def exact(layer):
    """Ŵ + ΔW in float64 by dequantize_nf4, and the size of the terms that are summed."""
    W = dequantize_nf4(layer.base.weight, torch.float32).double()
    A, B = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    scale = layer.alpha / layer.rank
    return W + scale * (B @ A), W.abs() + scale * (B.abs() @ A.abs())


def state(model):
    """Every stored tensor by name, with its values, dtype and whether it trains."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (t.detach().clone(), t.requires_grad) for name, t in tensors.items()}


def assert_same_state(model, before):
    now = state(model)
    assert now.keys() == before.keys()
    for name, (value, trains) in before.items():
        assert now[name][0].dtype == value.dtype, name
        assert torch.equal(now[name][0], value), name
        assert now[name][1] == trains, name


def bitsandbytes_llama():
    """The small Llama over Linear4bit layers, as transformers would load it."""
    model = tiny_llama()
    for name, module in list(model.named_modules()):
        if name.endswith("_proj"):
            model.set_submodule(name, to_bitsandbytes(module, True, torch.float32))
    model.is_loaded_in_4bit = True
    return model


def over_the_same(theirs):
    """Our layers over the very bytes of a model's Linear4bit layers."""
    model = copy.deepcopy(theirs)
    del model.is_loaded_in_4bit
    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            model.set_submodule(name, stored_by(module))
    return model


# Against PEFT over bitsandbytes


CONFIGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"v_proj": 3}},
    "dropout": {"lora_dropout": 0.3},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_it_is_pefts_merge_into_bitsandbytes_dequantized_weights(config, tmp_path):
    theirs = bitsandbytes_llama()
    ours = over_the_same(theirs)
    options = {"r": 4, "lora_alpha": 8, "target_modules": SUFFIXES} | config
    peft = randomize(get_peft_model(theirs, LoraConfig(**options)), seed=1)
    peft.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    dense = tiny_llama()
    for name, module in theirs.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            place = name.replace("base_model.model.", "").replace(".base_layer", "")
            dense.get_submodule(place).weight.data = weight.float()
    expected = PeftModel.from_pretrained(dense, tmp_path).merge_and_unload()
    merged = merge_quantized(ours, torch.float32)
    assert [name for name, _ in merged.named_modules()] == [name for name, _ in tiny_llama().named_modules()]
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), parameter.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits(merged), logits(expected), rtol=1e-5, atol=1e-5)


def test_rounding_again_is_pefts_merge_and_unload(tmp_path):
    theirs = bitsandbytes_llama()
    ours = over_the_same(theirs)
    peft = randomize(get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, target_modules=SUFFIXES)), seed=1)
    peft.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    with pytest.warns(UserWarning, match="rounding errors"):
        merged = peft.merge_and_unload()
    again = merge_quantized(ours, torch.float32)
    quantize_base(again, double_quant=True, compute_dtype=torch.float32)
    differ = total = 0
    for name, module in again.named_modules():
        if isinstance(module, NF4Linear):
            packed = merged.get_submodule(name).weight.data.view(-1)
            differ += (packed != module.packed).sum().item()
            total += packed.numel()
    assert total > 10_000
    assert differ <= 2  # sums that lie on a midpoint


def test_running_the_adapter_over_its_base_is_the_same_model():
    model = qlora()
    torch.testing.assert_close(
        logits(merge_quantized(model, torch.float32)), logits(model), rtol=1e-4, atol=1e-4
    )


# One rounding


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("into", DTYPES, ids=str)
def test_each_weight_is_the_sum_rounded_once(into, double_quant):
    model = qlora(double_quant=double_quant)
    merged = merge_quantized(model, into)
    for name, layer in lora_layers(model).items():
        weight, (total, terms) = merged.get_submodule(name).weight, exact(layer)
        assert weight.dtype == into
        eps = torch.finfo(into).eps
        slack = 4 * torch.finfo(torch.float32).eps * terms  # of the sum in float32
        half_step = eps / 2 * total.abs() + torch.finfo(into).smallest_normal * eps
        assert ((weight.double() - total).abs() <= half_step * (1 + 1e-6) + slack).all()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.sampled_from([8, 40, 64, 130]), st.sampled_from([8, 24]), st.booleans(),
    st.sampled_from(DTYPES), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans(),
)  # fmt: skip
def test_any_layer(rank, wide, high, bias, into, adapter_dtype, training):
    torch.manual_seed(wide + high)
    base = NF4Linear.from_linear(nn.Linear(wide, high, bias), compute_dtype=torch.float32)
    layer = LoRALinear(base, rank, 3 * rank, dropout=0.2, dtype=adapter_dtype)
    nn.init.normal_(layer.lora_B)
    model = nn.Sequential(layer).train(training)
    before = state(model)
    merged = merge_quantized(model, into)[0]
    assert_same_state(model, before)
    assert type(merged) is nn.Linear
    assert merged.training == training
    assert not any(p.requires_grad for p in merged.parameters())
    total, terms = exact(layer)
    allowed = torch.finfo(into).eps / 2 * total.abs() + 4e-7 * terms + 1e-7
    assert ((merged.weight.double() - total).abs() <= allowed).all()
    assert (merged.bias is None) == (base.bias is None)
    if bias:
        assert torch.equal(merged.bias, base.bias.to(into))
        assert merged.bias.data_ptr() != base.bias.data_ptr()


# The copy


@pytest.mark.parametrize("into", DTYPES, ids=str)
def test_the_copy_is_whole_and_the_model_stays(into, tmp_path):
    model = qlora(["q_proj", "up_proj"])
    before, types = state(model), [(n, type(m)) for n, m in model.named_modules()]
    merged = merge_quantized(model, into)
    assert_same_state(model, before)
    assert [(n, type(m)) for n, m in model.named_modules()] == types
    assert [(n, type(m)) for n, m in merged.named_modules()] == [
        (n, type(m)) for n, m in tiny_llama().named_modules()
    ]
    assert {p.dtype for p in merged.parameters()} == {into}
    buffers, own = dict(merged.named_buffers()), dict(tiny_llama().named_buffers())
    assert {name: t.dtype for name, t in buffers.items()} == {name: t.dtype for name, t in own.items()}
    assert merged.lm_head.weight is merged.model.embed_tokens.weight  # tied still
    assert torch.equal(merged.lm_head.weight, model.lm_head.weight.to(into))
    ours = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert not ours & {t.data_ptr() for t in (*merged.parameters(), *merged.buffers())}
    assert count_parameters(merged) == ParameterCount(count_parameters(tiny_llama()).total, 0)
    merged.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=into)
    torch.testing.assert_close(logits(again), logits(merged))
    assert logits(merged).isfinite().all()


def test_bare_quantized_layers_and_plain_bases_come_along():
    mixed = qlora(["q_proj", "up_proj"], quantized=["q_proj", "k_proj"])
    merged = merge_quantized(mixed, torch.float32)
    torch.testing.assert_close(logits(merged), logits(mixed), rtol=1e-4, atol=1e-5)
    name = Q.replace("q_proj", "k_proj")
    assert torch.equal(merged.get_submodule(name).weight, dequantize_nf4(mixed.get_submodule(name).weight))
    plain = tiny_llama()
    add_lora(plain, "all-linear", 4, 8)
    randomize(plain)
    for a, b in zip(
        merge_quantized(plain, torch.float32).parameters(), merge_lora(plain).parameters(), strict=True
    ):
        torch.testing.assert_close(a, b.detach(), rtol=1e-6, atol=1e-7)
    bare = tiny_llama()
    quantize_base(bare, compute_dtype=torch.float32)
    torch.testing.assert_close(
        logits(merge_quantized(bare, torch.float32)), logits(bare), rtol=1e-5, atol=1e-5
    )


def test_a_layer_with_two_names_stays_one():
    model = nn.ModuleDict({"a": nn.Linear(64, 8), "b": nn.Linear(64, 8)})
    model["b"] = model["a"]
    quantize_base(model, ["a"], compute_dtype=torch.float32)
    add_lora(model, ["a"], 2, 4)
    merged = merge_quantized(model)
    assert merged["a"] is merged["b"]
    assert type(merged["a"]) is nn.Linear


def test_a_dequantizer_with_one_buffer_for_all_layers_shares_nothing():
    model = qlora(["q_proj"])
    expected = [p.clone() for p in merge_quantized(model, torch.float32).parameters()]
    cost = merge_cost(model, merge_quantized(model, torch.bfloat16))
    buffers = {}

    def to_scratch(weight, dtype):
        return dequantize_nf4(weight, out=buffers.setdefault(weight.shape, torch.empty(weight.shape)))

    for module in model.modules():
        if isinstance(module, NF4Linear):
            module.dequantize = to_scratch
    merged = merge_quantized(model, torch.float32)
    scratch = {buffer.data_ptr() for buffer in buffers.values()}
    assert scratch
    assert not scratch & {p.data_ptr() for p in merged.parameters()}
    for a, b in zip(merged.parameters(), expected, strict=True):
        assert torch.equal(a, b)
    assert merge_cost(model, merge_quantized(model, torch.bfloat16)) == cost
    requantized = copy.deepcopy(merged)
    quantize_base(requantized, compute_dtype=torch.float32)
    plain_cost = merge_cost(model, requantized)
    for module in requantized.modules():
        if isinstance(module, NF4Linear):
            module.dequantize = to_scratch
    assert merge_cost(model, requantized) == plain_cost


def test_the_fast_path_merges_to_the_same_bits():
    model = qlora()
    expected = [p.clone() for p in merge_quantized(model).parameters()]
    fast.use_fast(model)
    for a, b in zip(merge_quantized(model).parameters(), expected, strict=True):
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def gloo(tmp_path_factory):
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path_factory.mktemp("gloo") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_blocks(model):
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = compiled(layer)
    return model


WRAPS = {
    "compiled": compiled,
    "blocks": compiled_blocks,
    "DataParallel": nn.DataParallel,
    "ddp": nn.parallel.DistributedDataParallel,
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_wrapped_models(wrap, gloo):
    model = qlora(["q_proj", "up_proj"])
    expected = logits(merge_quantized(model, torch.float32))
    wrapped = wrap(model)
    merged = merge_quantized(wrapped, torch.float32)
    assert isinstance(merged, LlamaForCausalLM)
    assert not lora_layers(merged)
    torch.testing.assert_close(logits(merged), expected)
    assert merge_cost(wrapped, merged).error < 1e-5


def test_without_numbers_it_gives_shapes():
    with torch.device("meta"):
        model = tiny_llama()
    quantize_base(model)
    add_lora(model, ["q_proj"], 4, 8)
    merged = merge_quantized(model)
    assert all(p.is_meta and p.dtype == torch.float16 for p in merged.parameters())


# What it cost


def test_a_merge_in_float32_keeps_all_and_one_on_the_grid_what_the_grid_says():
    model = qlora()
    exactly = merge_cost(model, merge_quantized(model, torch.float32))
    assert exactly.kept == pytest.approx(1, abs=1e-6)
    assert exactly.error < 1e-6
    assert exactly.unchanged < 0.01
    untouched = copy.deepcopy(model)
    for layer in lora_layers(untouched).values():
        nn.init.zeros_(layer.lora_B)
    nothing = merge_cost(model, merge_quantized(untouched, torch.bfloat16))
    assert nothing.unchanged == 1
    assert nothing.kept == pytest.approx(0, abs=1e-3)
    assert nothing.error == pytest.approx(1, abs=1e-2)


def test_the_cost_is_what_its_formulas_say():
    model, original = qlora(), tiny_llama()
    scaled = merge_quantized(model, torch.bfloat16)
    got = merge_cost(model, scaled)
    size = along = off = same = count = 0
    for name, layer in lora_layers(model).items():
        total, _ = exact(layer)
        base = dequantize_nf4(layer.base.weight, torch.float32).double()
        delta, merged = total - base, scaled.get_submodule(name).weight.double()
        size, along = size + (delta**2).sum(), along + ((merged - base) * delta).sum()
        off, same = off + ((merged - total) ** 2).sum(), same + (merged == base.bfloat16().double()).sum()
        count += base.numel()
    assert got.kept == pytest.approx((along / size).item(), rel=1e-6)
    assert got.error == pytest.approx((off / size).sqrt().item(), rel=1e-5)
    assert got.unchanged == same.item() / count
    add_lora(original, "all-linear", 4, 8)
    base_error = 0
    for name, layer in lora_layers(original).items():
        twin = lora_layers(model)[name]
        layer.lora_A.data, layer.lora_B.data = twin.lora_A.data.clone(), twin.lora_B.data.clone()
        base_error += ((layer.base.weight - dequantize_nf4(twin.base.weight)).double() ** 2).sum()
    ratio = merge_cost(model, merge_lora(original)).error
    assert ratio == pytest.approx((base_error / size).sqrt().item(), rel=1e-4)


def test_the_cost_of_rounding_again_counts_weights_that_stay():
    model = qlora()
    for layer in lora_layers(model).values():
        layer.lora_B.data *= 1e-4
    again = merge_quantized(model, torch.float32)
    quantize_base(again, double_quant=False, compute_dtype=torch.float32)
    cost = merge_cost(model, again)
    assert cost.kept < 0.2
    assert cost.error > 0.5
    W = quantize_nf4(torch.randn(4, 64))  # a sum below half a step returns to its code
    moved = quantize_nf4(dequantize_nf4(W) * (1 + 1e-4))
    assert torch.equal(W.packed, moved.packed)


# What is refused


def test_the_error_of_merge_names_it_and_the_hint_works():
    model = qlora(["q_proj"])
    for refuse in (lambda: merge_lora(model), lambda: merge(model.get_submodule(Q))):
        with pytest.raises(TypeError, match=r"got NF4Linear\. Call lora2qlora\.adapters\.merge_quantized"):
            refuse()
    assert isinstance(merge_quantized(model), LlamaForCausalLM)


@pytest.mark.parametrize("into", [torch.int8, "float16", None, torch.float8_e4m3fn], ids=str)
def test_what_is_no_float_of_torch(into):
    with pytest.raises(TypeError, match="into must be a float dtype of torch"):
        merge_quantized(qlora(["q_proj"]), into)


def test_nothing_to_merge():
    with pytest.raises(ValueError, match="no adapters and no quantized layers"):
        merge_quantized(tiny_llama())
    with pytest.raises(ValueError, match="carries no adapters: pass the one that was merged"):
        merge_cost(tiny_llama(), tiny_llama())


@pytest.mark.parametrize("adapt", [True, False])
def test_weights_of_another_library_are_named(adapt):
    model = bitsandbytes_llama()
    if adapt:
        add_lora(model, ["q_proj"], 4, 8)
    with pytest.raises(TypeError, match=r"q_proj(\.base)?: the weight of this Linear4bit is stored in"):
        merge_quantized(model)


def test_numbers_beyond_float16():
    model = qlora(["q_proj"])
    model.get_submodule(Q).lora_B.data *= 1e6
    with pytest.raises(ValueError, match=r"q_proj: its largest number, .* beyond the range of torch.float16"):
        merge_quantized(model)
    assert merge_quantized(model, torch.bfloat16).get_submodule(Q).weight.isfinite().all()
    model = qlora(["q_proj"])
    model.model.norm.weight.data[3] = 1e5
    before = state(model)
    with pytest.raises(ValueError, match=r"model\.norm\.weight: its largest number, 1e\+05, is beyond"):
        merge_quantized(model)
    assert_same_state(model, before)


def test_hooks_forwards_and_offloading():
    for place in (Q, f"{Q}.base", Q.replace("q_proj", "k_proj")):
        model = qlora(["q_proj"])
        model.get_submodule(place).register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match="the layer carries _forward_hooks, which a merged one would"):
            merge_quantized(model)
        model = qlora(["q_proj"])
        module = model.get_submodule(place)
        module.forward = lambda x, forward=module.forward: forward(x)
        with pytest.raises(ValueError, match="carries a forward of its own"):
            merge_quantized(model)
    model = qlora(["q_proj"])
    model.model.forward = lambda *a, forward=model.model.forward, **k: forward(*a, **k)
    with pytest.raises(ValueError, match="model has a forward that would run the original"):
        merge_quantized(model)
    model = qlora(["q_proj"])
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(ValueError, match="q_proj: accelerate offloads its weights"):
        merge_quantized(model)


def test_a_part_without_numbers():
    model = qlora(["q_proj"])
    model.get_submodule(Q).base.to("meta")
    with pytest.raises(ValueError, match="q_proj: a part of the layer is on the meta device"):
        merge_quantized(model)


def test_costs_that_cannot_be_taken():
    model = qlora(["q_proj"])
    with pytest.raises(KeyError, match=r"has no layer 'model\.layers\.0\.self_attn\.q_proj'"):
        merge_cost(model, nn.Linear(4, 4))
    merged = merge_quantized(model)
    merged.set_submodule(Q, nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"q_proj: the merged weight is \[4, 4\], the adapted one"):
        merge_cost(model, merged)
    merged.set_submodule(Q, nn.Identity())
    with pytest.raises(TypeError, match="q_proj: cannot read the weight of this Identity"):
        merge_cost(model, merged)
    fresh = tiny_llama()
    quantize_base(fresh)
    add_lora(fresh, ["q_proj"], 4, 8)
    with pytest.raises(ValueError, match="the update is zero in every layer"):
        merge_cost(fresh, merge_quantized(fresh))


def test_files_of_the_merged_model_hold_no_adapter(tmp_path):
    model = qlora(["q_proj"])
    with pytest.raises(ValueError, match="no adapters"):
        save_adapter(merge_quantized(model), tmp_path / "adapter")
    assert isinstance(model.get_submodule(Q).base.weight.absmax, QuantizedAbsmax)
