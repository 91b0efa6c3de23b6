"""double_quantization: the dynamic map, nearest codes where bitsandbytes rounds first, and the bytes kept."""

import math
import re

import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2qlora.double_quantization import (
    QuantizedAbsmax,
    bits_per_parameter,
    dequantize_absmax,
    double_quantize,
    dynamic_codebook,
    quantize_absmax,
)
from lora2qlora.nf4 import dequantize_nf4, quantize_nf4
from test_blockwise import nearest
from torch._subclasses.fake_tensor import FakeTensorMode

MAP = bnb.create_dynamic_map()
seeds = st.integers(0, 2**16)


def random_absmax(kind, count, seed=0):
    """Absmax values [count]: of blocks of 64 normal weights, or spread in other ways."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "normal weights":
        return 0.02 * torch.randn(count, 64, generator=generator).abs().amax(dim=1)
    if kind == "uniform":
        return torch.rand(count, generator=generator)
    return torch.randn(count, generator=generator).exp()  # over decades


KINDS = ["normal weights", "uniform", "log-normal"]


def scaled(absmax, q):
    """What is rounded to the map, in float32: whole groups by the reciprocal, a partial one by division."""
    centred, whole = absmax - q.offset, len(absmax) // q.group_size
    scales = q.scales.clamp(min=1e-38).repeat_interleave(q.group_size)[: len(absmax)]
    multiplied = centred * (1 / scales)
    return torch.where(torch.arange(len(absmax)) < whole * q.group_size, multiplied, centred / scales)


# The dynamic map.


def test_the_map_is_bitsandbytes_to_the_last_bit():
    codebook = dynamic_codebook()
    assert torch.equal(codebook.view(torch.int32), MAP.view(torch.int32))
    assert not codebook[127].signbit()


def test_the_map_does_not_hang_on_the_default_dtype(other_default_dtype):
    codebook = dynamic_codebook()
    assert codebook.dtype == torch.float32
    assert torch.equal(codebook, MAP)


def test_the_map_is_what_its_docstring_says():
    codebook = dynamic_codebook().double().tolist()
    expected = [0.0, 1.0]
    for decade in range(7):
        parts = 2**decade
        for part in range(parts):
            middle = (0.1 + 0.9 * (part + 0.5) / parts) * 10.0 ** (decade - 6)
            expected += [middle, -middle]
    np.testing.assert_allclose(codebook, sorted(expected), rtol=1e-6, atol=1e-12)
    assert len(codebook) == 256
    assert -1 not in codebook


# Codes.


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 700), st.integers(1, 300), seeds)
def test_every_code_is_the_nearest_by_brute_force(kind, count, group_size, seed):
    absmax = random_absmax(kind, count, seed)
    before = absmax.clone()
    q = quantize_absmax(absmax, group_size)
    assert (q.codes.dtype, q.scales.dtype, q.offset.dtype) == (torch.uint8, torch.float32, torch.float32)
    assert (q.codes.shape, q.scales.shape) == ((count,), (math.ceil(count / group_size),))
    assert q.group_size == group_size
    assert torch.equal(absmax, before)
    if not count:
        assert q.offset == 0
        assert q.dequantize().shape == (0,)
        return
    assert torch.equal(q.offset, absmax.mean())
    centred = torch.nn.functional.pad(absmax - q.offset, (0, -count % group_size))
    assert torch.equal(q.scales, centred.view(-1, group_size).abs().amax(dim=1))
    np.testing.assert_array_equal(q.codes.numpy(), nearest(scaled(absmax, q).numpy(), dynamic_codebook()))
    by_hand = dynamic_codebook()[q.codes.int()] * q.scales.repeat_interleave(group_size)[:count] + q.offset
    assert torch.equal(q.dequantize(), by_hand)
    assert torch.equal(dequantize_absmax(q), by_hand)


@pytest.mark.parametrize("kind", KINDS)
def test_no_absmax_is_off_by_more_than_half_a_step_of_the_map(kind):
    """The widest gap is 0.0141, between the largest codes, but for -1, which the map does not have."""
    absmax = random_absmax(kind, 100_000)
    q, codebook = quantize_absmax(absmax), dynamic_codebook().double()
    scale = q.scales.double().repeat_interleave(256)[: len(absmax)]
    error = (q.dequantize().double() - absmax.double()).abs() / scale
    assert codebook.diff().max().item() == pytest.approx(0.0140625, rel=1e-5)
    assert 1 + codebook[0].item() == pytest.approx(0.00703125, rel=1e-5)
    # float32 rounds the centred value, the scaled one, and the sum with the offset
    rounding = 2**-22 * (1 + q.offset.double() / scale)
    assert (error <= 0.0140625 / 2 * (1 + 1e-5) + rounding).all()
    assert error.max() > 0.0069


# Against bitsandbytes' kernel.


def kernel_codes(absmax, group_size=256):
    """bitsandbytes' (codes, scales) of the same centred values, by its nested quantization."""
    codes, state = bnb.quantize_blockwise(absmax - absmax.mean(), blocksize=group_size)
    return codes.int(), state


@pytest.mark.parametrize(("kind", "least", "most"), [(KINDS[0], 0.0012, 0.002), (KINDS[1], 0.0005, 0.0015)])
def test_the_kernel_differs_in_few_codes_beside_a_midpoint(kind, least, most):
    """By one step where the map's steps are wider than 2^-15, and never by more than that distance."""
    absmax = random_absmax(kind, 2**18)
    q, codebook = quantize_absmax(absmax), dynamic_codebook().double()
    codes, state = kernel_codes(absmax)
    assert torch.equal(q.scales, state.absmax)
    differ = codes != q.codes.int()
    assert least < differ.float().mean() < most
    ours, theirs = q.codes[differ].int(), codes[differ]
    x = scaled(absmax, q)[differ].double()
    farther = (x - codebook[theirs]).abs() - (x - codebook[ours]).abs()
    assert (farther >= -(2**-24)).all()  # twice the rounding of a midpoint to float32
    assert (farther < 2**-15).all()
    wide = x.abs() > 1.2e-4
    assert wide.float().mean() > 0.9
    assert ((ours - theirs).abs()[wide] == 1).all()
    midpoint = (codebook[ours] + codebook[theirs]) / 2
    assert ((x - midpoint).abs()[wide] < 2**-16 * (1 + 1e-4)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_is_the_nearest_code_of_one_of_65536_numbers(kind):
    """All its codes follow from this. Fails once bitsandbytes searches another way: then mend the docs."""
    absmax = random_absmax(kind, 2**18, seed=1)
    codes, _ = kernel_codes(absmax)
    q, codebook = quantize_absmax(absmax), dynamic_codebook().double()
    steps = (scaled(absmax, q) + 1) * (65535 / 2)
    rounded = (steps + 0.5).floor().double() / (65535 / 2) - 1
    assert torch.equal(torch.bucketize(rounded, (codebook[:-1] + codebook[1:]) / 2).int(), codes)


@pytest.mark.parametrize("count", [2, 5, 255, 256, 257, 1000])
def test_partial_groups_have_bitsandbytes_scales_and_neighbouring_codes(count):
    for seed in range(20):
        absmax = random_absmax("normal weights", count, seed)
        q = quantize_absmax(absmax)
        codes, state = kernel_codes(absmax)
        assert torch.equal(q.scales, state.absmax)
        values = dynamic_codebook()
        assert ((values[codes] - values[q.codes.int()]).abs() < 0.0141).all()  # neighbours at most


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_scales_dequantize_as_bitsandbytes_does(kind):
    absmax = random_absmax(kind, 1000)
    codes, state = kernel_codes(absmax)
    theirs = bnb.dequantize_blockwise(codes.to(torch.uint8), state) + absmax.mean()
    q = QuantizedAbsmax(codes.to(torch.uint8), state.absmax, absmax.mean(), 256)
    assert torch.equal(q.dequantize(), theirs)


@pytest.mark.parametrize("value", [0.0, 1e-40, 3e-9, 0.7, 1.0, 3e38])
def test_one_block_alone_comes_back_exactly(value):
    """Its mean is itself, and the scale 0, so that the code bitsandbytes makes of 0 / 0 has no effect."""
    absmax = torch.tensor([value])
    q = quantize_absmax(absmax)
    assert q.offset == absmax
    assert q.scales.tolist() == [0]
    assert q.codes.tolist() == [127]  # the code of 0
    assert torch.equal(q.dequantize(), absmax)
    codes, state = kernel_codes(absmax)
    assert torch.equal(bnb.dequantize_blockwise(codes.to(torch.uint8), state) + absmax.mean(), absmax)


@pytest.mark.parametrize("count", [2, 64, 300])
def test_equal_blocks_come_back_exactly(count):
    absmax = torch.full((count,), 0.75)
    assert torch.equal(quantize_absmax(absmax).dequantize(), absmax)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 600), st.integers(-30, 30), seeds)
def test_a_power_of_two_scales_all_constants_and_no_code(kind, count, exponent, seed):
    absmax = random_absmax(kind, count, seed)
    q, scaled_q = quantize_absmax(absmax), quantize_absmax(absmax * 2.0**exponent)
    assert torch.equal(q.codes, scaled_q.codes)
    assert torch.equal(q.scales * 2.0**exponent, scaled_q.scales)
    assert torch.equal(q.dequantize() * 2.0**exponent, scaled_q.dequantize())


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.integers(2, 600), seeds)
def test_within_a_group_order_is_kept(kind, count, seed):
    absmax = random_absmax(kind, count, seed)
    order = absmax.argsort()
    assert (quantize_absmax(absmax, group_size=count).dequantize()[order].diff() >= 0).all()


# Weights.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_doubly_quantized_weight_keeps_its_codes(dtype):
    w = torch.randn(300, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain = quantize_nf4(w)
    q = double_quantize(plain)
    assert q.packed is plain.packed
    assert (q.shape, q.dtype, q.block_size) == (plain.shape, plain.dtype, plain.block_size)
    assert isinstance(q.absmax, QuantizedAbsmax)
    assert isinstance(plain.absmax, torch.Tensor)  # the one before is as it was
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    assert torch.equal(q.packed, packed.view(-1))
    assert torch.equal(q.absmax.offset, state.offset)
    assert torch.equal(q.absmax.scales, state.state2.absmax)
    # With bitsandbytes' own codes of the absmax, the weights are bitsandbytes' to the last bit.
    theirs = QuantizedAbsmax(state.absmax, state.state2.absmax, state.offset, state.state2.blocksize)
    theirs = type(q)(q.packed, theirs, q.shape, q.dtype, q.block_size)
    assert torch.equal(dequantize_nf4(theirs), bnb.dequantize_4bit(packed, state))
    # With ours, the same but for the few blocks whose code of the absmax differs.
    same = (q.absmax.codes == state.absmax).repeat_interleave(64)
    ours = dequantize_nf4(q).view(-1)
    assert torch.equal(ours[same], dequantize_nf4(theirs).view(-1)[same])
    assert same.float().mean() > 0.99


def test_the_absmax_costs_the_weight_little():
    w = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    plain = quantize_nf4(w)
    once, twice = dequantize_nf4(plain), dequantize_nf4(double_quantize(plain))
    error, added = torch.linalg.vector_norm(once - w), torch.linalg.vector_norm(twice - once)
    assert 0 < added < 0.05 * error


def test_blocks_of_zeros_stay_zero():
    w = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    w[::3] = 0
    q = double_quantize(quantize_nf4(w))
    assert (q.absmax.dequantize()[::3] != 0).any()  # their absmax does not come back as 0
    assert not dequantize_nf4(q)[::3].any()


@pytest.mark.parametrize("shape", [(), (1,), (64,), (0,), (3, 0), (5, 77)])
def test_small_and_empty_weights(shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    plain = quantize_nf4(w)
    back = dequantize_nf4(double_quantize(plain))
    assert back.shape == w.shape
    if plain.absmax.numel() == 1:
        assert torch.equal(back, dequantize_nf4(plain))


def test_a_weight_is_doubly_quantized_once():
    q = double_quantize(quantize_nf4(torch.ones(4, 64)))
    with pytest.raises(ValueError, match="absmax of this weight is quantized already"):
        double_quantize(q)


@pytest.mark.parametrize("target", ["cpu", "meta"])
def test_moving_keeps_the_bytes(target):
    q = double_quantize(quantize_nf4(torch.randn(64, 64, generator=torch.Generator().manual_seed(0))))
    moved = q.to(target)
    tensors = (moved.absmax.codes, moved.absmax.scales, moved.absmax.offset, moved.packed)
    assert {t.device.type for t in tensors} == {target}
    assert moved.nbytes == q.nbytes
    assert moved.absmax.group_size == 256
    if target == "cpu":
        assert torch.equal(dequantize_nf4(moved), dequantize_nf4(q))
    with pytest.raises(AttributeError):
        moved.absmax.group_size = 3


# Bytes.


@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("group_size", [64, 256])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_formula_gives_the_bytes_that_are_kept(block_size, group_size, groups):
    N = block_size * group_size * groups
    plain = quantize_nf4(torch.ones(N), block_size)
    q = double_quantize(plain, group_size)
    assert 8 * plain.nbytes == bits_per_parameter(block_size, None) * N
    assert 8 * (q.nbytes - 4) == bits_per_parameter(block_size, group_size) * N  # 4 are the tensor's offset
    stored = (q.packed, q.absmax.codes, q.absmax.scales, q.absmax.offset)
    assert q.nbytes == sum(t.untyped_storage().nbytes() for t in stored)


def test_the_papers_figures():
    """QLoRA, section 3: 0.5 bits of constants a parameter become 0.127."""
    assert bits_per_parameter() == 4.126953125
    assert bits_per_parameter(group_size=None) == 4.5
    assert bits_per_parameter(64, None) - bits_per_parameter(64, 256) == pytest.approx(0.373, abs=5e-4)


@pytest.mark.parametrize(
    ("shape", "block_size"), [((5, 77), 64), ((1,), 64), ((300, 64), 64), ((70_000,), 64)]
)
def test_bytes_of_partial_blocks_and_groups(shape, block_size):
    N = math.prod(shape)
    blocks = math.ceil(N / block_size)
    q = double_quantize(quantize_nf4(torch.ones(shape), block_size))
    assert q.nbytes == math.ceil(N / 2) + blocks + 4 * math.ceil(blocks / 256) + 4


# What is refused.


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "64"])
def test_a_size_that_is_none(size):
    refused = re.escape(f"must be an int of at least 1, got {size!r}")
    with pytest.raises(ValueError, match=f"group_size {refused}"):
        quantize_absmax(torch.ones(4), size)
    with pytest.raises(ValueError, match=f"group_size {refused}"):
        double_quantize(quantize_nf4(torch.ones(4)), size)
    with pytest.raises(ValueError, match=f"group_size {refused}"):
        bits_per_parameter(64, size)
    for group_size in (256, None):
        with pytest.raises(ValueError, match=f"block_size {refused}"):
            bits_per_parameter(size, group_size)


@pytest.mark.parametrize("value", [-1e-6, math.nan, math.inf, -math.inf])
def test_an_absmax_that_is_negative_or_not_finite(value):
    with pytest.raises(ValueError, match=r"finite, not negative and a vector; got shape \[3\]"):
        quantize_absmax(torch.tensor([1.0, value, 2.0]))


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_absmax_values_that_are_no_vector(shape):
    with pytest.raises(ValueError, match=re.escape(f"a vector; got shape {list(shape)}")):
        quantize_absmax(torch.ones(shape))


@pytest.mark.parametrize(
    ("absmax", "name"),
    [
        (torch.ones(4, dtype=torch.bfloat16), "torch.bfloat16"),
        (torch.ones(4, dtype=torch.float64), "torch.float64"),
        (torch.ones(4, dtype=torch.int32), "torch.int32"),
        (np.ones(4, dtype=np.float32), "ndarray"),
        ([1.0], "list"),
        (None, "NoneType"),
    ],
)
def test_absmax_values_that_are_no_float32_tensor(absmax, name):
    with pytest.raises(TypeError, match=f"absmax values are a float32 tensor, got {name}"):
        quantize_absmax(absmax)


@pytest.mark.parametrize("values", [[3e38] * 4, [3e38, 2.9e38, 1e38], [3e38, 0.0, 2.8e38, 1e30, 3e38]])
def test_values_whose_sum_overflows_are_quantized(values):
    """float32's own mean of them is inf; the scheme needs no number beyond the values themselves."""
    absmax = torch.tensor(values)
    assert absmax.mean().isinf()
    q = quantize_absmax(absmax)
    assert q.offset.item() == pytest.approx(sum(values) / len(values), rel=1e-6)
    steps = dynamic_codebook().diff().max().item() * q.scales.max().item()
    assert (q.dequantize().double() - absmax.double()).abs().max() <= steps / 2 + 1e32


def test_values_that_would_come_back_as_inf_are_refused_by_name():
    """A code is up to half a step above its value, and here the step is beyond float32's largest."""
    largest = torch.finfo(torch.float32).max
    for count, comes_back in [(1, True), (2, False), (3, True), (4, True), (5, False)]:
        absmax = torch.tensor([0.0, *[largest] * count])
        if comes_back:
            assert quantize_absmax(absmax).dequantize().isfinite().all()
        else:
            with pytest.raises(ValueError, match=r"up to 3\.4028.* come back as inf .*double_quant=False"):
                quantize_absmax(absmax)
        assert quantize_absmax(absmax * 0.99).dequantize().isfinite().all()


def test_quantizing_records_no_graph():
    absmax = torch.rand(300, requires_grad=True)
    q = quantize_absmax(absmax)
    assert not any(t.requires_grad for t in (q.codes, q.scales, q.offset, q.dequantize()))


# Under a tracer, and without numbers.


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on tracing
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles_whole_and_to_the_last_bit(backend):
    def there_and_back(absmax):
        q = quantize_absmax(absmax, 100)
        return q.codes, q.scales, q.offset, q.dequantize()

    absmax = random_absmax("uniform", 1000)
    compiled = torch.compile(there_and_back, backend=backend, fullgraph=True)
    for ours, plain in zip(compiled(absmax), there_and_back(absmax), strict=True):
        assert torch.equal(ours, plain)
    with pytest.raises(ValueError, match="finite, not negative"):
        compiled(-absmax)


def test_the_operators_are_what_their_schemas_and_shapes_say():
    """torch's own check: nothing else is written, and fake results are like real ones."""
    q = quantize_absmax(random_absmax("uniform", 300), 100)
    for name, arguments in (
        ("quantize_absmax", (torch.rand(300), 100)),
        ("dequantize_absmax", (q.codes, q.scales, q.offset, 100)),
    ):
        operator = getattr(torch.ops.lora2qlora, name).default
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_fake_values_have_the_shapes_of_real_ones_and_leave_nothing_behind():
    absmax = torch.rand(300)
    with FakeTensorMode():
        fake = quantize_absmax(torch.empty(300), 100)
        back = fake.dequantize()
    real = quantize_absmax(absmax, 100)
    for ours, theirs in zip(
        (fake.codes, fake.scales, fake.offset, back),
        (real.codes, real.scales, real.offset, real.dequantize()),
        strict=True,
    ):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert type(theirs) is torch.Tensor


def test_the_codebook_is_on_the_cpu_whatever_the_default_device():
    q = quantize_absmax(torch.rand(300))
    with torch.device("meta"):
        again = quantize_absmax(torch.rand(300, device="cpu"))
        assert torch.equal(q.dequantize(), q.dequantize().cpu())
    assert again.codes.device.type == "cpu"


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_takes_the_nearest_code_too(kind):
    absmax = random_absmax(kind, 2**16)
    q = quantize_absmax(absmax.cuda())
    assert q.codes.is_cuda
    moved = q.to("cpu")
    torch.testing.assert_close(moved.offset, absmax.mean(), rtol=1e-6, atol=0)  # summed in another order
    np.testing.assert_array_equal(
        moved.codes.numpy(), nearest(scaled(absmax, moved).numpy(), dynamic_codebook())
    )
    assert torch.equal(moved.dequantize(), q.dequantize().cpu())


@pytest.mark.gpu
def test_a_gpus_bitsandbytes_has_the_same_scales_and_neighbouring_codes():
    w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).cuda()
    q = double_quantize(quantize_nf4(w))
    _, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    assert torch.equal(q.absmax.offset, state.offset)
    assert torch.equal(q.absmax.scales, state.state2.absmax)
    assert ((q.absmax.codes.int() - state.absmax.int()).abs() <= 1).all()
    torch.testing.assert_close(
        dequantize_nf4(q), bnb.dequantize_4bit(q.packed.view(-1, 1), state), rtol=0.05, atol=1e-6
    )
