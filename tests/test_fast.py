"""fast: the bits of the plain paths, whatever the shape; no compiler, no harm; Triton in its interpreter."""

import importlib.util
import os
import platform
import re
import subprocess
import sys
import textwrap
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2qlora import fast, nf4, optimizers
from lora2qlora.adapters import add_lora
from lora2qlora.blockwise import BlockwiseQuantized
from lora2qlora.double_quantization import double_quantize, dynamic_codebook
from lora2qlora.fast import adam, library, weights
from lora2qlora.lora import LoRALinear
from lora2qlora.nf4 import nf4_codebook
from lora2qlora.qlora import NF4Linear, quantize_base
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
seeds = st.integers(0, 2**16)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


NUMBERS = normal(4096)


def same_bits(a, b):
    """Equal to the last bit, 0.0 and -0.0 told apart."""
    as_int = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[a.itemsize]
    return a.dtype == b.dtype and torch.equal(a.view(as_int), b.view(as_int))


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """These tests are about the compiled path; what happens without one is tested by itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if library.load_library() is None:
            pytest.skip("needs a C++ compiler")


def assert_same_weight(w, block_size):
    ours, plain = fast.quantize_nf4(w, block_size), nf4.quantize_nf4(w, block_size)
    assert torch.equal(ours.packed, plain.packed)
    assert same_bits(ours.absmax, plain.absmax)
    assert (ours.shape, ours.dtype, ours.block_size) == (plain.shape, plain.dtype, plain.block_size)
    for q in (plain, double_quantize(plain)):
        for dtype in DTYPES:
            assert same_bits(fast.dequantize_nf4(q, dtype), nf4.dequantize_nf4(q, dtype)), dtype


# The same bits.


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_blocks_and_dtypes(dtype):
    for seed, shape in enumerate([(64, 64), (100, 48), (2, 3, 128), (3, 7), (1,), (63,), (), (0,), (4097,)]):
        for block_size in (1, 2, 6, 16, 30, 32, 64, 100, 4096):
            assert_same_weight(normal(*shape, seed=seed, dtype=dtype), block_size)


def test_a_weight_shared_out_among_threads():
    assert_same_weight(normal(1023, 1025), 64)  # odd, and above the size from which threads help


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 400),
    st.sampled_from([2, 10, 32, 64, 96]),
    st.sampled_from(DTYPES),
    st.floats(-149, 119),  # above, the mean of many absmax values may overflow
    st.sampled_from(["normal", "ties", "zeros", "few"]),
    seeds,
)
def test_any_numbers(count, block_size, dtype, exponent, kind, seed):
    """Subnormal and huge ones, blocks of zeros, and numbers on the midpoints between two codes."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(count, generator=generator)
    if kind == "ties":
        middle = (nf4_codebook()[:-1] + nf4_codebook()[1:]) / 2
        near = torch.cat([middle, middle.nextafter(torch.tensor(2.0)), middle.nextafter(torch.tensor(-2.0))])
        w = near[torch.randint(len(near), (count,), generator=generator)]
        w[::block_size] = 1
        exponent = round(exponent)
    if kind == "zeros":
        w = torch.where(torch.rand(count, generator=generator) < 0.9, w * -0.0, w)
    if kind == "few":
        w = torch.randint(-2, 3, (count,), generator=generator).float()
    w = w / w.abs().max().clamp(min=1) * 2.0**exponent
    largest = torch.finfo(dtype).max
    assert_same_weight(w.clamp(-largest, largest).to(dtype), block_size)


def test_a_partial_block_is_divided_and_a_whole_one_multiplied():
    """Both rules of the plain path, where they give different codes: on midpoints times any scale."""
    middle, differ = (nf4_codebook()[:-1] + nf4_codebook()[1:]) / 2, 0
    for seed in range(40):
        s = 1 + torch.rand(1, generator=torch.Generator().manual_seed(seed))
        x = torch.cat([s, *[(middle * s).nextafter(torch.tensor(toward)) for toward in (9.0, 0.0, -9.0)]])
        differ += not torch.equal(torch.bucketize(x * (1 / s), middle), torch.bucketize(x / s, middle))
        assert len(x) == 46
        for block_size in (46, 64):
            assert_same_weight(x, block_size)
    assert differ > 10


def test_the_numbers_meet_what_they_are_for():
    """Blocks below 1e-38, where the divisor is cut off, and a reciprocal that is subnormal."""
    tiny, huge = torch.full((64,), 1e-40), torch.full((64,), 3e38)
    assert fast.quantize_nf4(tiny).absmax.item() > 0
    assert 0 < 1 / fast.quantize_nf4(huge).absmax.item() < 1.2e-38
    for w in (tiny, huge, tiny * torch.linspace(-1, 1, 64)):
        assert_same_weight(w, 64)


def test_small_numbers_are_not_flushed_to_zero_afterwards():
    """A library built to relax arithmetic may switch that on for the whole process as it is loaded."""
    fast.quantize_nf4(normal(64))
    assert (torch.full((32,), 1e-40) * 0.5).ne(0).all()


def test_views_and_parameters():
    w = normal(48, 40)
    for view in (w.T, w[:, ::3], w[5:9, 3:7], w[:1].expand(7, 40)):
        assert torch.equal(fast.quantize_nf4(view).packed, nf4.quantize_nf4(view).packed)
    q = fast.quantize_nf4(nn.Parameter(w))
    assert not fast.dequantize_nf4(q).requires_grad


def test_an_absmax_of_another_kind():
    class Twice:
        nbytes = 0

        def __init__(self, absmax):
            self.absmax = absmax

        def dequantize(self):
            return 2 * self.absmax

    q = nf4.quantize_nf4(normal(10, 64))
    assert torch.equal(fast.dequantize_nf4(replace(q, absmax=Twice(q.absmax))), 2 * nf4.dequantize_nf4(q))


def test_a_nan_among_the_absmax_stays_one():
    q = nf4.quantize_nf4(torch.ones(2, 64, dtype=torch.bfloat16))
    q.absmax[0] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # rounded up, it would be 0
    assert fast.dequantize_nf4(q)[0].isnan().all()
    assert (fast.dequantize_nf4(q)[1] == 1).all()


# Bad input: what the plain path says.


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 63, 99])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_not_finite(bad, place, dtype):
    w = normal(100, dtype=dtype)
    w[place] = bad
    with pytest.raises(ValueError, match=re.escape(f"1 of 100 numbers are not finite, the first is {bad}")):
        fast.quantize_nf4(w)


@pytest.mark.parametrize(
    ("w", "block_size", "error"),
    [
        (torch.ones(4, dtype=torch.float64), 64, TypeError),
        ([1.0, 2.0], 64, TypeError),
        (torch.ones(4), 0, ValueError),
        (torch.ones(4), 64.0, ValueError),
        (torch.ones(4), True, ValueError),
    ],
)
def test_arguments_that_do_not_fit(w, block_size, error):
    with pytest.raises(error) as plain:
        nf4.quantize_nf4(w, block_size)
    with pytest.raises(error, match=re.escape(str(plain.value))):
        fast.quantize_nf4(w, block_size)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"out": torch.empty(3, 3)}, ValueError),
        ({"out": torch.empty(128, 10).T}, ValueError),
        ({"out": torch.empty(10, 128), "dtype": torch.bfloat16}, ValueError),
        ({"dtype": torch.int32}, TypeError),
    ],
)
def test_buffers_that_do_not_fit(options, error):
    q = nf4.quantize_nf4(normal(10, 128))
    with pytest.raises(error) as plain:
        nf4.dequantize_nf4(q, **options)
    with pytest.raises(error, match=re.escape(str(plain.value))):
        fast.dequantize_nf4(q, **options)


@pytest.mark.parametrize("name", ["packed", "absmax"])
def test_a_weight_cut_short_is_not_read_beyond_its_end(name):
    q = nf4.quantize_nf4(normal(10, 128))
    cut = replace(q, **{name: getattr(q, name)[:3]})
    with pytest.raises((RuntimeError, IndexError)):  # as on the plain path
        fast.dequantize_nf4(cut)


# The buffer, the layer and the model.


def test_a_buffer_is_filled_and_returned():
    q = nf4.quantize_nf4(normal(10, 128))
    for dtype in DTYPES:
        out = torch.full((10, 128), 7, dtype=dtype)
        assert fast.dequantize_nf4(q, out=out) is out
        assert same_bits(out, nf4.dequantize_nf4(q, dtype))


def test_scratch_is_one_piece_of_memory_for_a_thread():
    from concurrent.futures import ThreadPoolExecutor

    large, small = (nf4.quantize_nf4(normal(n, 64, seed=n)) for n in (40, 8))
    first = fast.dequantize_to_scratch(large, torch.float32)
    again = fast.dequantize_to_scratch(small, torch.bfloat16)
    assert again.data_ptr() == first.data_ptr()  # no other allocation, and the first is overwritten
    assert torch.equal(again, nf4.dequantize_nf4(small, torch.bfloat16))
    assert not torch.equal(first, nf4.dequantize_nf4(large))
    with ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(fast.dequantize_to_scratch, large, torch.float32).result()
    assert elsewhere.data_ptr() != first.data_ptr()


def run(layer, x, grad):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(grad)
    return [y, x.grad, *[p.grad for p in layer.parameters() if p.requires_grad]]


@pytest.mark.parametrize("compute_dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_fast_layer_computes_the_same_bits(double_quant, compute_dtype):
    torch.manual_seed(0)
    options = {"double_quant": double_quant, "compute_dtype": compute_dtype}
    layer = LoRALinear(NF4Linear.from_linear(nn.Linear(96, 130), **options), 4, 8)
    nn.init.normal_(layer.lora_B)
    x, grad = normal(2, 5, 96, seed=1), normal(2, 5, 130, seed=2)
    plain = run(layer, x, grad)
    fast.use_fast(layer)
    for ours, theirs in zip(run(layer, x, grad), plain, strict=True):
        assert same_bits(ours, theirs)


class Net(nn.Module):
    """Layers of different shapes, one of them used twice, so that they take turns in one memory."""

    def __init__(self):
        super().__init__()
        self.up, self.same, self.down = nn.Linear(64, 96), nn.Linear(96, 96), nn.Linear(96, 64)

    def forward(self, x):
        return self.down(self.same(self.same(self.up(x)).relu()))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_whole_model_trains_alike(checkpointed):
    def losses(is_fast):
        torch.manual_seed(0)
        model = Net()
        quantize_base(model, ["up", "same", "down"])
        add_lora(model, ["up", "same", "down"], 4, 8)
        if is_fast:
            fast.use_fast(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        found = []
        for seed in range(5):
            x = normal(7, 64, seed=seed).requires_grad_()
            y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
            loss = (y - x.detach()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    assert losses(True) == losses(False)


@pytest.mark.parametrize("dequantize", [nf4.dequantize_nf4, fast.dequantize_nf4])
def test_autograd_notices_a_buffer_that_was_written_again(dequantize):
    buffer, x = torch.empty(8, 64), normal(3, 64).requires_grad_()
    y = x @ dequantize(nf4.quantize_nf4(normal(8, 64)), out=buffer).T
    dequantize(nf4.quantize_nf4(normal(8, 64, seed=1)), out=buffer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        dequantize(nf4.quantize_nf4(normal(8, 64)), out=torch.empty(8, 64, requires_grad=True))


def test_second_derivatives_are_refused_where_the_scratch_is_shared():
    model = Net()
    quantize_base(model, ["up", "same", "down"], compute_dtype=torch.float32)
    fast.use_fast(model)
    x = normal(3, 64).requires_grad_()
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grad.square().sum().backward()


def test_a_tensor_without_numbers_of_its_own_takes_the_plain_path():
    w = normal(8, 64)
    negated = torch._neg_view(w)  # contiguous, and its memory has the other sign
    assert torch.equal(fast.quantize_nf4(negated).packed, nf4.quantize_nf4(-w).packed)
    q = nf4.quantize_nf4(w)
    assert torch.equal(
        fast.dequantize_nf4(replace(q, absmax=torch._neg_view(-q.absmax))), nf4.dequantize_nf4(q)
    )
    with FakeTensorMode():
        fake = fast.quantize_nf4(torch.empty(8, 64))
        assert fast.dequantize_nf4(fake).shape == fast.dequantize_to_scratch(fake, torch.float32).shape
    assert (fake.packed.shape, fake.absmax.shape) == (q.packed.shape, q.absmax.shape)


def test_evaluation_first_does_not_spoil_training(monkeypatch):
    monkeypatch.setattr(weights, "_scratch", weights._Scratch())
    layer = LoRALinear(NF4Linear.from_linear(nn.Linear(64, 64)), 4, 8)
    fast.use_fast(layer)
    with torch.inference_mode():
        layer(normal(3, 64))
        q = nf4.quantize_nf4(normal(8, 64))
        assert torch.equal(fast.dequantize_nf4(q, out=torch.empty(8, 64)), nf4.dequantize_nf4(q))
    assert not weights._scratch.memory.is_inference()
    run(layer, normal(3, 64), normal(3, 64))


def test_use_fast_reaches_every_layer_and_needs_one():
    model = Net()
    quantize_base(model, ["up", "down"])
    fast.use_fast(model)
    fast.use_fast(model)  # twice is once
    assert model.up.dequantize is model.down.dequantize is fast.dequantize_to_scratch
    other = Net()
    quantize_base(other, ["up"])
    assert other.up.dequantize is nf4.dequantize_nf4  # no other model is touched
    with pytest.raises(ValueError, match="Linear has no NF4Linear to make fast: quantize_base first"):
        fast.use_fast(nn.Linear(2, 2))


# Whoever traces: raw pointers and the scratch are in no graph.


def fast_model(double_quant=True, compute_dtype=torch.float32):
    """Two layers of one shape, which take turns in the scratch, with adapters that do something."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 32))
    quantize_base(model, ["0", "1", "2"], double_quant, compute_dtype)
    add_lora(model, ["0", "1", "2"], 4, 8)
    for layer in model:
        nn.init.normal_(layer.lora_B)
    fast.use_fast(model)
    return model


def assert_sums_close(ours, theirs):
    """Equal but for the order of sums, which is a compiler's own: within 1e-5 of the largest number."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


def is_in(graph, name="fast_dequantize_nf4"):
    return name in str(graph)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on tracing
@pytest.mark.parametrize(
    ("backend", "double_quant"),
    [("eager", True), ("eager", False), ("aot_eager", True), ("aot_eager", False), ("inductor", True)],
)
def test_a_compiled_fast_model_computes_and_trains_alike(backend, double_quant):
    torch._dynamo.reset()  # else many models share one limit
    model = fast_model(double_quant)
    x, grad = normal(5, 64, seed=1), normal(5, 32, seed=2)
    plain = run(model, x, grad)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        for ours, theirs in zip(run(compiled, x, grad), plain, strict=True):
            assert_sums_close(ours, theirs)
    with torch.no_grad():
        assert_sums_close(compiled(x), plain[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_checkpointing_and_another_thread_under_compile():
    from concurrent.futures import ThreadPoolExecutor

    model = fast_model()
    x, grad = normal(5, 64, seed=1), normal(5, 32, seed=2)
    plain = run(model, x, grad)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def checkpointed(x):
        return checkpoint(model, x, use_reentrant=False)

    checkpointed.zero_grad, checkpointed.parameters = model.zero_grad, model.parameters
    for ours, theirs in zip(run(checkpointed, x, grad), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    with ThreadPoolExecutor(2) as pool, torch.no_grad():
        found = [f.result() for f in [pool.submit(torch.compile(model, backend="eager"), x) for _ in "ab"]]
    for y in found:
        torch.testing.assert_close(y, plain[0], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # torch deprecates two of them, and warns of sizes it traces
@pytest.mark.parametrize("how", ["export", "jit", "make_fx"])
def test_an_exported_or_traced_fast_model_computes_for_other_inputs(how):
    model, x, other = fast_model().eval(), normal(5, 64, seed=1), normal(5, 64, seed=9)
    with torch.no_grad():
        expected = model(other)
        if how == "export":
            traced = torch.export.export(model, (x,)).module()
        elif how == "jit":
            traced = torch.jit.trace(model, (x,))
        else:
            traced = make_fx(model)(x)
        fast.dequantize_to_scratch(nf4.quantize_nf4(normal(64, 64, seed=5)), torch.float32)
        torch.testing.assert_close(traced(other), expected, rtol=1e-5, atol=1e-5)


def test_scratch_is_never_a_tensor_of_a_mode(monkeypatch):
    """What is allocated under a mode or a transform may be fake, or wrapped, and dies with it."""
    q = nf4.quantize_nf4(normal(40, 64))

    def product(x):
        return (x @ fast.dequantize_to_scratch(q, torch.float32).T).sum()

    def without_numbers():
        with FakeTensorMode() as mode:
            fake = replace(q, packed=mode.from_tensor(q.packed), absmax=mode.from_tensor(q.absmax))
            fast.dequantize_to_scratch(fake, torch.float32)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fast.dequantize_to_scratch(q, torch.float32)

    for first in (
        without_numbers,
        lambda: torch.func.grad(product)(normal(3, 64)),
        lambda: torch.vmap(product)(normal(2, 3, 64)),
        lambda: make_fx(product)(normal(3, 64)),
    ):
        monkeypatch.setattr(weights, "_scratch", weights._Scratch())
        first()
        assert torch.equal(fast.dequantize_to_scratch(q, torch.float32), nf4.dequantize_nf4(q))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_transforms_of_torch_func_are_right_or_refused():
    q, x = nf4.quantize_nf4(normal(40, 64)), normal(3, 64)
    dense = nf4.dequantize_nf4(q)

    def through(function, x):
        return torch.vmap(lambda row: row @ function(q).T)(x)

    torch.testing.assert_close(through(fast.dequantize_nf4, x), x @ dense.T)
    gradient = torch.func.grad(lambda x: (x @ fast.dequantize_nf4(q).T).square().sum())(x)
    torch.testing.assert_close(gradient, 2 * x @ dense.T @ dense)
    _, tangent = torch.func.jvp(lambda x: x @ fast.dequantize_nf4(q).T, (x,), (x,))
    torch.testing.assert_close(tangent, x @ dense.T)
    packed = torch.stack([q.packed, q.packed.flip(0)])
    for function in (fast.dequantize_nf4, fast.dequantize_to_scratch):
        with pytest.raises(RuntimeError, match=r"vmap|[Bb]atch"):
            torch.vmap(lambda bytes, f=function: f(replace(q, packed=bytes), torch.float32))(packed)
    with pytest.raises(RuntimeError, match=r"vmap|[Bb]atch"):
        torch.vmap(fast.quantize_nf4)(normal(2, 8, 64))
    model = fast_model()
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: model(x).sum())(normal(3, 64))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_quantizing_under_compile_gives_the_bytes_and_the_errors(backend):
    w = normal(40, 63)

    def there_and_back(w):
        q = fast.quantize_nf4(w)
        return q.packed, q.absmax, fast.dequantize_nf4(q, torch.bfloat16)

    compiled = torch.compile(there_and_back, backend=backend, fullgraph=True)
    for ours, theirs in zip(compiled(w), there_and_back(w), strict=True):
        assert torch.equal(ours, theirs)
    w[3, 5] = float("nan")
    with pytest.raises(ValueError, match="1 of 2520 numbers are not finite"):
        compiled(w)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_an_adam_step_under_compile_writes_its_states(backend):
    def step(x, grad, m, sm, v, sv, codebooks):
        states = [
            BlockwiseQuantized(codes, absmax, x.shape, x.dtype, 256) for codes, absmax in ((m, sm), (v, sv))
        ]
        fast.adam_step_8bit(x, grad, *states, 1, group, codebooks)
        return x * 1

    group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    codebooks = (dynamic_codebook(), optimizers.unsigned_dynamic_codebook())
    compiled, results = torch.compile(step, backend=backend, fullgraph=True), []
    for function in (step, compiled):
        tensors = [normal(5000), normal(5000, seed=1)]
        for _ in range(2):
            tensors += [torch.zeros(5000, dtype=torch.uint8), torch.zeros(20)]
        results.append([function(*tensors, codebooks), *tensors])
    for plain, ours in zip(*results, strict=True):
        assert torch.equal(plain, ours)
    assert results[1][4].count_nonzero() == 20


def test_autograd_notices_what_adam_wrote():
    x, grad, codebooks = (
        normal(512),
        normal(512),
        (dynamic_codebook(), optimizers.unsigned_dynamic_codebook()),
    )
    group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    states = [BlockwiseQuantized(torch.zeros(512, dtype=torch.uint8), torch.zeros(2), x.shape, x.dtype, 256)]
    states += [BlockwiseQuantized(torch.zeros(512, dtype=torch.uint8), torch.zeros(2), x.shape, x.dtype, 256)]
    fast.adam_step_8bit(x, grad, *states, 1, group, codebooks)
    assert x._version
    assert all(q.indices._version and q.absmax._version for q in states)


@pytest.mark.parametrize("default", ["meta"])
def test_the_default_device_has_no_say(default):
    """A pointer into the meta device is 0."""
    w, plain = normal(40, 64), nf4.quantize_nf4(normal(40, 64))
    with torch.device(default):
        q = fast.quantize_nf4(w)
        back = fast.dequantize_to_scratch(double_quantize(q), torch.float32)
        also = nf4.dequantize_nf4(double_quantize(nf4.quantize_nf4(w)))
    assert torch.equal(q.packed, plain.packed)
    assert torch.equal(back, nf4.dequantize_nf4(double_quantize(plain)))
    assert torch.equal(back, also)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")
def test_the_triton_kernels_are_operators_too():
    """Recorded without a GPU: a graph of meta tensors has them, and knows their shapes."""
    q = nf4.quantize_nf4(normal(40, 64))
    away = replace(double_quantize(q).to("meta"), dtype=torch.bfloat16)

    def both(x):
        dense = fast.dequantize_triton(away, torch.empty(40, 64, device="meta"))
        return fast.matmul_triton(x, away) + x @ dense.T

    graph = make_fx(both)(torch.empty(3, 64, device="meta"))
    assert is_in(graph.code, "dequantize_triton")
    assert is_in(graph.code, "matmul_triton")
    assert both(torch.empty(3, 64, device="meta")).shape == (3, 40)


def test_the_operators_are_what_their_schemas_and_shapes_say():
    """torch's own check: what is written is named, and fake results are like real ones."""
    plain = nf4.quantize_nf4(normal(7, 32), 16)
    absmax, out = double_quantize(plain, 4).absmax, torch.empty(7, 32)
    nested = (plain.packed, absmax.scales, absmax.codes, absmax.offset, 4, 16, out)
    states = [torch.zeros(600, dtype=torch.uint8), torch.zeros(3)] * 2
    states = [t.clone() for t in states]
    codebooks = (dynamic_codebook(), optimizers.unsigned_dynamic_codebook())
    options = [0.1, 0.9, 0.99, 1e-8, 0.0]
    for operator, arguments in (
        (weights.quantize, (normal(7, 32), 16)),
        (weights.dequantize, (plain.packed, plain.absmax, None, None, 0, 16, out)),
        (weights.dequantize, nested),
        (adam.step_in_place, (normal(600), normal(600), *states, *codebooks, options, 1, 256)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_call_costs_one_operator_and_no_more(monkeypatch):
    """What the fast path calls of torch, without a stopwatch: the scratch's views, and its operator."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            seen.append(str(function))
            return function(*arguments, **(options or {}))

    q = double_quantize(nf4.quantize_nf4(normal(40, 64)))
    fast.dequantize_to_scratch(q, torch.float32)
    with Watch():
        fast.dequantize_to_scratch(q, torch.float32)
    assert [name for name in seen if "aten" not in name] == ["lora2qlora.fast_dequantize_nf4.default"]
    assert len(seen) <= 5  # a slice and views besides


# No compiler, no harm.


@pytest.fixture
def forgotten(monkeypatch):
    library.load_library.cache_clear()
    yield monkeypatch
    library.load_library.cache_clear()


def compile_for(forgotten, processor):
    flags = [flag.replace("native", processor) for flag in library.FLAGS]
    assert f"-march={processor}" in flags
    forgotten.setattr(library, "FLAGS", flags)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names kinds of x86-64")
def test_a_processor_with_eight_lanes_computes_the_same(forgotten):
    compile_for(forgotten, "x86-64-v3")
    for dtype in DTYPES:
        test_shapes_blocks_and_dtypes(dtype)
    test_any_numbers()
    test_a_partial_block_is_divided_and_a_whole_one_multiplied()
    test_the_numbers_meet_what_they_are_for()
    test_adam_takes_the_plain_steps(5001, 0.1)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names kinds of x86-64")
def test_an_old_processor_stays_plain(forgotten):
    compile_for(forgotten, "x86-64")
    with pytest.warns(UserWarning, match="could not compile it: .*needs a processor with AVX2 or AVX-512"):
        q = fast.quantize_nf4(normal(100))
    assert same_bits(q.packed, nf4.quantize_nf4(normal(100)).packed)


def test_a_compiler_may_be_named_with_options(forgotten, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\n[ "$1" = -pipe ] && exec g++ "$@"\n')
    compiler.chmod(0o755)
    forgotten.setenv("CXX", f"{compiler} -pipe")
    assert library.load_library() is not None


def test_a_compiler_that_cannot_be_read_as_a_command_stays_plain(forgotten):
    forgotten.setenv("CXX", "g++ 'unbalanced")
    with pytest.warns(UserWarning, match="plain path on the CPU: .*No closing quotation"):
        assert library.load_library() is None


def test_without_a_temporary_folder_it_stays_plain(forgotten):
    def none_usable(*arguments, **options):
        raise FileNotFoundError("no usable temporary directory")

    forgotten.setattr(library, "TemporaryDirectory", none_usable)
    with pytest.warns(UserWarning, match="plain path on the CPU: .*no usable temporary directory"):
        assert library.load_library() is None


@pytest.mark.parametrize("how", ["none", "missing", "failing"])
def test_without_a_compiler_it_says_so_once_and_stays_plain(forgotten, how, tmp_path):
    forgotten.delenv("CXX", raising=False)
    reason = "no C++ compiler is on PATH"
    if how == "none":
        forgotten.setattr(library.shutil, "which", lambda name: None)
    else:
        compiler = tmp_path / "compiler"
        if how == "failing":
            compiler.write_text("#!/bin/sh\necho unknown flag >&2\nexit 1\n")
            compiler.chmod(0o755)
        forgotten.setenv("CXX", str(compiler))
        reason = f"{compiler} could not compile it: " + ("unknown flag" if how == "failing" else "")
    model = Net()
    quantize_base(model, ["up"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast.use_fast(model)
        w = normal(100)
        q = fast.quantize_nf4(w)
        assert torch.equal(q.packed, nf4.quantize_nf4(w).packed)
        assert torch.equal(fast.dequantize_nf4(q), nf4.dequantize_nf4(q))
        assert torch.equal(fast.dequantize_to_scratch(q, torch.float32), nf4.dequantize_nf4(q))
    said = [str(warning.message) for warning in caught]
    assert len(said) == 1
    assert re.search(f"plain path on the CPU: .*{re.escape(reason)}", said[0])
    assert model.up.dequantize is nf4.dequantize_nf4


def test_it_imports_without_triton_and_compiles_nothing_then():
    code = """
        import sys
        sys.modules["triton"] = None
        from lora2qlora import fast
        assert fast.weights.triton is None
        assert fast.library.load_library.cache_info().currsize == 0
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


# 8-bit Adam.


@pytest.mark.parametrize("count", [4096, 5001, 40_000])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_takes_the_plain_steps(count, decay):
    """torch's root is not always correctly rounded, and it does not fuse everywhere: last bits differ."""
    pairs = []
    for update in (None, fast.adam_step_8bit):
        parameter = nn.Parameter(normal(count))
        optimizer = optimizers.AdamW8bit([parameter], lr=1e-2, weight_decay=decay)
        if update:
            optimizer.update = update
        pairs.append((parameter, optimizer))
    for seed in range(6):
        grad = normal(count, seed=seed) * normal(count, seed=seed + 100) ** 4
        if seed == 5:
            grad[:1024] = 0
        for parameter, optimizer in pairs:
            parameter.grad = grad.clone()
            optimizer.step()
    (plain, one), (ours, other) = pairs
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    for name in optimizers.STATES:
        a, b = (o.state[p] for o, p in ((one, plain), (other, ours)))
        torch.testing.assert_close(a[f"{name}_absmax"], b[f"{name}_absmax"], rtol=1e-5, atol=0)
        assert (a[name] != b[name]).float().mean() < 1e-3


@pytest.mark.parametrize("there", [True, False])
def test_adam_takes_the_kernel_where_there_is_one(there, monkeypatch):
    """Without a compiler the plain step is taken, to the bit."""
    calls = []
    kernel = SimpleNamespace(adam=lambda *arguments: calls.append(arguments)) if there else None
    monkeypatch.setattr(fast.adam, "load_library", lambda: kernel)
    codebooks = dynamic_codebook(), optimizers.unsigned_dynamic_codebook()
    group = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    stepped = []
    for update in (optimizers.adam_step_8bit, fast.adam_step_8bit):
        x, grad = NUMBERS.clone(), NUMBERS.flip(0)
        states = [
            BlockwiseQuantized(torch.zeros(4096, dtype=torch.uint8), torch.zeros(16), x.shape, x.dtype, 256)
            for _ in codebooks
        ]
        update(x, grad, *states, 1, group, codebooks)
        stepped.append([x, *(t for q in states for t in (q.indices, q.absmax))])
    assert len(calls) == there
    assert all(torch.equal(a, b) for a, b in zip(*stepped, strict=True)) != there


def test_adam_does_not_hang_on_the_default_dtype(other_default_dtype):
    codebooks = dynamic_codebook(), optimizers.unsigned_dynamic_codebook()
    group = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}

    def stepped():
        x, grad, zeros = NUMBERS.clone(), NUMBERS.flip(0), torch.zeros(4096, dtype=torch.uint8)
        states = [
            BlockwiseQuantized(zeros.clone(), torch.zeros(16, dtype=torch.float32), x.shape, x.dtype, 256)
            for _ in codebooks
        ]
        fast.adam_step_8bit(x, grad, *states, 1, group, codebooks)
        return [x, *(t for q in states for t in (q.indices, q.absmax))]

    got = stepped()
    torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, stepped(), strict=True))


def test_the_search_finds_every_code():
    from lora2qlora.blockwise import quantize_blockwise

    for codebook in (dynamic_codebook(), optimizers.unsigned_dynamic_codebook(), nf4_codebook()):
        middle, start = adam._search_tables(tuple(codebook.tolist()))
        x = torch.cat(
            [normal(20_000).clamp(-1, 1), middle[:-1], torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1.0])]
        )
        x = torch.cat(
            [x, middle[:-1].nextafter(torch.tensor(2.0)), middle[:-1].nextafter(torch.tensor(-2.0))]
        )
        begin = start[(x.view(torch.int32) >> 16).int() & 0xFFFF].long()
        nearest = quantize_blockwise(torch.cat([torch.ones(1), x]), codebook, len(x) + 1).indices[1:].long()
        assert (begin <= nearest).all()  # never beyond: the search only walks up
        assert ((x > middle[nearest]) == False).all()  # noqa: E712


def test_adam_hands_over_what_it_does_not_take():
    for dtype in (torch.bfloat16, torch.float16):
        plain, ours = (nn.Parameter(normal(5000, dtype=dtype)) for _ in range(2))
        for p, update in ((plain, None), (ours, fast.adam_step_8bit)):
            optimizer = optimizers.AdamW8bit([p])
            if update:
                optimizer.update = update
            p.grad = normal(5000, seed=1, dtype=dtype)
            optimizer.step()
        assert torch.equal(plain, ours)


# Triton, through its interpreter: no GPU is needed.

INTERPRETED = """
    import torch
    from lora2qlora import fast, nf4
    from lora2qlora.double_quantization import double_quantize

    torch.manual_seed(0)
    for shape in ((64, 64), (100, 48), (33, 7), (63,), (70, 130)):
        for block_size in (64, 32, 100):
            plain = nf4.quantize_nf4(torch.randn(shape), block_size)
            for q in (plain, double_quantize(plain, 16)):
                for dtype in (torch.float32, torch.float16):
                    got = fast.dequantize_triton(q, torch.full(shape, 7, dtype=dtype))
                    assert torch.equal(got, nf4.dequantize_nf4(q, dtype)), (shape, block_size, dtype)
                got = fast.dequantize_triton(q, torch.empty(shape, dtype=torch.bfloat16))
                # the interpreter cuts off what a GPU rounds
                cut = (nf4.dequantize_nf4(q, torch.float32).view(torch.int32) >> 16).to(torch.int16)
                assert torch.equal(got.view(torch.int16), cut)
                if len(shape) == 2 and shape[1] % 2 == 0:
                    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 2e-3)):
                        x = torch.randn(2, 9, shape[1]).to(dtype)
                        product = x.float() @ nf4.dequantize_nf4(q, dtype).float().T
                        y = fast.matmul_triton(x, q)
                        assert y.dtype == dtype and y.shape == product.shape
                        assert (y.float() - product).norm() < tolerance * product.norm(), (shape, dtype)
    print("all equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")
def test_triton_kernels_in_the_interpreter():
    command = [sys.executable, "-c", textwrap.dedent(INTERPRETED)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert "all equal" in done.stdout, done.stderr


def test_the_fused_product_refuses_what_does_not_fit():
    q = nf4.quantize_nf4(normal(8, 64))
    with pytest.raises(ValueError, match=re.escape("x is [3, 60] on cpu, the weight [8, 64] on cpu")):
        fast.matmul_triton(normal(3, 60), q)
    with pytest.raises(ValueError, match="even length, got 63 and 64"):
        fast.matmul_triton(normal(3, 63), nf4.quantize_nf4(normal(8, 63)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_on_a_gpu(dtype):
    pytest.importorskip("triton")
    for shape in ((64, 64), (100, 48), (33, 7), (4096, 1024)):
        plain = nf4.quantize_nf4(normal(*shape).cuda())
        for q in (plain, double_quantize(plain)):
            assert same_bits(fast.dequantize_nf4(q, dtype), nf4.dequantize_nf4(q, dtype))
            if shape[1] % 2 == 0:
                x = normal(5, shape[1], seed=1).to("cuda", dtype)
                product = x.float() @ nf4.dequantize_nf4(q, dtype).float().T
                y = fast.matmul_triton(x, q).float()
                assert (y - product).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * product.norm()


# A floor about 30 % below the figures of the chapter: make bench.


@pytest.fixture
def experiment(monkeypatch):
    """A file of companion/experiments by name, as if started there."""
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "companion" / "experiments"))
    return importlib.import_module


@pytest.fixture
def asked(request):
    """Times are taken when asked for, not in every run of all tests."""
    if "bench" not in request.config.option.markexpr:
        pytest.skip("run them with make bench")


@pytest.mark.bench
@pytest.mark.parametrize(("dtype", "floor"), [("float32", 21), ("bfloat16", 22)])
def test_quantize_is_fast(asked, experiment, dtype, floor):
    assert experiment("speed_weights").time_quantize([4096, 4096], dtype, 15)["speedup"]["fast"] > floor


@pytest.mark.bench
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch.compile's own imports
@pytest.mark.parametrize(("dtype", "floor"), [("float32", 5.0), ("bfloat16", 5.0)])
def test_dequantize_is_fast(asked, experiment, dtype, floor):
    figures = experiment("speed_weights").time_dequantize([4096, 4096], dtype, 15)
    assert figures["speedup"]["fast_buffer"] > floor
    assert figures["over_raw"]["fast_buffer"] > 0.64


@pytest.mark.bench
@pytest.mark.parametrize(("rows", "floor"), [(16, 2.3), (128, 1.25), (512, 0.86), (2048, 0.74)])
def test_a_layer_is_fast(asked, experiment, rows, floor):
    figures = experiment("speed_layer").time_layer([4096, 4096], rows, 15)
    assert figures["speedup"]["fast"] > floor
    if rows == 512:
        assert figures["time_over_lora"]["fast"] < 1.35


@pytest.mark.bench
def test_adam_is_fast(asked, experiment):
    assert experiment("speed_adam").time_adam(16_000_000, 15)["speedup"]["fast"] > 3.1


def test_the_experiment_runs_dry_and_resumes(experiment, tmp_path, monkeypatch, capsys):
    from lora2qlora.lab import measured

    monkeypatch.setattr(measured, "RECORDS", tmp_path)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # compiled in the real run
    parts = ["machine", "quantize", "dequantize", "nested", "vectors", "layer", "adam"]
    arguments = ["--small", "--rounds", "3", "--parts", *parts]
    speed = experiment("speed")
    speed.main(arguments)
    records = measured.load("speed")
    assert [r.configuration["part"] for r in records] == [
        "machine",
        *["quantize"] * 2,
        *["dequantize"] * 2,
        "nested",
        *["vectors"] * 2,
        "layer",
        "adam",
    ]
    for r in records[1:]:
        seconds = list(r.figures["seconds"].values())
        if r.configuration["part"] == "vectors":
            assert r.figures["over_plain"].keys() == {"quantize", "dequantize"}
            seconds = [times for pair in seconds for times in pair.values()]
        assert all(len(times) == 3 for times in seconds)
        assert r.configuration["rounds"] == 3
    speed.main(arguments)
    assert len(measured.load("speed")) == len(records)
    assert capsys.readouterr().out.count("recorded already") == len(records)


def test_a_speedup_is_taken_within_a_round(experiment):
    seconds = {"theirs": [2.0, 40.0, 6.0], "ours": [1.0, 10.0, 6.0]}
    assert experiment("speed_rounds").speedups(seconds, "theirs") == {"theirs": 1.0, "ours": 2.0}


def test_peaks_are_weighed_and_kernels_compared_by_the_script_itself(experiment, monkeypatch, capsys):
    speed, step, triton = (experiment(name) for name in ("speed", "speed_step", "speed_triton"))
    monkeypatch.setattr(step, "build_model", lambda name: (name, None))
    monkeypatch.setattr(step, "train_step", lambda model, optimizer, tokens: 1.0)
    monkeypatch.setattr(speed, "weigh", {"fast": 7, "plain": 8}.get)
    monkeypatch.setattr(speed, "interpreted", lambda shapes: {"compared": shapes})

    def run(command, **options):
        assert command[:2] == [sys.executable, speed.__file__]
        speed.main(command[2:])
        return subprocess.CompletedProcess(command, 0, stdout=capsys.readouterr().out)

    monkeypatch.setattr(step.subprocess, "run", run)
    assert step.time_step(["fast", "plain"], 1)["peak_bytes"] == {"fast": 7, "plain": 8}
    assert triton.run_interpreted([[2, 3]]) == {"compared": [[2, 3]]}
