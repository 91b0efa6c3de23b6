"""qlora: one layer against bitsandbytes and autograd, what is kept for backward, files, casts, refusals."""

import copy
import gc
import io
import logging
import pickle
import re
import warnings
import weakref
from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2qlora import qlora
from lora2qlora.adapters import (
    add_lora,
    count_parameters,
    find_targets,
    load_adapter,
    merge_lora,
    save_adapter,
)
from lora2qlora.double_quantization import QuantizedAbsmax, double_quantize
from lora2qlora.lora import LoRALinear, merge
from lora2qlora.memory import storage_bytes
from lora2qlora.nf4 import NF4Weight, dequantize_nf4, quantize_nf4
from lora2qlora.qlora import NF4Linear, quantize_base
from lora2qlora.qlora.checks import left_dense
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS = torch.arange(20).reshape(2, 10)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(in_features=128, out_features=96, bias=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(in_features, out_features, bias, dtype=dtype)


def quantized(*arguments, double_quant=True, compute_dtype=torch.float32, block_size=64, **options):
    return NF4Linear.from_linear(linear(*arguments, **options), block_size, double_quant, compute_dtype)


def dense(layer, dtype=None):
    """The weight that the layer computes with."""
    return dequantize_nf4(layer.weight, dtype or layer.compute_dtype)


def tiny_llama():
    """The same small model each time; its widths are multiples of the block size (facts on bitsandbytes)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def to_bitsandbytes(layer, double_quant, compute_dtype):
    """A Linear4bit with the weight of an nn.Linear; its bias is a copy."""
    shape, bias = (layer.in_features, layer.out_features), layer.bias is not None
    theirs = bnb.nn.Linear4bit(*shape, bias, compute_dtype, double_quant, "nf4")
    theirs.weight = bnb.nn.Params4bit(
        layer.weight.detach().clone(), compress_statistics=double_quant, quant_type="nf4", module=theirs
    )
    theirs.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), False)
    theirs.support_avx512bf16_for_cpu = False  # else it repacks at an eval forward, and trains no more
    return theirs.to("cpu")


def stored_by(theirs):
    """Our layer over the very tensors of a Linear4bit."""
    state = theirs.weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = QuantizedAbsmax(state.absmax, state.state2.absmax, state.offset, state.state2.blocksize)
    weight = NF4Weight(theirs.weight.data.view(-1), absmax, torch.Size(state.shape), state.dtype, 64)
    return NF4Linear(weight, theirs.bias, theirs.compute_dtype)


def peft_over(theirs, ours):
    """PEFT's LoRA over a Linear4bit, with the A and B of ours."""
    wrapper = nn.Sequential(theirs)
    wrapper.is_loaded_in_4bit = True
    model = get_peft_model(wrapper, LoraConfig(r=ours.rank, lora_alpha=ours.alpha, target_modules=["0"]))
    twin = model.base_model.model[0]
    twin.lora_A["default"].weight.data.copy_(ours.lora_A)
    twin.lora_B["default"].weight.data.copy_(ours.lora_B)
    return twin


def gradients(layer, x, upstream):
    """Output, gradient of x, and gradients of whatever else trains, by name."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(upstream)
    return y.detach(), x.grad, {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}


# Against bitsandbytes and PEFT.


@pytest.mark.parametrize("shape", [(5, 128), (2, 3, 128), (128,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_bitsandbytes_bit_for_bit(shape, dtype, bias):
    base = linear(bias=bias, dtype=dtype)
    theirs = to_bitsandbytes(base, False, dtype)
    ours = NF4Linear.from_linear(base, double_quant=False, compute_dtype=dtype)
    assert torch.equal(ours.packed, theirs.weight.data.view(-1))
    assert torch.equal(ours.absmax, theirs.weight.quant_state.absmax)
    x, upstream = normal(*shape, dtype=dtype), normal(*shape[:-1], 96, seed=1, dtype=dtype)
    (y, grad, _), (their_y, their_grad, _) = (gradients(layer, x, upstream) for layer in (ours, theirs))
    assert torch.equal(y, their_y)
    assert torch.equal(grad, their_grad)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_double_quantized_codes_are_bitsandbytes_but_for_a_few():
    base = linear(1024, 1024, bias=False)
    theirs = to_bitsandbytes(base, True, torch.float32)
    ours, state = NF4Linear.from_linear(base, compute_dtype=torch.float32), theirs.weight.quant_state
    assert torch.equal(ours.packed, theirs.weight.data.view(-1))
    torch.testing.assert_close(ours.offset, state.offset, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.scales, state.state2.absmax, rtol=1e-5, atol=0)
    apart = (ours.codes.int() - state.absmax.int()).abs()
    assert (apart > 0).sum() < 0.005 * apart.numel()
    back, theirs_back = ours.weight.absmax.dequantize(), stored_by(theirs).weight.absmax.dequantize()
    assert (back - theirs_back).abs().max() < 0.02 * ours.scales.max()  # one step, or a few beside 0
    x = normal(7, 1024)
    assert 0 < (ours(x) - theirs(x)).norm() / ours(x).norm() < 1e-3
    torch.testing.assert_close(stored_by(theirs)(x), theirs(x), rtol=0, atol=0)  # the codes are all of it


@pytest.mark.parametrize("double_quant", [True, False])
def test_with_adapters_it_is_peft_over_bitsandbytes(double_quant):
    theirs = to_bitsandbytes(linear(), double_quant, torch.float32)
    ours = LoRALinear(stored_by(theirs), 4, alpha=8)
    nn.init.normal_(ours.lora_B)
    twin = peft_over(theirs, ours)
    x, upstream = normal(6, 128), normal(6, 96, seed=1)
    (y, grad, own), (their_y, their_grad, their_own) = (gradients(m, x, upstream) for m in (ours, twin))
    torch.testing.assert_close(y, their_y)
    torch.testing.assert_close(grad, their_grad)
    torch.testing.assert_close(own["lora_A"], their_own["lora_A.default.weight"])
    torch.testing.assert_close(own["lora_B"], their_own["lora_B.default.weight"])
    assert set(own) == {"lora_A", "lora_B"}


def test_bitsandbytes_backward_rounds_to_the_weights_dtype_and_ours_does_not():
    """Its backward dequantizes to the dtype that the weight had, its forward to the compute dtype."""
    base = linear(bias=False, dtype=torch.bfloat16)
    theirs = to_bitsandbytes(base, False, torch.float32)
    ours = NF4Linear.from_linear(base, double_quant=False, compute_dtype=torch.float32)
    x, upstream = normal(6, 128), normal(6, 96, seed=1)
    (y, grad, _), (their_y, their_grad, _) = (gradients(layer, x, upstream) for layer in (ours, theirs))
    assert torch.equal(y, their_y)
    torch.testing.assert_close(grad, upstream @ dense(ours), rtol=0, atol=0)
    assert 1e-4 < (their_grad - grad).norm() / grad.norm() < 1e-2


# Against autograd.


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(1, 70),
    st.integers(1, 70),
    st.booleans(),
    st.booleans(),
    st.sampled_from([16, 64, 4096]),
)
def test_any_layer_and_input_agrees_with_autograd(batch, in_features, out_features, bias, double, block):
    layer = quantized(in_features, out_features, bias, double_quant=double, block_size=block)
    reference = nn.Linear(in_features, out_features, bias)
    reference.weight.data = dense(layer)
    if bias:
        reference.bias.data = layer.bias.data
        layer.bias.requires_grad_()
    x, upstream = normal(*batch, in_features), normal(*batch, out_features, seed=1)
    y, grad, own = gradients(layer, x, upstream)
    expected_y, expected_grad, expected_own = gradients(reference, x, upstream)
    assert y.shape == (*batch, out_features)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(grad, expected_grad)
    assert own.keys() == ({"bias"} if bias else set())
    for name, value in own.items():
        torch.testing.assert_close(value, expected_own[name])


@pytest.mark.parametrize("double_quant", [True, False])
def test_gradients_are_those_of_finite_differences(double_quant):
    layer = quantized(12, 7, double_quant=double_quant, compute_dtype=torch.float64, block_size=8)
    layer.bias.data, x = layer.bias.data.double(), normal(2, 3, 12, dtype=torch.float64).requires_grad_()
    bias = layer.bias.requires_grad_()

    def function(x, bias):
        return torch.func.functional_call(layer, {"bias": bias}, (x,))

    assert torch.autograd.gradcheck(function, (x, bias))
    assert torch.autograd.gradgradcheck(function, (x, bias))


@pytest.mark.parametrize("compute_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_input_dtype_goes_out_and_comes_back_as_gradient(dtype, compute_dtype):
    layer = quantized(compute_dtype=compute_dtype)
    y, grad, _ = gradients(layer, normal(4, 128, dtype=dtype), normal(4, 96, seed=1, dtype=dtype))
    assert y.dtype == grad.dtype == dtype
    expected = nn.functional.linear(
        normal(4, 128, dtype=dtype).to(compute_dtype), dense(layer), layer.bias.to(compute_dtype)
    )
    assert torch.equal(y, expected.to(dtype))


def test_an_input_without_gradient_gives_an_output_without():
    layer = quantized()
    assert not layer(normal(4, 128)).requires_grad
    layer.bias.requires_grad_()
    y = layer(normal(4, 128))
    y.sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((96,), 4.0))


@pytest.mark.parametrize("compute_dtype", DTYPES)
def test_autocast_does_not_change_the_compute_dtype(compute_dtype):
    layer = quantized(compute_dtype=compute_dtype)
    x, upstream = normal(4, 128), normal(4, 96, seed=1)
    expected = gradients(layer, x, upstream)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, grad, _ = gradients(layer, x, upstream)
    assert y.dtype == grad.dtype == torch.float32
    assert torch.equal(y, expected[0])
    assert torch.equal(grad, expected[1])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    layer = LoRALinear(quantized(128, 128), 4, alpha=8)
    nn.init.normal_(layer.lora_B)
    x, upstream = normal(4, 128), normal(4, 128, seed=1)
    plain = gradients(layer, x, upstream)
    x = x.clone().requires_grad_()
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=use_reentrant).backward(upstream)
    assert torch.equal(x.grad, plain[1])
    assert torch.equal(layer.lora_A.grad, plain[2]["lora_A"])
    assert torch.equal(layer.lora_B.grad, plain[2]["lora_B"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own, on tracing
def test_it_compiles_without_changing_a_result():
    layer = LoRALinear(quantized(double_quant=False), 4, alpha=8)
    nn.init.normal_(layer.lora_B)
    compiled = torch.compile(layer, backend="aot_eager")
    x, upstream = normal(4, 128), normal(4, 96, seed=1)
    plain = gradients(layer, x, upstream)
    y, grad, own = gradients(compiled, x, upstream)
    torch.testing.assert_close((y, grad), plain[:2])
    for name, value in plain[2].items():
        torch.testing.assert_close(own[f"_orig_mod.{name}"], value)


# What is kept for the backward pass.


def saved_bytes(function, *owned):
    """(bytes saved for backward, those of them that are not owned anyway), each storage once."""
    saved = {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = function()
    own = {tensor.untyped_storage().data_ptr() for tensor in owned}
    total = sum(t.untyped_storage().nbytes() for t in saved.values())
    more = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in own)
    del result
    return total, more


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_packed_weight_alone_is_saved_and_the_layer_owns_it(double_quant):
    layer = quantized(1024, 1024, bias=False, double_quant=double_quant)
    x = normal(8, 1024).requires_grad_()
    blocks = 1024 * 1024 // 64
    constants = blocks + 4 * (blocks // 256) + 4 if double_quant else 4 * blocks
    assert saved_bytes(lambda: layer(x), *layer.buffers()) == (1024 * 1024 // 2 + constants, 0)
    naive = saved_bytes(lambda: nn.functional.linear(x, dense(layer)), x, *layer.buffers())
    assert naive[1] == 4 * 1024 * 1024


def test_no_dense_weight_lives_longer_than_its_product():
    layer, alive, most = quantized(), weakref.WeakSet(), []

    def dequantize(weight, dtype):
        gc.collect()
        most.append(len(alive))
        alive.add(out := dequantize_nf4(weight, dtype))
        return out

    layer.dequantize = dequantize
    x = normal(4, 128).requires_grad_()
    y = layer(x)
    assert len(alive) == 0
    y.sum().backward()
    assert len(alive) == 0
    assert most == [0, 0]  # one forward, one backward, never two at a time


def test_nothing_is_dequantized_backward_where_no_gradient_is_asked_for():
    layer, calls = quantized(), []
    layer.dequantize = lambda weight, dtype: calls.append(dtype) or dequantize_nf4(weight, dtype)
    layer.bias.requires_grad_()
    layer(normal(4, 128)).sum().backward()
    assert calls == [torch.float32]


def test_another_dequantizer_is_used_in_both_passes_and_goes_with_a_copy():
    layer = quantized()
    layer.dequantize = lambda weight, dtype: torch.ones(weight.shape, dtype=dtype)
    for one in (layer, copy.deepcopy(layer)):
        y, grad, _ = gradients(one, normal(4, 128), torch.ones(4, 96))
        torch.testing.assert_close(y, normal(4, 128).sum(1, keepdim=True) + layer.bias)
        assert torch.equal(grad, torch.full((4, 128), 96.0))
    assert NF4Linear.dequantize is dequantize_nf4


# Casts, moves, copies, files.


def tensors_of(layer):
    return {name: tensor.clone() for name, tensor in layer.named_buffers()}


def assert_same(layer, tensors):
    now = dict(layer.named_buffers())
    assert now.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert now[name].dtype == tensor.dtype
        assert torch.equal(now[name], tensor)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.float(),
        lambda m: m.double(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.half().float(),
        lambda m: nn.Sequential(m).half()[0],
        lambda m: copy.deepcopy(m).half(),
    ],
)
def test_no_cast_touches_what_is_stored(cast, double_quant):
    layer = quantized(double_quant=double_quant)
    before, x = tensors_of(layer), normal(4, 128)
    bias_free = layer(x) - layer.bias
    layer = cast(layer)
    assert_same(layer, before)
    torch.testing.assert_close(layer(x) - layer.bias.float(), bias_free, atol=1e-3, rtol=1e-3)


def test_a_cast_changes_the_bias_as_that_of_any_layer():
    assert quantized().half().bias.dtype == torch.float16
    layer = LoRALinear(quantized(), 4, alpha=8).to(torch.bfloat16)
    assert layer.lora_A.dtype == torch.bfloat16
    assert layer.base.scales.dtype == layer.base.offset.dtype == torch.float32


@pytest.mark.parametrize("double_quant", [True, False])
def test_it_moves_to_meta_and_back_to_what_is_loaded(double_quant):
    layer = quantized(double_quant=double_quant)
    state, y = layer.state_dict(), layer(normal(4, 128))
    away = copy.deepcopy(layer).to("meta", torch.float16)
    assert {(t.device.type, t.dtype) for t in away.buffers()} == {("meta", t.dtype) for t in layer.buffers()}
    assert away(torch.empty(5, 128, device="meta")).shape == (5, 96)
    back = away.to_empty(device="cpu")
    back.load_state_dict(state)
    torch.testing.assert_close(back(normal(4, 128)), y, atol=1e-3, rtol=1e-3)  # the bias was float16


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(64, 128), (33, 31)])
def test_a_meta_layer_has_the_shapes_of_a_real_one(shape, double_quant):
    real = quantized(*shape, double_quant=double_quant)
    with torch.device("meta"):
        empty = NF4Linear.from_linear(nn.Linear(*shape), double_quant=double_quant)
    for name, tensor in real.named_buffers():
        other = empty.get_buffer(name)
        assert (other.shape, other.dtype, other.is_meta) == (tensor.shape, tensor.dtype, True)
    empty.load_state_dict(real.state_dict(), assign=True)
    assert_same(empty, tensors_of(real))
    assert empty.bias is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_meta_layer_remembers_the_weights_dtype_as_a_real_one_does(dtype):
    for device in ("meta", "cpu"):
        layer = NF4Linear.from_linear(nn.Linear(64, 8, dtype=dtype, device=device))
        assert layer.weight.dtype == layer.dtype == dtype


@pytest.mark.parametrize("double_quant", [True, False])
def test_constants_do_not_hang_on_the_default_dtype(other_default_dtype, double_quant):
    layers = [
        NF4Linear.from_linear(nn.Linear(64, 8, dtype=torch.float32, device=device), double_quant=double_quant)
        for device in ("meta", "cpu")
    ]
    for layer in layers:
        assert {t.dtype for t in layer.buffers()} == {torch.uint8, torch.float32}


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_meta_layer_is_made_from_a_meta_weight_alone(double_quant):
    layer = NF4Linear.from_linear(nn.Linear(64, 8, device="meta"), double_quant=double_quant)
    assert all(t.is_meta for t in layer.buffers())
    with pytest.raises(ValueError, match="block_size must be an int of at least 1, got 0"):
        NF4Linear.from_linear(nn.Linear(64, 8, device="meta"), block_size=0)


def test_the_form_can_be_read_under_any_default_device():
    layer = quantized(64, 8)
    with torch.device("meta"):
        assert layer.get_extra_state().tolist() == [8, 64, 64, 256]


@pytest.mark.gpu
def test_it_moves_to_a_gpu_and_computes_the_same():
    layer = quantized()
    expected = gradients(layer, normal(4, 128), normal(4, 96, seed=1))
    there = copy.deepcopy(layer).cuda()
    assert {t.device.type for t in there.buffers()} == {"cuda"}
    y, grad, _ = gradients(there, normal(4, 128).cuda(), normal(4, 96, seed=1).cuda())
    torch.testing.assert_close(y.cpu(), expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(grad.cpu(), expected[1], atol=1e-4, rtol=1e-4)
    assert_same(there.half().cpu(), tensors_of(layer))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_file_holds_all_that_a_layer_built_the_same_way_needs(tmp_path, bias, double_quant):
    layer = quantized(bias=bias, double_quant=double_quant)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = quantized(bias=bias, double_quant=double_quant, seed=1)
    assert not torch.equal(other(normal(4, 128)), layer(normal(4, 128)))
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert_same(other, tensors_of(layer))
    assert torch.equal(other(normal(4, 128)), layer(normal(4, 128)))


def test_a_quantized_model_goes_through_a_file_into_a_skeleton(tmp_path):
    model = tiny_llama()
    quantize_base(model, compute_dtype=torch.float32)
    save_model(model, str(tmp_path / "model.safetensors"))
    other = tiny_llama()
    quantize_base(other)
    for parameter in other.parameters():
        parameter.data.zero_()
    missing, unexpected = load_model(other, str(tmp_path / "model.safetensors"))
    assert not missing
    assert not unexpected
    with torch.device("meta"):
        skeleton = tiny_llama()
        names = quantize_base(skeleton)
    state = load_file(tmp_path / "model.safetensors")
    skeleton.load_state_dict(state, strict=False, assign=True)
    for name in names:
        assert_same(skeleton.get_submodule(name), tensors_of(model.get_submodule(name)))
        assert_same(other.get_submodule(name), tensors_of(model.get_submodule(name)))


def refused(layer, state, match):
    """Loading raises, strict or not, says what, and leaves the layer as it is."""
    before = tensors_of(layer)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=match):
            layer.load_state_dict(state, strict=strict)
        assert_same(layer, before)


def test_a_state_dict_of_another_dtype_or_shape_is_refused():
    layer = quantized()
    other = quantized(seed=1)
    for name, dtype in (("packed", torch.float32), ("codes", torch.int8), ("scales", torch.bfloat16)):
        state = other.state_dict()
        refused(layer, state | {name: state[name].to(dtype)}, rf"{name} must be .*{dtype}.*never cast")
    refused(layer, other.state_dict() | {"packed": other.packed[:-1]}, r"packed must be .*\[6144\].*\[6143\]")
    transposed = quantized(96, 128, bias=False).state_dict()
    refused(layer, transposed, r"_extra_state must be \[96, 128, 64, 256\].* got \[128, 96, 64, 256\]: load")
    refused(layer, quantized(block_size=32).state_dict(), r"got \[96, 128, 32, 256\]")
    refused(layer, quantized(double_quant=False).state_dict(), r"got \[96, 128, 64, 0\]")
    refused(layer, other.state_dict() | {"codes": 3}, r"codes must be torch\.uint8 \[192\], got int")
    with pytest.raises(RuntimeError, match=r"Missing key.*packed(.|\n)*Unexpected key.*weight"):
        layer.load_state_dict(linear().state_dict())


@pytest.mark.parametrize("double_quant", [True, False])
def test_tensors_without_their_form_are_refused_before_any_is_loaded(double_quant):
    layer = quantized(bias=False, double_quant=double_quant)
    for state in (
        quantized(*shape, bias=False, double_quant=double_quant, seed=1).state_dict()
        for shape in ((128, 96), (96, 128))
    ):
        del state["_extra_state"]
        for part in (state, {"packed": state["packed"]}):
            refused(layer, part, r"_extra_state must be \[96, 128, 64, (256|0)\], .*got None: load the whole")


def test_a_state_dict_of_other_layers_leaves_this_one_alone():
    model = nn.Sequential(linear(), quantized(96, 128))
    before = tensors_of(model[1])
    missing, _ = model.load_state_dict({"0.weight": torch.zeros(96, 128)}, strict=False)
    assert "1.packed" in missing
    assert "1._extra_state" in missing
    assert not model[0].weight.any()
    assert_same(model[1], before)


@pytest.mark.parametrize(("double_quant", "name"), [(False, "absmax"), (True, "scales"), (True, "offset")])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_constants_that_are_not_finite_are_not_loaded(double_quant, name, wrong):
    layer, state = (
        quantized(double_quant=double_quant),
        quantized(double_quant=double_quant, seed=1).state_dict(),
    )
    state[name].view(-1)[-1] = wrong
    refused(layer, state, rf"{name} must be torch\.float32 .*, all finite, got {wrong}")


def test_the_name_of_the_layer_stands_in_the_message():
    model = nn.Sequential(linear(), quantized(96, 128))
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r"1\.scales must be torch.float32"):
        model.load_state_dict(state | {"1.scales": state["1.scales"].half()})


def test_it_survives_copies_and_torch_save():
    layer = quantized()
    twin = copy.deepcopy(layer)
    layer.packed.zero_()
    assert not torch.equal(twin.packed, layer.packed)
    buffer = io.BytesIO()
    torch.save(twin, buffer)
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=False), tensors_of(twin))


# A whole model.


def test_quantize_base_replaces_what_add_lora_would_adapt():
    model, reference = tiny_llama(), tiny_llama()
    names = quantize_base(model, compute_dtype=torch.float32)
    assert names == find_targets(reference, "all-linear") == add_lora(reference, "all-linear", 4, 8)
    assert len(names) == 14
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name in names:
        assert type(model.get_submodule(name)) is NF4Linear
        original = reference.get_submodule(name).base.weight
        assert torch.equal(
            dense(model.get_submodule(name)), dequantize_nf4(double_quantize(quantize_nf4(original)))
        )


def test_parameters_are_counted_as_what_they_stand_for():
    dense_model, model = tiny_llama(), tiny_llama()
    quantize_base(model)
    assert count_parameters(model).total == count_parameters(dense_model).total
    trained = add_lora(model, "all-linear", 4, 8)
    add_lora(dense_model, "all-linear", 4, 8)
    assert count_parameters(model) == count_parameters(dense_model)
    assert len(trained) == 14


def test_options_go_to_the_layers_and_modes_stay():
    model = nn.Sequential(linear(), linear(96, 64), linear(64, 32))
    model[0].eval()
    assert quantize_base(model, ["0", "1"], False, torch.float16, 32) == ["0", "1"]
    layer = model[0]
    assert (layer.block_size, layer.group_size, layer.compute_dtype) == (32, None, torch.float16)
    assert (layer.training, model[1].training) == (False, True)
    assert type(model[2]) is nn.Linear
    assert layer.bias is not None
    assert not layer.bias.requires_grad


def test_it_trains_the_adapter_and_nothing_else():
    model = tiny_llama()
    quantize_base(model, compute_dtype=torch.float32)
    add_lora(model, "all-linear", 4, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(12):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == {name for name in before if "lora_" in name}


def test_peft_reads_our_adapter_over_its_own_quantized_base_and_back(tmp_path):
    ours, theirs = tiny_llama(), tiny_llama()
    names = quantize_base(ours, double_quant=False, compute_dtype=torch.float32)
    add_lora(ours, "all-linear", 4, 8)
    torch.manual_seed(1)
    for name in names:
        nn.init.normal_(ours.get_submodule(name).lora_B, std=0.3)
    save_adapter(ours, tmp_path)
    for name in names:
        theirs.set_submodule(name, to_bitsandbytes(theirs.get_submodule(name), False, torch.float32))
    theirs.is_loaded_in_4bit = True
    loaded = PeftModel.from_pretrained(theirs, tmp_path).eval()
    with torch.no_grad():
        expected = ours(TOKENS).logits
        torch.testing.assert_close(loaded(TOKENS).logits, expected)
        fresh = tiny_llama()
        quantize_base(fresh, double_quant=False, compute_dtype=torch.float32)
        assert (fresh(TOKENS).logits - expected).abs().max() > 0.1
        load_adapter(fresh, tmp_path)
        assert torch.equal(fresh(TOKENS).logits, expected)


def test_merging_into_four_bits_is_refused():
    model = tiny_llama()
    quantize_base(model)
    add_lora(model, ["q_proj"], 4, 8)
    with pytest.raises(TypeError, match=r"q_proj: merge needs an nn.Linear .* got NF4Linear"):
        merge_lora(model)
    with pytest.raises(TypeError, match="got NF4Linear"):
        merge(LoRALinear(quantized(), 4, 8))


# What is refused.


def assert_untouched(model, call, error, match):
    """The call raises, and every module and every weight is as before."""
    modules, state = dict(model.named_modules()), {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(error, match=match):
        call(model)
    assert dict(model.named_modules()) == modules
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(7), state[name].nan_to_num(7))


def test_a_layer_with_two_names_stays_one_layer():
    model = nn.Sequential(linear(64, 64), nn.Sequential(linear(64, 64)), linear(64, 64))
    model.append(model[0]).append(model[1])
    x = normal(4, 64)
    assert quantize_base(model, ["0"], compute_dtype=torch.float32) == ["0", "1.0"]
    assert [type(layer) for layer in model[::2]] == [NF4Linear, nn.Linear, nn.Sequential]
    assert model[3] is model[0]
    assert model[4][0] is model[1][0]
    one, inner = model[0], model[1][0]
    assert (type(one), type(inner)) == (NF4Linear, NF4Linear)
    torch.testing.assert_close(model(x), inner(one(model[2](inner(one(x))))))
    assert add_lora(model, ["0"], 4, 8) == ["0", "1.0"]
    assert model[0].base is one  # as over any base
    assert model[3] is model[0]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_hooks_are_refused_as_they_would_be_lost(device):
    ways = {
        "_forward_hooks": lambda m: m.register_forward_hook(lambda module, x, y: 2 * y),
        "_forward_pre_hooks": lambda m: m.register_forward_pre_hook(lambda module, x: x),
        "_backward_hooks": lambda m: m.register_full_backward_hook(lambda module, gx, gy: None),
        "_backward_pre_hooks": lambda m: m.register_full_backward_pre_hook(lambda module, gy: None),
        "_state_dict_hooks": lambda m: m._register_state_dict_hook(lambda *arguments: None),
    }
    for what, register in ways.items():
        model = nn.Sequential(linear(), linear(96, 64)).to(device)
        handle = register(model[1])
        if device == "cpu":
            match = rf"1: this Linear carries {what}, which an NF4Linear would lose: remove them"
            assert_untouched(model, quantize_base, ValueError, match)
        with pytest.raises(ValueError, match=what):
            NF4Linear.from_linear(model[1])
        handle.remove()
        assert quantize_base(model) == ["0", "1"]


def test_hooks_of_accelerate_are_refused_until_they_are_removed():
    model = nn.Sequential(linear(), linear(96, 64))
    add_hook_to_module(model[1], AlignDevicesHook(execution_device="cpu"))
    match = r"1: this Linear carries a forward of its own, .*accelerate's by remove_hook_from_module"
    assert_untouched(model, quantize_base, ValueError, match)
    remove_hook_from_module(model, recurse=True)
    assert quantize_base(model) == ["0", "1"]


def test_a_bias_that_is_not_finite_leaves_the_model_as_it_was():
    model = nn.Sequential(linear(), linear(96, 64))
    model[1].bias.data[5] = float("nan")
    match = r"1: its bias: 1 of 64 numbers are not finite, the first is nan at \[5\]"
    assert_untouched(model, quantize_base, ValueError, match)
    with pytest.raises(ValueError, match="its bias: 1 of 64"):
        NF4Linear.from_linear(model[1])


def test_weights_that_are_not_finite_leave_the_model_as_it_was():
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = float("nan")
    match = r"layers\.1\.mlp\.down_proj: 1 of 8192 numbers are not finite.* \[3, 5\]"
    assert_untouched(model, quantize_base, ValueError, match)


def test_quantizing_twice_is_refused():
    model = tiny_llama()
    quantize_base(model, ["q_proj"])
    assert_untouched(model, quantize_base, ValueError, r"q_proj: .*NF4Linear is quantized already")
    theirs = nn.Sequential(linear(), to_bitsandbytes(linear(96, 64), True, torch.float32))
    assert_untouched(theirs, quantize_base, ValueError, r"1: .*Linear4bit is quantized already")


def test_adapters_first_is_refused_and_so_is_no_target():
    model = tiny_llama()
    add_lora(model, ["q_proj"], 4, 8)
    assert_untouched(model, quantize_base, ValueError, "quantize its base first, then add_lora")
    model = tiny_llama()
    assert_untouched(model, lambda m: quantize_base(m, ["query"]), ValueError, "no linear layer .*'query'")
    assert_untouched(
        model, lambda m: quantize_base(m, block_size=0), ValueError, "q_proj: block_size must be"
    )


class Doubled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("layer", "got"),
    [
        (linear(dtype=torch.float64), "float64"),
        (nn.utils.parametrizations.weight_norm(linear()), "ParametrizedLinear"),
        (bnb.nn.Linear8bitLt(64, 64), "Linear8bitLt"),
        (Doubled(8, 8), "Doubled"),
        (nn.Conv1d(4, 4, 1), "Conv1d"),
        (nn.Bilinear(4, 4, 4), "Bilinear"),
        (None, "NoneType"),
    ],
)
def test_other_layers_are_refused_by_name(layer, got):
    with pytest.raises(TypeError, match=got):
        NF4Linear.from_linear(layer)


def test_a_layer_is_built_of_parts_that_fit():
    weight = quantize_nf4(normal(64, 128))
    for wrong in (normal(64, 128), NF4Weight(weight.packed, "absmax", weight.shape, weight.dtype, 64)):
        with pytest.raises(TypeError, match="takes what quantize_nf4 or double_quantize returns"):
            NF4Linear(wrong)
    for dtype in (torch.int8, "bfloat16", None):
        with pytest.raises(TypeError, match="compute_dtype must be a float dtype"):
            NF4Linear(weight, compute_dtype=dtype)
    with pytest.raises(ValueError, match=r"bias must have shape \[64\], got \[128\]"):
        NF4Linear(weight, torch.zeros(128))
    with pytest.raises(ValueError, match=r"\[out, in\], got shape \[8192\]"):
        NF4Linear(quantize_nf4(normal(8192)))
    with pytest.raises(ValueError, match="block_size must be an int of at least 1, got 0"):
        NF4Linear(replace(weight, block_size=0))


@pytest.mark.parametrize(
    ("double_quant", "name", "change", "got"),
    [
        (False, "packed", lambda t: t[:-1], r"torch\.uint8 \[16383\]"),
        (False, "packed", lambda t: t.view(128, 128), r"torch\.uint8 \[128, 128\]"),
        (False, "packed", lambda t: t.float(), r"torch\.float32 \[16384\]"),
        (False, "absmax", lambda t: t[1:], r"torch\.float32 \[511\]"),
        (False, "absmax", lambda t: t.bfloat16(), r"torch\.bfloat16 \[512\]"),
        (False, "absmax", lambda t: t * float("nan"), "nan"),
        (True, "codes", lambda t: t.short(), r"torch\.int16 \[512\]"),
        (True, "codes", lambda t: t[1:], r"torch\.uint8 \[511\]"),
        (True, "scales", lambda t: t[1:], r"torch\.float32 \[1\]"),
        (True, "scales", lambda t: t * float("inf"), "inf"),
        (True, "offset", lambda t: t[None], r"torch\.float32 \[1\]"),
        (True, "offset", lambda t: t.item(), "float"),
    ],
)
def test_parts_of_another_dtype_or_length_are_refused(double_quant, name, change, got):
    weight = quantize_nf4(normal(256, 128))
    weight = double_quantize(weight) if double_quant else weight
    absmax = weight.absmax
    if name in ("packed", "absmax"):
        wrong = replace(weight, **{name: change(getattr(weight, name))})
    else:
        wrong = replace(weight, absmax=replace(absmax, **{name: change(getattr(absmax, name))}))
    with pytest.raises(ValueError, match=rf"^{name} must be torch\.(uint8|float32) \[.*\].*, got {got}"):
        NF4Linear(wrong)
    NF4Linear(weight)


@pytest.mark.parametrize("group_size", [0, -1, 2.0, None])
def test_a_group_of_no_size_is_refused(group_size):
    weight = double_quantize(quantize_nf4(normal(64, 128)))
    with pytest.raises(ValueError, match=f"group_size must be an int of at least 1, got {group_size}"):
        NF4Linear(replace(weight, absmax=replace(weight.absmax, group_size=group_size)))


def test_what_is_beyond_the_compute_dtype_becomes_inf_as_in_a_cast():
    base = linear(bias=False)
    base.weight.data[3, 5] = 1e5
    y = NF4Linear.from_linear(base, double_quant=False, compute_dtype=torch.float16)(torch.ones(128))
    assert y.isinf().nonzero().tolist() == base.weight.half().isinf().any(1).nonzero().tolist() == [[3]]
    assert NF4Linear.from_linear(base, compute_dtype=torch.bfloat16)(torch.ones(128)).isfinite().all()


def test_an_input_that_is_no_float_or_does_not_fit_is_refused():
    with pytest.raises(TypeError, match=r"takes floats, got torch\.int64"):
        quantized()(torch.ones(4, 128, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        quantized()(normal(4, 64))


def test_a_printed_layer_says_what_it_is():
    text = repr(LoRALinear(quantized(), 4, alpha=8))
    assert "in_features=128, out_features=96, bias=True, block_size=64, double quantization" in text
    assert "plain absmax, torch.bfloat16" in repr(NF4Linear(quantize_nf4(normal(64, 128))))
    assert qlora.NF4Linear.__doc__.startswith("y = x Ŵᵀ + bias")


# A layer is loaded whole, or not at all.


def spoiled():
    """(what is wrong, a function that makes a good state dict wrong, what is said of it)."""
    nan = torch.tensor(float("nan"))
    ways = {
        "a bias of another shape": (lambda s: s.update(bias=torch.zeros(3)), "size mismatch for bias"),
        "a bias of 8 bits": (
            lambda s: s.update(bias=s["bias"].to(torch.float8_e4m3fn)),
            r"bias must be floats \[96\], got torch.float8",
        ),
        "the form is a list of tensors": (
            lambda s: s.update(_extra_state=[s["_extra_state"]] * 4),
            "_extra_state must be",
        ),
        "a bias that is none": (lambda s: s.update(bias=3.0), r"bias must be floats \[96\], got float"),
        "a bias of ints": (lambda s: s.update(bias=torch.ones(96, dtype=torch.int64)), "int64"),
        "a NaN in the bias": (lambda s: s.update(bias=s["bias"] * nan), "all finite"),
        "a bias too large": (lambda s: s.update(bias=s["bias"].double() + 1e39), "all finite"),
        "no bias": (lambda s: s.pop("bias"), r"Missing key\(s\) \['bias'\]"),
        "no scales": (lambda s: s.pop("scales"), r"Missing key\(s\) \['scales'\]"),
        "no packed": (lambda s: s.pop("packed"), r"Missing key\(s\) \['packed'\]"),
        "the bias alone": (lambda s: [s.pop(n) for n in list(s) if n != "bias"], "Missing key"),
        "the form alone": (lambda s: [s.pop(n) for n in list(s) if n != "_extra_state"], "Missing key"),
        "the form is None": (lambda s: s.update(_extra_state=None), "got None"),
        "the form is text": (lambda s: s.update(_extra_state="x" * 200), "got x"),
        "the form is meta": (lambda s: s.update(_extra_state=s["_extra_state"].to("meta")), "_extra_state"),
        "the form is long": (
            lambda s: s.update(_extra_state=s["_extra_state"].expand(2**40, 4)),
            "_extra_state",
        ),
        "the form is an array": (lambda s: s.update(_extra_state=s["_extra_state"].numpy()), "_extra_state"),
        "the form is sparse": (
            lambda s: s.update(_extra_state=s["_extra_state"].to_sparse()),
            "_extra_state",
        ),
        "a part on meta": (lambda s: s.update(packed=s["packed"].to("meta")), "no numbers"),
        "a part is sparse": (
            lambda s: s.update(scales=s["scales"].to_sparse()),
            "sparse_coo: pass its .to_dense",
        ),
        "the bias is sparse": (lambda s: s.update(bias=s["bias"].to_sparse()), "sparse_coo"),
    }
    return [pytest.param(*way, id=name) for name, way in ways.items()]


@pytest.mark.parametrize(("spoil", "said"), spoiled())
@pytest.mark.parametrize("strict", [True, False])
def test_a_layer_is_loaded_whole_or_not_at_all(spoil, said, strict):
    layer, state = quantized(), quantized(seed=1).state_dict()
    before, bias = tensors_of(layer), layer.bias.clone()
    spoil(state)
    with pytest.raises(RuntimeError, match=said):
        layer.load_state_dict(state, strict=strict)
    assert_same(layer, before)
    assert torch.equal(layer.bias, bias)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("key", ["weight", "absmax", "bias", "packed.more"])
def test_stray_keys_are_refused(key, assign, strict):
    layer, state = quantized(bias=False), quantized(bias=False, seed=1).state_dict()
    before = tensors_of(layer)
    with pytest.raises(RuntimeError, match=rf"Unexpected key\(s\) \['{key}'\]"):
        layer.load_state_dict(state | {key: torch.zeros(96)}, strict=strict, assign=assign)
    assert_same(layer, before)


def test_assigning_takes_meta_tensors_and_a_bias_of_another_float_dtype():
    layer, state = quantized(), quantized(seed=1).state_dict()
    layer.load_state_dict({n: t if n[0] == "_" else t.to("meta") for n, t in state.items()}, assign=True)
    assert all(t.is_meta for t in layer.buffers())
    layer.load_state_dict(state | {"bias": state["bias"].double()}, assign=True)
    assert layer.bias.dtype == torch.float64
    layer.load_state_dict(state | {"bias": state["bias"].half()})
    assert layer.bias.dtype == torch.float64


def test_what_is_assigned_is_frozen_and_on_one_device():
    layer, state = quantized(), quantized(seed=1).state_dict()
    before = tensors_of(layer)
    with pytest.raises(RuntimeError, match=r"cannot be assigned tensors of \['cpu', 'meta'\]"):
        layer.load_state_dict(state | {"bias": state["bias"].to("meta")}, assign=True)
    assert_same(layer, before)
    trained = {name: t.clone().requires_grad_(t.is_floating_point()) for name, t in state.items()}
    layer.load_state_dict(trained | {"packed": nn.Parameter(state["packed"], False)}, assign=True)
    assert not any(tensor.requires_grad for tensor in [*layer.buffers(), *layer.parameters()])
    assert [*dict(layer.named_buffers())] == [*layer.names]
    assert_same(layer, tensors_of(quantized(seed=1)))


def test_of_many_layers_each_is_whole():
    """One is wrong: it stays as it is, and the error names it; the others have been loaded."""
    model, other = (nn.Sequential(quantized(seed=s), quantized(96, 64, seed=s)) for s in (0, 1))
    before, state = tensors_of(model[1]), other.state_dict()
    del state["1.codes"]
    with pytest.raises(RuntimeError, match=r"1\. comes whole or not at all: Missing key\(s\) \['codes'\]"):
        model.load_state_dict(state)
    assert_same(model[1], before)
    assert_same(model[0], tensors_of(other[0]))


# Tracers, and tensors without numbers.


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own, on tracing
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_quantized_model_compiles_whole(backend, double_quant):
    torch._dynamo.reset()
    model = nn.Sequential(linear(), linear(96, 96), linear(96, 32))
    quantize_base(model, ["0", "1", "2"], double_quant, torch.float32)
    add_lora(model, ["0", "1", "2"], 4, 8)
    x, upstream = normal(4, 128), normal(4, 32, seed=1)
    plain = gradients(model, x, upstream)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    y, grad, own = gradients(compiled, x, upstream)
    torch.testing.assert_close((y, grad), plain[:2], rtol=1e-5, atol=1e-5)
    for name, value in plain[2].items():
        torch.testing.assert_close(own[f"_orig_mod.{name}"], value, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain[0], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_graph_has_an_operator_a_weight_however_many_pieces_it_has(monkeypatch):
    from lora2qlora import nf4

    monkeypatch.setattr(nf4.weight, "PIECE", 128)
    layer, graphs = quantized(), []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    torch._dynamo.reset()
    torch.compile(layer, backend=backend, fullgraph=True)(normal(4, 128))
    assert [sum("lora2qlora" in name for name in graph) for graph in graphs] == [2]  # the weight, its absmax
    assert len(graphs[0]) < 20


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_step_on_fake_tensors_has_the_shapes_of_a_real_one(double_quant, fast):
    from lora2qlora.fast import use_fast

    def step(tokens):
        model = tiny_llama()
        quantize_base(model, double_quant=double_quant)
        add_lora(model, "all-linear", 4, 8)
        if fast:
            use_fast(model)
        model(input_ids=tokens, labels=tokens).loss.backward()
        tensors = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return {n: (t.shape, t.dtype) for n, t in {**tensors, **dict(model.named_buffers())}.items()}

    real = step(TOKENS)
    with FakeTensorMode():
        assert step(torch.zeros(2, 10, dtype=torch.int64)) == real
    assert step(TOKENS) == real
    assert sum("lora_B" in name for name in real) == 14


def test_of_a_large_weight_without_numbers_two_pieces_are_worked_on():
    """More would take minutes for a model and change no shape, and no peak."""
    calls = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            calls.append(function)
            return function(*arguments, **(options or {}))

    with FakeTensorMode():
        layer = NF4Linear.from_linear(nn.Linear(4096, 1024, bias=False), compute_dtype=torch.float32)
        with Count():
            dequantize_nf4(layer.weight)
    assert calls.count(torch.ops.aten.copy_.default) == 2


def test_quantizing_records_no_graph():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        for double_quant in (True, False):
            layer = NF4Linear.from_linear(linear(), double_quant=double_quant)
            quantize_base(nn.Sequential(linear()), ["0"], double_quant)
            assert not any(t.requires_grad for t in layer.buffers())
    assert not saved


# What stays at full size, and what is elsewhere.


def tiny_mixture(kind, **more):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes | more)))


MIXTURES = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 64, "head_dim": 16},
    "olmoe": {"num_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16},
    "granitemoe": {"num_local_experts": 4},
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_that_stay_at_full_size_are_named(kind):
    model = tiny_mixture(kind, **MIXTURES[kind])
    parameters = dict(model.named_parameters())
    experts = sum(p.nbytes for n, p in parameters.items() if "moe" in n or "experts" in n if p.ndim == 3)
    share = experts / sum(p.nbytes for p in parameters.values())
    assert share > 0.3
    with pytest.warns(UserWarning, match=r"stay at full size: model\.layers\.\*\.") as said:
        quantize_base(model)
    text = str(said[0].message)
    assert abs(int(re.match(r"(\d+)%", text)[1]) / 100 - share) < 0.04  # routers may be among them
    assert "bitsandbytes leaves them in 16 bits too" in text
    assert said[0].filename == __file__


def test_what_stays_is_added_up_over_layers():
    """Sixty layers whose experts are each below a hundredth."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.experts = nn.Linear(32, 32), nn.Parameter(torch.zeros(2, 4, 4))

    model = nn.ModuleList([Block() for _ in range(60)])
    assert left_dense(model, [f"{i}.up" for i in range(60)]) == {
        "*.experts": 60 * 32 / (60 * (32 * 33 + 32)),
    }


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["bert", "vit", "llama"])
def test_nothing_is_said_of_plain_models(kind):
    from transformers import BertConfig, BertModel, ViTConfig, ViTModel

    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    if kind == "bert":
        model = BertModel(BertConfig(vocab_size=64, **sizes))
    elif kind == "vit":
        model = ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes))
    else:
        model = tiny_llama()
    assert len(quantize_base(model)) >= 12


def test_a_warning_made_an_error_leaves_the_model_as_it_was():
    model = tiny_mixture("mixtral", num_local_experts=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_untouched(model, quantize_base, UserWarning, "stay at full size")


def test_an_offloaded_model_is_refused_wherever_the_hook_is():
    for where in ("", "model.layers.0", "model.layers.0.mlp"):
        model = tiny_llama()
        module = model.get_submodule(where)
        hook = AlignDevicesHook("cpu", offload=True, place_submodules=True, weights_map=module.state_dict())
        add_hook_to_module(module, SequentialHook(hook) if where else hook)
        with pytest.raises(ValueError, match=r"is offloaded: a hook of accelerate on Llama\w+"):
            quantize_base(model)
        assert not any(isinstance(m, NF4Linear) for m in model.modules())


def test_wrappers_that_took_note_of_parameters_are_refused_and_others_work():
    class DistributedDataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    wrapped = DistributedDataParallel(tiny_llama())
    assert_untouched(
        wrapped, lambda m: quantize_base(m, ["q_proj"]), ValueError, "wrapped in DistributedDataParallel"
    )
    for wrap in (nn.DataParallel, lambda m: torch.compile(m, backend="eager")):
        model, plain = tiny_llama(), tiny_llama()
        quantize_base(plain, compute_dtype=torch.float32)
        outer = wrap(model)
        names = quantize_base(outer, compute_dtype=torch.float32)
        assert len(names) == 14
        assert all(type(outer.get_submodule(name)) is NF4Linear for name in names)
        with torch.no_grad():
            assert torch.equal(model(TOKENS).logits, plain(TOKENS).logits)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_model_compiled_before_it_is_quantized_computes_the_new_weights():
    from lora2qlora.fast import use_fast

    torch._dynamo.reset()
    model, x = nn.Sequential(linear(), linear(96, 64)), normal(4, 128)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        dense_y = compiled(x)
        quantize_base(compiled, ["0", "1"], compute_dtype=torch.float32)
        expected = model(x)
        assert not torch.equal(expected, dense_y)
        assert torch.equal(compiled(x), expected)
        use_fast(compiled)
        assert torch.equal(compiled(x), expected)
        assert storage_bytes(compiled) == storage_bytes(model) == storage_bytes(nn.DataParallel(model))


def test_a_failure_midway_says_how_far_it_came(monkeypatch):
    model = nn.Sequential(linear(), linear(96, 64))

    def fails_later(weight, block_size):
        if weight.shape == (64, 96):
            raise MemoryError("out of memory")
        return quantize_nf4(weight, block_size)

    monkeypatch.setattr("lora2qlora.qlora.layer.quantize_nf4", fails_later)
    with pytest.raises(MemoryError) as caught:
        quantize_base(model, ["0", "1"])
    assert caught.value.__notes__ == ["1 of 2 layers are in NF4 already: load the model anew"]
    assert [type(layer) for layer in model] == [NF4Linear, nn.Linear]


def test_a_weight_that_would_come_back_as_inf_is_found_before_the_first_is_replaced():
    model = nn.Sequential(linear(128, 64), linear(64, 3))
    model[1].weight.data[:] = torch.tensor([0.0, *[torch.finfo(torch.float32).max] * 2])[:, None]
    assert_untouched(model, lambda m: quantize_base(m, ["0", "1"]), ValueError, "1: .*come back as inf")
    assert quantize_base(model, ["0", "1"], double_quant=False) == ["0", "1"]


def test_a_copy_of_a_fast_layer_stands_by_itself():
    from lora2qlora.fast import dequantize_to_scratch, use_fast

    layer = quantized()
    use_fast(layer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.dequantize is dequantize_to_scratch
        expected = twin(normal(4, 128))
        layer.packed.zero_()
        assert torch.equal(twin(normal(4, 128)), expected)
        layer.load_state_dict(twin.state_dict())


def test_a_weight_answers_what_models_ask_of_it_without_its_numbers():
    layer, base = quantized(dtype=torch.bfloat16), linear(dtype=torch.bfloat16)
    ours, theirs = layer.weight, base.weight.detach()
    for name in ("dtype", "shape", "device", "ndim", "requires_grad", "layout"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert (ours.size(), ours.size(0), ours.numel()) == (theirs.size(), theirs.size(0), theirs.numel())
    assert layer.bias.shape == base.bias.shape
