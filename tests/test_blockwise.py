"""blockwise: the rule against brute force and bitsandbytes, exact properties, codebooks, what is refused."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2qlora.blockwise import (
    TINY,
    BlockwiseQuantized,
    dequantize_blockwise,
    float_codebook,
    fp4_codebook,
    int_codebook,
    quantize_blockwise,
    table,
)
from lora2qlora.memory import track_peak
from torch._subclasses.fake_tensor import FakeTensorMode

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CODEBOOKS = {
    "int2": int_codebook(2),
    "int4": int_codebook(4),
    "int8": int_codebook(8),
    "fp4": fp4_codebook(),
    "e3m0": float_codebook(3, 0),
    "e4m3": float_codebook(4, 3),
    "e7m0": float_codebook(7, 0),
    "nf4": bnb.get_4bit_type("nf4", "cpu"),
    "dynamic": bnb.create_dynamic_map(),
    "no zero": torch.tensor([-0.75, 0.5]),
}
FULL = [name for name, codebook in CODEBOOKS.items() if codebook[0] == -1 and codebook[-1] == 1]
seeds = st.integers(0, 2**16)


def halfway(codebook):
    """The midpoints of neighbours, rounded to float32 once, from float64."""
    wide = np.asarray(codebook, dtype=np.float64)
    return ((wide[:-1] + wide[1:]) / 2).astype(np.float32)


def nearest(scaled, codebook):
    """Brute force: the first of the least distances; on a float32 midpoint the lower neighbour.

    A difference in float64 is exact wherever two codes compete, for every codebook here.
    """
    distances = np.abs(scaled.astype(np.float64)[:, None] - np.asarray(codebook, dtype=np.float64))
    codes = distances.argmin(axis=1)
    for lower, midpoint in enumerate(halfway(codebook)):
        codes[scaled == midpoint] = lower
    return codes


def quantized_by_hand(x, codebook, block_size):
    """The docstring's rule, a block at a time, in NumPy's float32."""
    flat, codes, absmax = x.detach().float().numpy().ravel(), [], []
    for start in range(0, len(flat), block_size):
        block = flat[start : start + block_size]
        absmax.append(np.abs(block).max())
        divisor = np.maximum(absmax[-1], np.float32(1e-38))
        whole = len(block) == block_size
        scaled = block * (np.float32(1) / divisor) if whole else block / divisor
        codes.append(nearest(scaled, codebook))
    return np.concatenate([*codes, np.empty(0, int)]), np.array(absmax, dtype=np.float32)


def dequantized_by_hand(q, codebook):
    s = np.repeat(q.absmax.numpy(), q.block_size)[: len(q.indices)]
    product = s.astype(np.float64) * np.asarray(codebook, dtype=np.float64)[q.indices.numpy()]
    return torch.from_numpy(product.astype(np.float32)).to(q.dtype).view(q.shape)


def assert_by_the_rule(x, codebook, block_size):
    before = x.detach().clone()
    q = quantize_blockwise(x, codebook, block_size)
    codes, absmax = quantized_by_hand(x, codebook, block_size)
    assert (q.indices.dtype, q.absmax.dtype) == (torch.uint8, torch.float32)
    np.testing.assert_array_equal(q.indices.numpy(), codes)
    np.testing.assert_array_equal(q.absmax.numpy(), absmax)
    assert (q.shape, q.dtype, q.block_size) == (x.shape, x.dtype, block_size)
    back = dequantize_blockwise(q, codebook)
    assert (back.shape, back.dtype) == (x.shape, x.dtype)
    assert torch.equal(back, dequantized_by_hand(q, codebook))
    assert torch.equal(x, before)
    return q


@st.composite
def blocks(draw, low=-150, high=128, least_rows=0, least_size=1):
    """(x [rows, size], in float32, bfloat16 or float16): normal rows whose absmax is from 2^low to 2^high."""
    rows, size = draw(st.integers(least_rows, 5)), draw(st.integers(least_size, 40))
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(draw(seeds)), dtype=torch.float64)
    dtype = draw(st.sampled_from(DTYPES))
    low, high = max(low, -24 if dtype == torch.float16 else low), min(high, math.log2(torch.finfo(dtype).max))
    scales = torch.tensor([2 ** draw(st.floats(low, high)) for _ in range(rows)], dtype=torch.float64)
    x = x / x.abs().amax(dim=1, keepdim=True) * scales[:, None]
    x[x.abs() < draw(st.sampled_from([0, 0, 0.1])) * scales[:, None]] = draw(st.sampled_from([0.0, -0.0]))
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


@settings(max_examples=150, deadline=None)
@given(blocks(), st.sampled_from(list(CODEBOOKS)), st.integers(1, 90))
def test_the_rule_by_brute_force(x, name, block_size):
    assert_by_the_rule(x, CODEBOOKS[name], block_size)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_on_a_midpoint_the_lower_and_a_step_above_it_the_upper(name):
    codebook, midpoint = CODEBOOKS[name], torch.from_numpy(halfway(CODEBOOKS[name]))
    lower = torch.arange(len(midpoint))
    # With an absmax of a power of two the scaled values are exact; a partial block is divided by it.
    scales = [1.0, 2.0**20] if name == "e7m0" else [2.0**-20, 1.0, 2.0**20]  # 2^-127 times 2^-20 is rounded
    for scale, partial in itertools.product(scales, [0, 1]):
        for neighbour, expected in ((midpoint, lower), (midpoint.nextafter(torch.tensor(-2.0)), lower)):
            x = torch.cat([torch.ones(1), neighbour]) * scale
            q = quantize_blockwise(x, codebook, len(x) + partial)
            assert torch.equal(q.indices[1:].long(), expected)
        x = torch.cat([torch.ones(1), midpoint.nextafter(torch.tensor(2.0))]) * scale
        q = quantize_blockwise(x, codebook, len(x) + partial)
        assert torch.equal(q.indices[1:].long(), lower + 1)


def test_a_midpoint_is_rounded_to_float32_first():
    codebook = CODEBOOKS["nf4"]
    exact = (codebook[:-1].double() + codebook[1:].double()) / 2
    above = [i for i in range(15) if halfway(codebook)[i] > exact[i]]
    assert above  # there the rounded midpoint lies nearer to the upper value, and yet the lower is taken
    x = torch.from_numpy(halfway(codebook))[above]
    indices = quantize_blockwise(torch.cat([torch.ones(1), x]), codebook).indices[1:]
    assert indices.tolist() == above
    distance_lower, distance_upper = (x - codebook[above].double()), (codebook[1:][above].double() - x)
    assert (distance_upper < distance_lower).all()
    assert (distance_lower - distance_upper < 2**-23).all()


def test_whole_blocks_are_multiplied_and_partial_ones_divided():
    """Where x · (1 / s) and x / s round to two sides of a midpoint, so that the codes tell them apart."""
    codebook = CODEBOOKS["nf4"]
    s = torch.rand(300_000, generator=torch.Generator().manual_seed(0)) + 0.5
    x = torch.tensor(halfway(codebook)[9]) * s
    multiplied, divided = x * (1 / s), x / s
    edge = torch.tensor(halfway(codebook)[9])
    differ = (multiplied <= edge) != (divided <= edge)
    assert differ.sum() > 1000
    whole = torch.stack([s, x], dim=1)[differ]
    partial = [quantize_blockwise(row, codebook, block_size=3).indices[1] for row in whole[:100]]
    assert torch.equal(quantize_blockwise(whole, codebook, 2).indices[1::2], 9 + (multiplied > edge)[differ])
    assert torch.equal(torch.stack(partial), 9 + (divided > edge)[differ][:100])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FULL)
def test_zeros_of_either_sign(name, dtype):
    codebook = CODEBOOKS[name]
    x = torch.tensor([0.0, -0.0] * 50, dtype=dtype)
    q = assert_by_the_rule(x, codebook, block_size=32)  # three whole blocks and a partial one
    assert codebook[q.indices.int()].eq(0).all()
    assert q.absmax.eq(0).all()
    back = dequantize_blockwise(q, codebook)
    assert not back.any()
    assert not back.signbit().any()
    beside = dequantize_blockwise(quantize_blockwise(torch.tensor([-0.0, -3.0]), codebook), codebook)
    assert beside.tolist() == [0.0, -3.0]
    assert not beside[0].signbit()


@pytest.mark.parametrize("partial", [False, True])
def test_below_1e_38_rounding_is_coarse(partial):
    codebook, size = CODEBOOKS["nf4"], 64 + partial
    assert TINY == 1e-38
    for absmax, expected in [(2e-45, 0.0), (3.9e-40, 0.0), (5e-39, 0.44070983), (9.9e-39, 1.0), (1e-38, 1.0)]:
        x = torch.linspace(-absmax, absmax, 64)
        q = assert_by_the_rule(x, codebook, size)
        assert q.absmax[0] == x.max()  # the absmax itself is kept
        assert codebook[q.indices[-1].int()] == pytest.approx(expected)
        back = dequantize_blockwise(q, codebook)
        assert back[-1] == pytest.approx(x[-1].item() * expected, abs=2e-45)
        assert (back.abs() <= absmax).all()
        assert ((back - x).abs() <= absmax).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FULL)
def test_the_absmax_comes_back_exactly_at_both_ends_of_the_range(name, dtype):
    info = torch.finfo(dtype)
    least = max(info.smallest_normal, 1.2e-38)
    for largest in (info.max, info.max * (1 - info.eps), 1.0, least):
        x = torch.tensor([largest, -largest, largest / 3, 0.0], dtype=dtype)
        for block_size in (4, 5):
            q = assert_by_the_rule(x, CODEBOOKS[name], block_size)
            back = dequantize_blockwise(q, CODEBOOKS[name])
            assert torch.equal(back[:2], x[:2])
            assert back.isfinite().all()


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 5), (3, 0), (63,), (64,), (65,), (2, 3, 4), (1, 200)])
@pytest.mark.parametrize("block_size", [1, 64, 10**6])
def test_any_shape_and_a_block_larger_than_the_tensor(shape, block_size):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    q = assert_by_the_rule(x, CODEBOOKS["int4"], block_size)
    assert q.indices.shape == (x.numel(),)
    assert q.absmax.shape == (math.ceil(x.numel() / block_size),)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_contiguous_counts_in_row_order(dtype):
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    for view in (x.T, x[:, ::2], x[1:4, 3:7], x[:1].expand(5, 10), x.view(2, 3, 10).transpose(0, 2), x[3, 4]):
        got = assert_by_the_rule(view, CODEBOOKS["fp4"], block_size=7)
        expected = quantize_blockwise(view.contiguous(), CODEBOOKS["fp4"], block_size=7)
        assert torch.equal(got.indices, expected.indices)
        assert torch.equal(got.absmax, expected.absmax)


def test_a_parameter_passes_and_its_graph_is_left_behind():
    weight = torch.nn.Parameter(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)))
    q = assert_by_the_rule(weight * 2, CODEBOOKS["int8"], block_size=16)
    assert not any(t.requires_grad for t in (q.absmax, dequantize_blockwise(q, CODEBOOKS["int8"])))


# Properties. Where an absmax is from 1e-38 to 8.5e37, both it and its reciprocal are normal numbers.


@settings(max_examples=150, deadline=None)
@given(blocks(low=-126, high=126.9, least_rows=1), st.sampled_from(FULL))
def test_no_error_exceeds_half_the_gap_on_its_side(x, name):
    codebook, size = CODEBOOKS[name].double(), x.shape[1]
    q = quantize_blockwise(x, CODEBOOKS[name], size)
    s, codes = q.absmax.double()[:, None], q.indices.view(x.shape).long()
    error = dequantize_blockwise(q, CODEBOOKS[name]).double() - x.double()
    gaps = torch.cat([torch.zeros(1), codebook.diff(), torch.zeros(1)])
    half = torch.where(error > 0, gaps[codes], gaps[codes + 1]) / 2
    info = torch.finfo(x.dtype)
    one_rounding = info.eps / 2 * (s * codebook[codes]).abs() + info.smallest_normal * info.eps / 2
    # In float32: reciprocal, product and midpoint on the way in, product on the way out.
    assert (error.abs() <= s * half + 4 * 2**-24 * s + one_rounding).all()
    assert (error.abs() <= s * codebook.diff().max() / 2 * (1 + 1e-6) + one_rounding).all()


@settings(max_examples=100, deadline=None)
@given(blocks(), st.sampled_from(list(CODEBOOKS)), st.integers(1, 90))
def test_within_a_block_order_is_kept(x, name, block_size):
    q = quantize_blockwise(x, CODEBOOKS[name], block_size)
    back = dequantize_blockwise(q, CODEBOOKS[name]).view(-1)
    for start in range(0, x.numel(), block_size):
        order = x.view(-1)[start : start + block_size].float().argsort()
        assert (q.indices[start : start + block_size][order].int().diff() >= 0).all()
        assert (back[start : start + block_size][order].float().diff() >= 0).all()


@settings(max_examples=60, deadline=None)
@given(blocks(), st.sampled_from(list(CODEBOOKS)), seeds)
def test_blocks_do_not_see_each_other(x, name, seed):
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    q, shuffled = (quantize_blockwise(rows, CODEBOOKS[name], x.shape[1]) for rows in (x, x[order]))
    assert torch.equal(q.indices.view(x.shape)[order], shuffled.indices.view(x.shape))
    assert torch.equal(q.absmax[order], shuffled.absmax)


@settings(max_examples=60, deadline=None)
@given(blocks(low=-60, high=60), st.sampled_from(list(CODEBOOKS)), st.integers(-60, 60), st.integers(1, 90))
def test_a_power_of_two_scales_the_absmax_and_no_code(x, name, exponent, block_size):
    x = x.float()
    q = quantize_blockwise(x, CODEBOOKS[name], block_size)
    scaled = quantize_blockwise(x * 2.0**exponent, CODEBOOKS[name], block_size)
    assert torch.equal(q.indices, scaled.indices)
    assert torch.equal(q.absmax * 2.0**exponent, scaled.absmax)


@settings(max_examples=60, deadline=None)
@given(blocks(), st.sampled_from(["int4", "int8", "fp4", "e4m3"]), st.integers(1, 90))
def test_a_symmetric_codebook_treats_signs_alike_but_for_ties(x, name, block_size):
    codebook = CODEBOOKS[name]
    q, negative = (quantize_blockwise(t, codebook, block_size) for t in (x, -x))
    step = (q.indices.int() + negative.indices.int()) - (len(codebook) - 1)
    assert torch.isin(step, torch.tensor([0, -1])).all()  # a tie goes down on both sides
    assert torch.equal(q.absmax, negative.absmax)


# Codebooks.


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_are_evenly_spaced_about_zero(bits):
    codebook, K = int_codebook(bits), 2 ** (bits - 1) - 1
    assert codebook.tolist() == [np.float32(k) / np.float32(K) for k in range(-K, K + 1)]
    assert len(codebook) == 2**bits - 1
    assert torch.equal(codebook, -codebook.flip(0))
    theirs = bnb.create_linear_map(signed=True, total_bits=bits)  # padded with zeros to 256
    theirs = torch.cat([theirs[:K], theirs[-K - 1 :]])
    torch.testing.assert_close(codebook, theirs, rtol=0, atol=2**-22)  # a linspace: its 0 may be 4e-8


@pytest.mark.parametrize("bits", [1, 0, -4, 9, 4.5, "4", None])
def test_integers_of_a_width_that_is_refused(bits):
    with pytest.raises(ValueError, match=rf"bits must be in 2\.\.8, got {bits!r}"):
        int_codebook(bits)


def test_fp4_is_e2m1_and_bitsandbytes_differs_in_one_pair():
    codebook = fp4_codebook()
    e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert codebook.tolist() == [np.float32(v / 6) for v in [-v for v in e2m1[:0:-1]] + e2m1]
    theirs = bnb.get_4bit_type("fp4", "cpu").unique()
    assert len(theirs) == len(codebook) == 15
    differ = codebook != theirs
    assert differ.nonzero().flatten().tolist() == [6, 8]
    torch.testing.assert_close(codebook[differ], torch.tensor([-1 / 12, 1 / 12]))
    torch.testing.assert_close(theirs[differ], torch.tensor([-1 / 192, 1 / 192]))


def test_e4m3_has_the_values_of_torchs_float8():
    bits = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = bits[bits.isfinite()].unique()  # two codes of 256 are NaN, where ours keeps ±480
    ours = float_codebook(exponent_bits=4, mantissa_bits=3).double() * 480
    torch.testing.assert_close(ours[1:-1], finite.double() + 0.0, rtol=1e-7, atol=0)
    assert ours[[0, -1]].tolist() == [-480, 480]


@pytest.mark.parametrize(("e", "m"), [(e, m) for e in range(1, 8) for m in range(8 - e)])
def test_small_floats_by_their_definition(e, m):
    codebook, grid = float_codebook(e, m), set()
    for code, mantissa in itertools.product(range(2**e), range(2**m)):
        value = math.ldexp(mantissa, -m) if code == 0 else math.ldexp(2**m + mantissa, code - 1 - m)
        grid |= {value, -value}
    assert codebook.tolist() == [np.float32(v / max(grid)) for v in sorted(grid)]
    assert len(codebook) == 2 ** (1 + e + m) - 1
    assert not codebook[len(codebook) // 2].signbit()


@pytest.mark.parametrize(("e", "m"), [(0, 3), (-1, 3), (2, -1), (4, 4), (8, 0)])
def test_small_floats_that_are_refused(e, m):
    with pytest.raises(ValueError, match=rf"at most 7 together, got {e} and {m}"):
        float_codebook(e, m)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_any_codebook_equals_bitsandbytes_fp4_values(block_size, dtype):
    """Its four-bit codes are in another order and have two zeros, so the values are compared."""
    x = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    table = bnb.get_4bit_type("fp4", "cpu")
    packed, state = bnb.quantize_4bit(x, blocksize=block_size, quant_type="fp4")
    theirs = table[torch.stack([packed >> 4, packed & 15], dim=1).view(-1).int()]
    codebook = table.unique()
    ours = quantize_blockwise(x, codebook, block_size)
    assert torch.equal(codebook[ours.indices.int()], theirs)
    assert torch.equal(ours.absmax, state.absmax)


# What is refused.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_counted_and_located(value, dtype):
    x = torch.ones(4, 6, dtype=dtype)
    x[2, 3:5] = value
    with pytest.raises(ValueError, match=rf"2 of 24 numbers.*first is {value} at \[2, 3\]"):
        quantize_blockwise(x, CODEBOOKS["int4"])
    x[3, 5] = math.nan
    with pytest.raises(ValueError, match=rf"3 of 24 numbers.*first is {value} at \[2, 3\]"):
        quantize_blockwise(x, CODEBOOKS["int4"])
    with pytest.raises(ValueError, match=rf"3 of 24 numbers.*first is {value} at \[3, 2\]"):
        quantize_blockwise(x.T, CODEBOOKS["int4"])  # in row order of what was passed
    with pytest.raises(ValueError, match=rf"1 of 1 numbers.*first is {value} at \[\];"):
        quantize_blockwise(torch.tensor(value, dtype=dtype), CODEBOOKS["int4"])


WRONG_INPUT = [
    (torch.ones(4, dtype=torch.float64), "torch.float64"),
    (torch.ones(4, dtype=torch.int64), "torch.int64"),
    (torch.ones(4, dtype=torch.bool), "torch.bool"),
    (torch.ones(4, dtype=torch.complex64), "torch.complex64"),
    (np.ones(4, dtype=np.float32), "ndarray"),
    ([1.0], "list"),
    (None, "NoneType"),
]


@pytest.mark.parametrize(("x", "name"), WRONG_INPUT, ids=[name for _, name in WRONG_INPUT])
def test_what_is_no_float_tensor(x, name):
    with pytest.raises(TypeError, match=rf"float32, bfloat16 and float16, got {name}: cast it first"):
        quantize_blockwise(x, CODEBOOKS["int4"])


@pytest.mark.parametrize("size", [0, -1, 64.0, True, "64", None])
def test_a_block_size_that_is_none(size):
    with pytest.raises(ValueError, match=rf"block_size must be an int of at least 1, got {size!r}"):
        quantize_blockwise(torch.ones(4), CODEBOOKS["int4"], size)


WRONG_CODEBOOKS = [
    (torch.linspace(-1, 1, 16, dtype=torch.float64), r"2 to 256 values, got torch.float64 \[16\]"),
    (torch.ones(1), r"got torch.float32 \[1\]"),
    (torch.linspace(-1, 1, 257), r"got torch.float32 \[257\]"),
    (torch.ones(2, 2), r"got torch.float32 \[2, 2\]"),
    ([-1.0, 1.0], r"2 to 256 values, got \[-1.0, 1.0\]"),
    (torch.tensor([-1.0, 0.0, 0.0, 1.0]), r"ascends within \[-1, 1\], got \[-1.0, 0.0, 0.0, 1.0\]"),
    (torch.tensor([1.0, -1.0]), "ascends within"),
    (torch.tensor([-1.5, 1.0]), "ascends within"),
    (torch.tensor([-1.0, 1.5]), "ascends within"),
    (torch.tensor([-1.0, 0.0, 1.5]), "ascends within"),
    (torch.tensor([-1.0, math.nan, 1.0]), "ascends within"),
]


@pytest.mark.parametrize(("codebook", "message"), WRONG_CODEBOOKS)
def test_a_codebook_that_is_none(codebook, message):
    with pytest.raises(ValueError, match=message):
        quantize_blockwise(torch.ones(4), codebook)
    with pytest.raises(ValueError, match=message):
        dequantize_blockwise(quantize_blockwise(torch.ones(4), CODEBOOKS["int4"]), codebook)


def test_the_longest_codebook_uses_every_index():
    codebook = torch.linspace(-1, 1, 256)
    q = assert_by_the_rule(codebook.clone(), codebook, 256)
    assert q.indices.tolist() == list(range(256))


def test_an_index_beyond_the_codebook():
    q = quantize_blockwise(torch.tensor([1.0, -1.0]), CODEBOOKS["int4"])
    with pytest.raises(ValueError, match="index 14 is beyond a codebook of 3 values"):
        dequantize_blockwise(q, CODEBOOKS["int2"])
    with pytest.raises(ValueError, match="index 14 is beyond a codebook of 14 values"):
        dequantize_blockwise(q, CODEBOOKS["int4"][:14])


def test_bytes_are_not_read_where_none_can_be_beyond_the_codebook():
    """Numbers on the meta device cannot be read, as those on a GPU cannot without a wait."""
    q = quantize_blockwise(torch.ones(3, 64), CODEBOOKS["dynamic"])
    away = replace(q, indices=q.indices.to("meta"), absmax=q.absmax.to("meta"))
    back = dequantize_blockwise(away, CODEBOOKS["dynamic"])
    assert back.device.type == "meta"
    assert back.shape == q.shape


def test_no_index_takes_eight_bytes_on_the_way():
    x = torch.randn(2**16, generator=torch.Generator().manual_seed(0))
    report = track_peak(lambda: quantize_blockwise(x, CODEBOOKS["int4"]), held=[x])
    assert report.peak_bytes < 3.5 * x.nbytes  # x, x scaled, and indices of four bytes


def test_codebooks_do_not_hang_on_the_default_dtype(other_default_dtype):
    assert torch.equal(int_codebook(4), CODEBOOKS["int4"])
    assert torch.equal(int_codebook(8), CODEBOOKS["int8"])
    assert torch.equal(float_codebook(4, 3), CODEBOOKS["e4m3"])


def test_values_are_multiplied_in_float32_and_rounded_once():
    """s · c is rounded to float32, then to bfloat16; a product of bfloat16 factors would differ."""
    codebook = CODEBOOKS["nf4"]
    q = quantize_blockwise(
        torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16(), codebook
    )
    back = dequantize_blockwise(q, codebook)
    s = q.absmax.repeat_interleave(64)
    assert torch.equal(back.view(-1), (codebook[q.indices.int()] * s).bfloat16())
    twice = codebook.bfloat16()[q.indices.int()] * s.bfloat16()
    assert (twice != back.view(-1)).float().mean() > 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CODEBOOKS)
def test_a_gpu_gives_the_same_bits(name, dtype):
    codebook = CODEBOOKS[name]
    for scale, block_size in itertools.product([1e-39, 1.0, 3e4], [7, 64, 10**4]):
        x = (torch.randn(37, 53, generator=torch.Generator().manual_seed(0)) * scale / 6).to(dtype)
        here, there = (quantize_blockwise(t, codebook, block_size) for t in (x, x.cuda()))
        assert there.indices.is_cuda
        assert there.absmax.is_cuda
        assert torch.equal(here.indices, there.indices.cpu())
        assert torch.equal(here.absmax, there.absmax.cpu())
        back = dequantize_blockwise(there, codebook)
        assert back.is_cuda
        assert torch.equal(dequantize_blockwise(here, codebook), back.cpu())


def test_the_record_is_frozen():
    q = quantize_blockwise(torch.ones(4), CODEBOOKS["int4"])
    assert isinstance(q, BlockwiseQuantized)
    with pytest.raises(AttributeError):
        q.block_size = 2


# Under a tracer, and without numbers.


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own, on tracing
def test_under_compile_it_gives_the_same_and_refuses_the_same():
    torch._dynamo.reset()

    def there_and_back(x, codebook):
        return dequantize_blockwise(quantize_blockwise(x, codebook, 16), codebook)

    compiled = torch.compile(there_and_back, backend="eager")
    x, codebook = torch.linspace(-3, 3, 70), int_codebook(4)
    assert torch.equal(compiled(x, codebook), there_and_back(x, codebook))
    with pytest.raises(ValueError, match="1 of 70 numbers are not finite"):
        compiled(torch.cat([x[1:], torch.tensor([math.inf])]), codebook)
    with pytest.raises(ValueError, match="a codebook ascends"):
        compiled(x, codebook.flip(0))


def test_fake_numbers_are_quantized_to_fake_codes():
    with FakeTensorMode():
        q = quantize_blockwise(torch.empty(5, 14), int_codebook(4), 16)
        back = dequantize_blockwise(q, int_codebook(4))
    assert (q.indices.shape, q.absmax.shape, back.shape) == ((70,), (5,), (5, 14))
    with FakeTensorMode(), pytest.raises(TypeError, match=r"torch\.int64"):
        quantize_blockwise(torch.zeros(3, dtype=torch.int64), int_codebook(4))


def test_a_table_is_where_the_tensor_is_whatever_the_default():
    values = tuple(int_codebook(4).tolist())
    with torch.device("meta"):
        here, away = table(values, torch.empty(1, device="cpu")), table(values, torch.empty(1))
    assert torch.equal(here, int_codebook(4))
    assert away.is_meta


@pytest.mark.gpu
def test_a_gpu_keeps_its_table():
    values, beside = tuple(int_codebook(4).tolist()), torch.empty(1, device="cuda")
    with torch.inference_mode():
        first = table(values, beside)
    assert table(values, beside) is first
    assert not first.is_inference()
    assert torch.equal(first.cpu(), int_codebook(4))
