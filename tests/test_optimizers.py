"""optimizers: bitsandbytes' 8-bit AdamW bit for bit, torch's in 32 bits, states on disk, paging counted."""

import copy
import inspect
import json
import math
import os
import pickle
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes import optim as bnb_optim
from bitsandbytes.backends.cpu import ops as cpu_ops
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2qlora.blockwise import BlockwiseQuantized, dequantize_blockwise, int_codebook, quantize_blockwise
from lora2qlora.double_quantization import dynamic_codebook
from lora2qlora.optimizers import (
    AdamW8bit,
    PagedMemory,
    PageTraffic,
    adam_state_bytes,
    adam_step_8bit,
    load_optimizer,
    page_traffic,
    save_optimizer,
    unsigned_dynamic_codebook,
)
from torch import nn

NUMBERS = torch.randn(5000, generator=torch.Generator().manual_seed(0))
TO_32_BITS = {"min_8bit_size": 10**9}


def gradients(shape, steps, seed=0, decades=4.0):
    """Gradients over several powers of ten, of both signs, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        size = 10 ** (-decades * torch.rand(shape, generator=generator))
        sign = torch.randint(-1, 2, shape, generator=generator)
        yield size * sign


def train(optimizer, parameter, grads):
    for grad in grads:
        parameter.grad = grad.to(parameter.dtype)
        optimizer.step()


def parameter(shape, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(shape, generator=generator).to(dtype))


def kernel_rounding(x, codebook, block_size):
    """Quantize as bitsandbytes' CPU kernel does: to one of 65,536 even steps first, then to a code."""
    q = quantize_blockwise(x, codebook, block_size)
    scaled = x * (1 / q.absmax.clamp(min=1e-38)).repeat_interleave(block_size)[: len(x)]
    even = ((scaled + 1) * 32767.5 + 0.5).int() / 32767.5 - 1
    codes = torch.bucketize(even, (codebook[:-1] + codebook[1:]) / 2).to(torch.uint8)
    return BlockwiseQuantized(codes, q.absmax, q.shape, q.dtype, block_size)


# The unsigned map.


def test_the_unsigned_map_is_bitsandbytes_to_the_last_bit():
    codebook, theirs = unsigned_dynamic_codebook(), bnb.create_dynamic_map(signed=False)
    assert torch.equal(codebook.view(torch.int32), theirs.view(torch.int32))


def test_neither_map_nor_step_hangs_on_the_default_dtype(other_default_dtype):
    def trained():
        x, grads = nn.Parameter(NUMBERS.clone()), [NUMBERS.flip(0), NUMBERS.roll(1)]
        optimizer = AdamW8bit([x], block_size=100)
        train(optimizer, x, grads)
        return {"x": x.detach(), "map": unsigned_dynamic_codebook(), **optimizer.state[x]}

    got = trained()
    torch.set_default_dtype(torch.float32)
    for name, expected in trained().items():
        assert got[name].dtype == expected.dtype
        assert torch.equal(got[name], expected)


def test_the_unsigned_map_is_what_its_docstring_says():
    expected = [0.0, 1.0]
    for decade in range(7):
        parts = 2 ** (decade + 1)
        expected += [(0.1 + 0.9 * (part + 0.5) / parts) * 10.0 ** (decade - 6) for part in range(parts)]
    assert len(expected) == 256
    torch.testing.assert_close(unsigned_dynamic_codebook(), torch.tensor(sorted(expected)))


# Against bitsandbytes and torch.


def assert_same_states(state, theirs):
    assert torch.equal(state["exp_avg"], theirs["state1"])
    assert torch.equal(state["exp_avg_sq"], theirs["state2"])
    assert torch.equal(state["exp_avg_absmax"], theirs["absmax1"])
    assert torch.equal(state["exp_avg_sq_absmax"], theirs["absmax2"])


@pytest.mark.parametrize("shape", [(4096,), (70, 100), (300, 256 + 1), (3, 2**16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_with_the_kernels_rounding_every_byte_is_bitsandbytes(shape, dtype, weight_decay):
    ours, theirs = parameter(shape, dtype), parameter(shape, dtype)
    options = {"lr": 3e-3, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": weight_decay}
    mine, other = AdamW8bit([ours], **options), bnb_optim.AdamW8bit([theirs], **options)
    mine.update = partial(adam_step_8bit, quantize=kernel_rounding)
    for grad in gradients(shape, steps=6):
        train(mine, ours, [grad])
        train(other, theirs, [grad])
        assert torch.equal(ours, theirs)
        assert_same_states(mine.state[ours], other.state[theirs])


def test_with_the_nearest_code_it_is_bitsandbytes_own_rule_for_any_device(monkeypatch):
    """bitsandbytes' default quantizer rounds to the nearest; its CPU optimizer, told to use it, is ours."""
    from bitsandbytes.backends.default import ops as default_ops

    def nearest(x, code, absmax_out, out, blocksize):
        flat = x.reshape(-1, blocksize)
        absmax = flat.abs().amax(dim=1)
        scaled = flat * (1 / absmax.clamp(min=1e-38))[:, None]
        out.copy_(torch.bucketize(scaled, (code[:-1] + code[1:]) / 2).view(x.shape))
        absmax_out.copy_(absmax)

    source = inspect.getsource(default_ops)
    assert "bounds = (code[:-1] + code[1:]) / 2" in source  # the rule restated above
    assert "q = torch.bucketize(scaled, bounds" in source
    monkeypatch.setattr(cpu_ops, "_quant_blockwise_fp32_direct", nearest)
    ours, theirs = parameter((32, 256)), parameter((32, 256))
    mine, other = AdamW8bit([ours]), bnb_optim.AdamW8bit([theirs])
    for grad in gradients((32, 256), steps=10, decades=8.0):
        train(mine, ours, [grad])
        train(other, theirs, [grad])
        assert torch.equal(ours, theirs)
        assert_same_states(mine.state[ours], other.state[theirs])


def test_the_kernel_moves_what_has_no_gradient_and_we_do_not():
    """Its 65,536 steps have no zero among them. Where this fails, a release has mended it: see chapter 12."""
    ours, theirs = nn.Parameter(torch.zeros(32, 256)), nn.Parameter(torch.zeros(32, 256))
    mine, other = AdamW8bit([ours], weight_decay=0), bnb_optim.AdamW8bit([theirs], weight_decay=0)
    grad = torch.ones(32, 256)
    grad[:, 100:] = 0
    train(mine, ours, [grad] * 5)
    train(other, theirs, [grad] * 5)
    assert (ours[:, 100:] == 0).all()
    assert (theirs[:, 100:] < 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_in_32_bits_it_is_torchs_adamw(dtype, weight_decay):
    ours, theirs = parameter((40, 30), dtype), parameter((40, 30))
    theirs.data.copy_(ours)
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": weight_decay}
    mine = AdamW8bit([ours], **options, **TO_32_BITS)
    other = torch.optim.AdamW([theirs], **options, foreach=False)
    for grad in gradients((40, 30), steps=20):
        train(mine, ours, [grad])
        train(other, theirs, [grad.to(dtype)])
        if dtype != torch.float32:  # rounded once a step
            theirs.data.copy_(theirs.to(dtype))
    tolerance = {"rtol": 2e-6, "atol": 2e-7} if dtype == torch.float32 else {"rtol": 0.02, "atol": 1e-3}
    torch.testing.assert_close(ours.float(), theirs.float(), **tolerance)
    for name in ("exp_avg", "exp_avg_sq"):
        assert mine.state[ours][name].dtype == torch.float32
        torch.testing.assert_close(mine.state[ours][name], other.state[theirs][name], rtol=1e-5, atol=3e-8)


def test_small_tensors_keep_32_bits_from_bitsandbytes_own_threshold():
    for size in (4095, 4096):
        ours, theirs = parameter((size,)), parameter((size,))
        mine, other = AdamW8bit([ours]), bnb_optim.AdamW8bit([theirs])
        grads = list(gradients((size,), steps=2))
        train(mine, ours, grads)
        train(other, theirs, grads)
        expected = torch.float32 if size == 4095 else torch.uint8
        assert mine.state[ours]["exp_avg"].dtype == other.state[theirs]["state1"].dtype == expected
        if size == 4095:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# What holds whatever the gradients are.


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 3000),
    st.integers(1, 300),
    st.integers(0, 2**16),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_first_step_is_adams_and_a_state_is_the_nearest_code(count, block_size, seed, dtype):
    ours, theirs = parameter((count,), dtype, seed), parameter((count,), dtype, seed)
    mine = AdamW8bit([ours], block_size=block_size, min_8bit_size=0)
    other = AdamW8bit([theirs], **TO_32_BITS)
    grads = list(gradients((count,), 1, seed))
    train(mine, ours, grads)
    train(other, theirs, grads)
    assert torch.equal(ours, theirs)
    for name, codebook in zip(("exp_avg", "exp_avg_sq"), mine.codebooks, strict=True):
        q = quantize_blockwise(other.state[theirs][name], codebook, block_size)
        assert torch.equal(mine.state[ours][name], q.indices)
        assert torch.equal(mine.state[ours][f"{name}_absmax"], q.absmax)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 300), st.integers(1, 700), st.integers(0, 2**16))
def test_pieces_do_not_show(count, block_size, piece, seed):
    whole, cut = parameter((count,)), parameter((count,))
    grads = list(gradients((count,), 3, seed))
    options = {"block_size": block_size, "min_8bit_size": 0}
    first, second = AdamW8bit([whole], **options), AdamW8bit([cut], **options)
    train(first, whole, grads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora2qlora.optimizers.adam.PIECE", piece)
        train(second, cut, grads)
    assert torch.equal(whole, cut)
    for name, tensor in first.state[whole].items():
        assert torch.equal(tensor, second.state[cut][name])


def test_the_layout_of_a_parameter_does_not_show():
    plain, turned = parameter((80, 64)), nn.Parameter(parameter((80, 64)).detach().T.contiguous().T)
    assert not turned.is_contiguous()
    for grad in gradients((80, 64), steps=3):
        for p, optimizer in ((plain, AdamW8bit([plain])), (turned, AdamW8bit([turned]))):
            train(optimizer, p, [grad])
    assert torch.equal(plain, turned)
    assert not turned.is_contiguous()


def test_a_learning_rate_of_zero_changes_states_and_nothing_else():
    p = parameter((64, 64))
    before = p.detach().clone()
    optimizer = AdamW8bit([p], lr=0.0, weight_decay=0.1)
    train(optimizer, p, gradients((64, 64), steps=2))
    assert torch.equal(p, before)
    assert optimizer.state[p]["exp_avg_absmax"].min() > 0


def test_parameters_without_gradients_are_skipped():
    used, unused, empty = parameter((64, 64)), parameter((64, 64)), nn.Parameter(torch.empty(0, 5))
    before = unused.detach().clone()
    optimizer = AdamW8bit([used, unused, empty], weight_decay=0.1, min_8bit_size=0)
    empty.grad = torch.empty(0, 5)
    train(optimizer, used, gradients((64, 64), steps=2))
    assert torch.equal(unused, before)
    assert unused not in optimizer.state
    assert optimizer.state[used]["step"] == optimizer.state[empty]["step"] == 2


def test_groups_have_their_own_options_and_schedulers_work():
    slow, fast = parameter((64, 64)), parameter((64, 64))
    optimizer = AdamW8bit([{"params": [slow], "lr": 0.0}, {"params": [fast]}], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    start = fast.detach().clone()
    for p in (slow, fast):
        p.grad = torch.ones_like(p)
    optimizer.step()
    schedule.step()
    assert torch.equal(slow, start)
    assert not torch.equal(fast, start)
    assert optimizer.param_groups[1]["lr"] == 5e-3


def test_a_closure_is_called_with_gradients_on():
    p = parameter((8,))
    optimizer = AdamW8bit([p])

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    before = p.square().sum().item()
    assert optimizer.step(closure).item() == pytest.approx(before)
    assert p.square().sum() < before


def test_a_real_model_learns_as_with_32_bits():
    losses = {}
    for name, options in {"8 bits": {"min_8bit_size": 0}, "32 bits": TO_32_BITS}.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 1))
        x = torch.randn(256, 32)
        y = x[:, :4].prod(dim=1, keepdim=True)
        optimizer = AdamW8bit(model.parameters(), lr=1e-2, **options)
        for _ in range(150):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item() / y.square().mean().item()
    assert losses["8 bits"] < 0.1
    assert losses["32 bits"] < 0.1


# What linear codes do to the second moment.


def linear_codebooks():
    return int_codebook(8), torch.linspace(0, 1, 256)


@pytest.mark.parametrize("share", [0.04, 0.001])
def test_linear_codes_take_steps_too_long(share):
    """v / max v < 1/510 becomes 0, and a step is 1 / sqrt(1 - beta2) times too long; dynamic codes hold."""
    steps = {}
    for name, codebooks in {"linear": linear_codebooks(), "dynamic": None}.items():
        p = nn.Parameter(torch.zeros(16, 256))
        optimizer = AdamW8bit([p], lr=1.0, weight_decay=0, betas=(0.0, 0.99), codebooks=codebooks)
        grad = torch.full((16, 256), share)
        grad[:, 0] = 1
        train(optimizer, p, [grad] * 600)
        before = p.detach().clone()
        train(optimizer, p, [grad])
        steps[name] = (p - before)[:, 1:].abs().mean().item()
    bias = math.sqrt(1 - 0.99**601)
    assert steps["linear"] == pytest.approx(bias / math.sqrt(0.01), rel=1e-3)
    assert steps["dynamic"] == pytest.approx(1, rel=0.15)


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr and weight_decay"),
        ({"lr": math.nan}, "lr and weight_decay"),
        ({"weight_decay": -0.1}, "lr and weight_decay"),
        ({"betas": (0.9, 1.0)}, "betas are two numbers"),
        ({"betas": (-0.1, 0.9)}, "betas are two numbers"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"eps": math.inf}, "eps must be positive"),
        ({"block_size": 0}, "block_size must be"),
        ({"codebooks": (dynamic_codebook(), dynamic_codebook())}, "negative values"),
        ({"codebooks": (dynamic_codebook(), torch.tensor([-0.5, 0.0, 1.0]))}, "negative values"),
        ({"codebooks": (dynamic_codebook(), torch.ones(3))}, "ascends"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdamW8bit([parameter((4,))], **options)


def test_a_refused_group_is_not_added():
    optimizer = AdamW8bit([parameter((4,))])
    with pytest.raises(ValueError, match="eps"):
        optimizer.add_param_group({"params": [parameter((4,))], "eps": -1.0})
    with pytest.raises(TypeError, match=r"parameter 0 of the group is torch\.float64"):
        optimizer.add_param_group({"params": [parameter((4,), torch.float64)]})
    with pytest.raises(ValueError, match="block_size=64, this optimizer's is 256"):
        optimizer.add_param_group({"params": [parameter((4,))], "block_size": 64})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("lr", math.nan, "lr and weight_decay must be finite and not negative, got nan"),
        ("lr", -1.0, "lr and weight_decay must be finite and not negative, got -1.0"),
        ("block_size", 64, "block_size=64, this optimizer's is 256"),
    ],
)
def test_an_option_set_out_of_range_later_is_refused_and_nothing_is_changed(name, bad, message):
    good, wrong = parameter((64, 64)), parameter((33,))
    optimizer = AdamW8bit([{"params": [good]}, {"params": [wrong]}])
    steps_of(optimizer, [good, wrong], [0])
    before = copies(good, wrong, *tensors_of(optimizer))
    optimizer.param_groups[1][name] = bad
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all(map(torch.equal, (good, wrong, *tensors_of(optimizer)), before))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_a_gradient_that_is_not_finite_is_named_and_nothing_is_changed(bad):
    good, wrong = parameter((64, 64)), parameter((5, 1000))
    optimizer = AdamW8bit([{"params": [good]}, {"params": [wrong]}])
    for p in (good, wrong):
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = [p.detach().clone() for p in (good, wrong)]
    states = json.dumps(
        {i: {k: v.tolist() for k, v in s.items()} for i, s in optimizer.state_dict()["state"].items()}
    )
    wrong.grad[3, 7] = bad
    with pytest.raises(
        ValueError, match=r"parameter 1, of shape \[5, 1000\], .* in 1 of 5000 places: nothing"
    ):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip((good, wrong), before, strict=True))
    after = json.dumps(
        {i: {k: v.tolist() for k, v in s.items()} for i, s in optimizer.state_dict()["state"].items()}
    )
    assert after == states


def test_a_sparse_gradient_is_a_type_error():
    p = parameter((8, 4))
    optimizer = AdamW8bit([p])
    p.grad = torch.sparse_coo_tensor([[0], [1]], [1.0], (8, 4), check_invariants=True)
    with pytest.raises(TypeError, match=r"gradient of parameter 0 is torch.sparse_coo"):
        optimizer.step()


# States on disk.


def pair(dtype=torch.float32):
    return [parameter((70, 100), dtype), parameter((33,), dtype)]


def steps_of(optimizer, parameters, seeds):
    for seed in seeds:
        for p in parameters:
            p.grad = next(gradients(p.shape, 1, seed)).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["memory", "file"])
def test_a_resumed_run_is_an_uninterrupted_one(dtype, way, tmp_path):
    straight, cut = pair(dtype), pair(dtype)
    one, first = AdamW8bit(straight, lr=1e-2), AdamW8bit(cut, lr=1e-2)
    steps_of(one, straight, range(6))
    steps_of(first, cut, range(3))
    resumed = [nn.Parameter(p.detach().clone()) for p in cut]
    second = AdamW8bit(resumed, lr=7.0)
    if way == "memory":
        second.load_state_dict(first.state_dict())
    else:
        save_optimizer(first, tmp_path / "state.safetensors")
        load_optimizer(second, tmp_path / "state.safetensors")
    steps_of(first, cut, [99])  # what was loaded is a copy
    steps_of(second, resumed, range(3, 6))
    for a, b in zip(straight, resumed, strict=True):
        assert torch.equal(a, b)
        for name, tensor in one.state[a].items():
            loaded = second.state[b][name]
            assert torch.equal(tensor, loaded)
            assert tensor.dtype == loaded.dtype
    assert second.param_groups[0]["lr"] == 1e-2


def test_torchs_adamw_goes_through_the_same_file(tmp_path):
    ours, theirs = parameter((5, 6)), parameter((5, 6))
    one, other = torch.optim.AdamW([ours]), torch.optim.AdamW([theirs])
    train(one, ours, gradients((5, 6), 2))
    save_optimizer(one, tmp_path / "adamw.safetensors")
    load_optimizer(other, tmp_path / "adamw.safetensors")
    assert torch.equal(one.state[ours]["exp_avg"], other.state[theirs]["exp_avg"])


def tensors_of(optimizer):
    return [tensor for state in optimizer.state.values() for tensor in state.values()]


def copies(*tensors):
    return [tensor.detach().clone() for tensor in tensors]


def refuses(optimizer, saved, message):
    """The state is refused with this message, and the optimizer and its parameters are what they were."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    groups, before = str(optimizer.state_dict()["param_groups"]), copies(*parameters, *tensors_of(optimizer))
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert str(optimizer.state_dict()["param_groups"]) == groups
    assert all(map(torch.equal, [*parameters, *tensors_of(optimizer)], before))


def trained_pair():
    parameters = pair()
    optimizer = AdamW8bit(parameters)
    steps_of(optimizer, parameters, range(2))
    return optimizer


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ([(100, 70), (33,)], {}, r"state of parameter 0 does not fit: .*\[70, 100\].*\[100, 70\]"),
        ([(70, 100), (34,)], {}, "state of parameter 1 does not fit"),
        ([(70, 100)], {}, r"groups of \[1\] parameters, the state is for \[2\]"),
        ([(70, 100), (33,)], {"block_size": 64}, "got a group with block_size=256, this optimizer's is 64"),
        ([(70, 100), (33,)], TO_32_BITS, "parameter 0 does not fit: .*uint8"),
    ],
)
def test_a_state_for_other_shapes_is_refused_and_nothing_changes(shapes, options, message):
    parameters = [parameter(shape) for shape in shapes]
    optimizer = AdamW8bit(parameters, lr=0.5, **options)
    steps_of(optimizer, parameters, [0])
    before = {i: {k: v.clone() for k, v in s.items()} for i, s in optimizer.state_dict()["state"].items()}
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(trained_pair().state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(tensor, before[index][name]) for name, tensor in state.items())


def test_a_state_of_an_unknown_parameter_is_refused():
    saved = trained_pair().state_dict()
    saved["state"][7] = saved["state"][0]
    with pytest.raises(ValueError, match="for a parameter 7"):
        AdamW8bit(pair()).load_state_dict(saved)


@pytest.mark.parametrize("way", ["memory", "file"])
def test_a_block_size_travels_with_the_state_even_where_the_blocks_are_as_many(way, tmp_path):
    weight = parameter((5000,))
    trained = AdamW8bit([weight])
    train(trained, weight, gradients((5000,), 1))
    saved, other = trained.state_dict(), AdamW8bit([parameter((5000,))], block_size=250)
    assert len(saved["state"][0]["exp_avg_absmax"]) == 5000 / 250
    if way == "file":
        save_optimizer(trained, tmp_path / "state.safetensors")
        with pytest.raises(ValueError, match="block_size=256, this optimizer's is 250"):
            load_optimizer(other, tmp_path / "state.safetensors")
        assert other.state_dict()["state"] == {}
    refuses(other, saved, "block_size=256, this optimizer's is 250")
    del saved["param_groups"][0]["block_size"]
    refuses(other, saved, r"the options of a group lack \['block_size'\]")


def test_a_state_of_torchs_adamw_is_taken_where_it_is_in_32_bits():
    ours, theirs = parameter((64, 64)), parameter((64, 64))
    mine, other = AdamW8bit([ours], **TO_32_BITS), torch.optim.AdamW([theirs], lr=0.5)
    train(other, theirs, gradients((64, 64), 2))
    mine.load_state_dict(other.state_dict())
    assert torch.equal(mine.state[ours]["exp_avg_sq"], other.state[theirs]["exp_avg_sq"])
    assert mine.param_groups[0]["lr"] == 0.5
    train(mine, ours, gradients((64, 64), 1))
    assert mine.state_dict()["param_groups"][0]["block_size"] == 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr and weight_decay must be finite and not negative, got -1.0"),
        ({"lr": math.nan}, "lr and weight_decay must be finite and not negative, got nan"),
        ({"betas": [1.5, 1.5]}, "betas are two numbers"),
        ({"eps": 0}, "eps must be positive"),
        ({"maximize": True}, "maximize=True is not implemented, need maximize=False"),
        ({"amsgrad": True}, "amsgrad=True is not implemented"),
        ({"differentiable": True}, "differentiable=True is not implemented"),
        ({"decoupled_weight_decay": False}, "need decoupled_weight_decay=True"),  # torch's Adam
    ],
)
def test_options_in_a_state_are_checked_as_any(options, message):
    saved, optimizer = trained_pair().state_dict(), trained_pair()
    saved["param_groups"][0].update(options)
    refuses(optimizer, saved, message)


@pytest.mark.parametrize("name", ["lr", "betas", "eps", "weight_decay", "params"])
def test_a_state_without_an_option_is_refused(name):
    saved, optimizer = trained_pair().state_dict(), trained_pair()
    del saved["param_groups"][0][name]
    refuses(optimizer, saved, "the state is for" if name == "params" else rf"lack \['{name}'\]")


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("index", "name"),
    [
        (0, "exp_avg_absmax"), (0, "exp_avg_sq_absmax"), (0, "step"),
        (1, "exp_avg"), (1, "exp_avg_sq"), (1, "step"),
    ],
)  # fmt: skip
def test_values_that_no_state_can_have_are_refused(index, name, bad):
    saved, optimizer = trained_pair().state_dict(), trained_pair()
    saved["state"][index][name].view(-1)[-1] = bad
    if name == "exp_avg" and bad == -1:
        optimizer.load_state_dict(saved)
    else:
        need = "finite" if name == "exp_avg" else "finite and not negative"
        refuses(optimizer, saved, f"{name} of parameter {index} must be {need}, got numbers from")


def test_the_state_of_a_parameter_without_elements_is_taken():
    saved, loaded = (AdamW8bit([nn.Parameter(torch.zeros(0, 4))]) for _ in range(2))
    for optimizer in (saved, loaded):
        train(optimizer, optimizer.param_groups[0]["params"][0], [torch.zeros(0, 4)])
    loaded.load_state_dict(saved.state_dict())
    assert [int(state["step"]) for state in loaded.state.values()] == [1]


def test_a_folder_or_a_file_of_broken_groups_is_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(ValueError, match="is a folder, need a file"):
        load_optimizer(trained_pair(), tmp_path)
    path = tmp_path / "state.safetensors"
    options = {"lr": 1.0, "eps": 1.0, "weight_decay": 0.0, "block_size": 256}
    for groups, message in (
        ([options], "no optimizer's state .*params"),
        ([{"params": 2}], "no optimizer's state .*params are no list"),
        (7, "no optimizer's state"),
        ([{"params": [0, 1], **options}], r"lack \['betas'\], got"),
    ):
        save_file({"0.step": torch.ones(())}, path, metadata={"param_groups": json.dumps(groups)})
        optimizer = trained_pair()
        before = copies(*tensors_of(optimizer))
        with pytest.raises(ValueError, match=message):
            load_optimizer(optimizer, path)
        assert all(map(torch.equal, tensors_of(optimizer), before))
    save_file({}, path, metadata={"param_groups": json.dumps([options])})
    with pytest.raises(ValueError, match="no optimizer's state"):
        load_optimizer(torch.optim.AdamW(pair()), path)


def test_a_file_cut_short_is_refused_and_a_failed_write_keeps_the_old(tmp_path, monkeypatch):
    path, optimizer = tmp_path / "state.safetensors", trained_pair()
    save_optimizer(optimizer, path)
    whole = path.read_bytes()

    def fails(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("lora2qlora.optimizers.state_file.save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        save_optimizer(optimizer, path)
    assert path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]
    for damaged in (whole[:100], whole[:-10], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="cut short"):
            load_optimizer(AdamW8bit(pair()), path)
    with pytest.raises(FileNotFoundError):
        load_optimizer(AdamW8bit(pair()), tmp_path / "none.safetensors")


def test_a_file_of_other_tensors_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="no optimizer's state"):
        load_optimizer(AdamW8bit(pair()), tmp_path / "weights.safetensors")


# Bytes.


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 9000), min_size=1, max_size=4),
    st.integers(1, 600),
    st.sampled_from([0, 4096, 10**9]),
)
def test_bytes_are_what_the_optimizer_holds(sizes, block_size, threshold):
    parameters = [parameter((size,)) for size in sizes]
    optimizer = AdamW8bit(parameters, block_size=block_size, min_8bit_size=threshold)
    steps_of(optimizer, parameters, [0])
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    bits = 32 if threshold == 10**9 else 8
    assert held == adam_state_bytes(sizes, bits, block_size, threshold)


def test_bytes_of_torchs_adamw_and_a_closed_form():
    parameters = pair()
    optimizer = torch.optim.AdamW(parameters)
    steps_of(optimizer, parameters, [0])
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert held == adam_state_bytes([7000, 33], bits=32) == 8 * 7033 + 4 * 2
    assert adam_state_bytes([2**20]) == 2 * 2**20 + 8 * 2**12 + 4
    assert adam_state_bytes([4096, 4095]) == 2 * 4096 + 8 * 16 + 4 + 8 * 4095 + 4
    with pytest.raises(ValueError, match="8 or 32 bits, got 4"):
        adam_state_bytes([1], bits=4)


@pytest.mark.parametrize("bad", [-5, 5000.5, True, "7"])
def test_sizes_that_none_can_be_are_refused(bad):
    with pytest.raises(ValueError, match=f"sizes are ints of at least 0, got {bad!r}"):
        adam_state_bytes([10, bad])
    with pytest.raises(ValueError, match="block_size must be an int of at least 1, got 0"):
        adam_state_bytes([10], block_size=0)
    with pytest.raises(ValueError, match=f"state_bytes are ints of at least 0, got {bad!r}"):
        page_traffic([10, bad], 100, [0], 0, page_bytes=10)


def test_the_update_needs_little_memory_besides(monkeypatch):
    """No tensor as large as the states in 32 bits is made: the largest has a piece's elements."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in kept:
                self.seen = max(self.seen, result.numel())
            return result

    p = parameter((1024, 1024))
    optimizer = AdamW8bit([p])
    p.grad = torch.randn_like(p)
    optimizer.step()
    tensors = [p, p.grad, *optimizer.state[p].values()]
    kept = {t.untyped_storage().data_ptr() for t in tensors}
    with Largest() as largest:
        optimizer.step()
    assert 2**15 < largest.seen <= 2**16


# Paging.


def naive_paging(accesses, room):
    """(in, out) pages of least-recently-used eviction, from a list and the rule alone."""
    resident, gone, moved_in, moved_out = [], set(), 0, 0
    for page in accesses:
        if page in resident:
            resident.remove(page)
        else:
            moved_in += page in gone
            if len(resident) == room:
                gone.add(resident.pop(0))
                moved_out += 1
        resident.append(page)
    return moved_in, moved_out, resident


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=80), st.integers(1, 14))
def test_pages_are_evicted_by_least_recent_use(accesses, room):
    memory = PagedMemory(10 * room + 9, page_bytes=10)
    for page in accesses:
        memory.touch(page)
    moved_in, moved_out, resident = naive_paging(accesses, room)
    assert (memory.in_bytes, memory.out_bytes) == (10 * moved_in, 10 * moved_out)
    assert memory.resident == resident


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), max_size=60))
def test_pages_are_never_lost_and_never_too_many(events):
    memory, touched = PagedMemory(200, page_bytes=10), set()
    for is_touch, number in events:
        if is_touch and memory.room:
            memory.touch(number)
            touched.add(number)
            assert memory.resident[-1] == number
        elif not is_touch:
            memory.reserve(10 * number)
        assert len(memory.resident) <= memory.room
        assert memory.out_bytes - memory.in_bytes == 10 * (len(touched) - len(memory.resident))


@pytest.mark.parametrize(("states", "room"), [(8, 8), (8, 7), (8, 4), (8, 1), (8, 20)])
def test_the_cliff(states, room):
    """In cyclic order nothing moves where all fits, and everything where one page does not."""
    steps = page_traffic([states * 10], room * 10, [0] * 5, 0, page_bytes=10)
    moved = 0 if room >= states else 10 * states
    assert all(step == PageTraffic(moved, moved) for step in steps[1:])
    assert steps[0] == PageTraffic(10 * max(0, states - room), 0)


def test_a_spike_costs_what_it_evicts_out_and_in_and_then_nothing():
    peaks = [50, 50, 90, 50, 50]
    steps = page_traffic([30, 10], 100, peaks, 40, page_bytes=10)
    assert steps == [PageTraffic(0, 0)] * 2 + [PageTraffic(30, 30)] + [PageTraffic(0, 0)] * 2


def test_a_page_is_two_mebibytes_unless_told():
    steps = page_traffic([1, 2**21, 2**21 + 1], 3 * 2**21, [0] * 2, 0)
    assert steps == [PageTraffic(2**21, 0), PageTraffic(4 * 2**21, 4 * 2**21)]
    assert PagedMemory(2**23).page_bytes == 2**21


def test_each_tensor_has_pages_of_its_own():
    """11 + 11 bytes on pages of 10 are 4 pages: 30 bytes of room are too few, 40 are enough."""
    assert page_traffic([11, 11], 30, [0] * 3, 0, page_bytes=10)[2] == PageTraffic(40, 40)
    assert page_traffic([11, 11], 40, [0] * 3, 0, page_bytes=10)[2] == PageTraffic(0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([10], 0, [0], 0), "capacity_bytes must be"),
        (([10], 100, [101], 0, 10), "out of memory: 101 bytes that cannot be paged, on a device of 100"),
        (([10], 100, [0], 95, 10), "no room for a page of 10 bytes beside 95"),
        (([10], 100, [-1], 0, 10), "out of memory: -1"),
    ],
)
def test_a_device_too_small_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        page_traffic(*arguments)


def test_what_a_state_reads_back_as():
    """The two moments read back from the codes are within half a step of the true ones."""
    p, exact = parameter((64, 256)), parameter((64, 256))
    optimizer, other = AdamW8bit([p]), AdamW8bit([exact], **TO_32_BITS)
    grads = list(gradients((64, 256), 1))
    train(optimizer, p, grads)
    train(other, exact, grads)
    for name, codebook in zip(("exp_avg", "exp_avg_sq"), optimizer.codebooks, strict=True):
        state = optimizer.state[p]
        absmax = state[f"{name}_absmax"]
        q = BlockwiseQuantized(state[name].view(-1), absmax, p.shape, torch.float32, 256)
        error = (dequantize_blockwise(q, codebook) - other.state[exact][name]).abs() / absmax[:, None]
        assert error.max() <= codebook.diff().max() / 2 * (1 + 1e-5)


def test_a_save_that_fails_at_the_last_moment_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    weight = nn.Parameter(torch.randn(5000))
    optimizer = AdamW8bit([weight])
    for _ in range(2):
        weight.grad = torch.randn(5000)
        optimizer.step()
        if not path.exists():
            save_optimizer(optimizer, path)
            before = path.read_bytes()

    def fail(*paths):
        raise OSError("no space left on device")

    monkeypatch.setattr("lora2qlora.optimizers.state_file.os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        save_optimizer(optimizer, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# On an error nothing is changed; a copy is whole.


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.clear(), "a state dict has state and param_groups"),
        (lambda s: s.pop("state"), "a state dict has state and param_groups"),
        (lambda s: s.update(param_groups={}), "a state dict has"),
        (lambda s: s.update(param_groups=[3]), "a state dict has"),
        (lambda s: s["state"].update({0: [1]}), "a state dict has"),
        (lambda s: s["param_groups"][0].update(params=7), r"the state is for \[0\]"),
        (lambda s: s["param_groups"][0].update(params=[0, 0]), "params are ints, each once"),
        (lambda s: s["param_groups"][0].update(params=[0, "1"]), "params are ints, each once"),
        (lambda s: s["param_groups"][0].update(params=[0, [1]]), "params are ints, each once"),
        (lambda s: s["param_groups"][0].update(lr="0.1"), "got 0.1"),
        (lambda s: s["param_groups"][0].update(lr=None), "got None"),
        (lambda s: s["param_groups"][0].update(lr=True), "got True"),
        (lambda s: s["param_groups"][0].update(lr=10**400), "got 1000"),
        (lambda s: s["param_groups"][0].update(lr=1e39), "got 1e"),
        (lambda s: s["param_groups"][0].update(lr=3e38), r"lr / \(1 - beta1\).*e\+39"),
        (lambda s: s["param_groups"][0].update(lr=1e30, weight_decay=1e30), r"weight_decay must .*1e\+60"),
        (lambda s: s["param_groups"][0].update(weight_decay=[1]), r"got 0.001, \[1\]"),
        (lambda s: s["param_groups"][0].update(betas=0.9), "betas are two numbers"),
        (lambda s: s["param_groups"][0].update(betas=["a", "b"]), "betas are two numbers"),
        (lambda s: s["param_groups"][0].update(eps=1e-50), "eps must be positive"),
        (lambda s: s["param_groups"][0].update(eps=10**400), "eps must be positive"),
        (lambda s: s["param_groups"][0].update(eps=2**63), "eps must be positive"),
        (lambda s: s["param_groups"][0].update(lr=2**64), "got 18446744073709551616"),
        (lambda s: s["param_groups"][0].update(maximize=torch.zeros(2)), "maximize=.*is not implemented"),
        (lambda s: s["param_groups"][0].update(block_size=torch.ones(2)), "got a group with block_size="),
        (lambda s: s["state"][0].update(step=s["state"][0]["step"].to_sparse()), "sparse_coo"),
        (lambda s: s["state"][0].update(exp_avg=s["state"][0]["exp_avg"].to_sparse()), "sparse_coo"),
        (lambda s: s["state"][0].update(step=3.0), "does not fit: .*'step': 'float'"),
        (lambda s: s["state"][0].update(exp_avg=None), "'exp_avg': 'NoneType'"),
        (lambda s: s["state"][1].update(exp_avg=s["state"][1]["exp_avg"].to("meta")), "on meta"),
        (lambda s: s["state"][0].pop("exp_avg_sq_absmax"), "state of parameter 0 does not fit"),
        (lambda s: s["state"][0].update({3: torch.ones(1)}), "state of parameter 0 does not fit"),
        (lambda s: s["state"].update({"x": {"step": torch.ones(())}}), "for a parameter x"),
    ],
)
def test_a_damaged_state_is_refused_by_what_is_wrong_and_nothing_changes(spoil, message):
    saved, optimizer = trained_pair().state_dict(), trained_pair()
    spoil(saved)
    refuses(optimizer, saved, message)


def test_what_is_no_state_dict_is_refused():
    for wrong in (None, 3, [], "state"):
        refuses(trained_pair(), wrong, "a state dict has state and param_groups")


def test_codes_beyond_a_smaller_codebook_are_refused_when_they_are_loaded():
    """Else a step would find out, with some parameters changed and others not."""
    small = (int_codebook(4), torch.linspace(0, 1, 15))
    optimizer = AdamW8bit(pair(), codebooks=small)
    refuses(
        optimizer, trained_pair().state_dict(), "exp_avg of parameter 0 has code .* beyond a codebook of 15"
    )


def test_memory_that_does_not_suffice_for_a_state_leaves_the_old_one(monkeypatch):
    saved, optimizer = trained_pair().state_dict(), trained_pair()
    before, copy_of = copies(*tensors_of(optimizer)), torch.Tensor.to

    def fails(tensor, *arguments, **options):
        if tensor.shape == (33,):
            raise MemoryError("out of memory")
        return copy_of(tensor, *arguments, **options)

    saved["param_groups"][0]["lr"] = 0.5
    monkeypatch.setattr(torch.Tensor, "to", fails)
    with pytest.raises(MemoryError):
        optimizer.load_state_dict(saved)
    assert all(map(torch.equal, tensors_of(optimizer), before))
    assert optimizer.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_of_an_optimizer_takes_the_same_steps(way):
    from lora2qlora import fast

    codebooks = (dynamic_codebook(), unsigned_dynamic_codebook())
    parameters = pair()
    optimizer = AdamW8bit(parameters, lr=0.1, block_size=64, min_8bit_size=10, codebooks=codebooks)
    optimizer.update = fast.adam_step_8bit
    steps_of(optimizer, parameters, range(2))
    twin = way(optimizer)
    assert (twin.block_size, twin.min_8bit_size, twin.update) == (64, 10, fast.adam_step_8bit)
    theirs = [p for group in twin.param_groups for p in group["params"]]
    assert not any(a is b for a, b in zip(parameters, theirs, strict=True))
    steps_of(twin, theirs, [5])
    before = copies(*theirs)
    steps_of(optimizer, parameters, [5])
    assert all(map(torch.equal, parameters, before))
    assert all(map(torch.equal, theirs, before))
    twin.load_state_dict(optimizer.state_dict())


def full_disk(monkeypatch):
    from safetensors import SafetensorError

    def fails(tensors, target, metadata):
        target.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("lora2qlora.optimizers.state_file.save_file", fails)


def test_a_full_disk_is_an_oserror_and_the_old_file_stays(tmp_path, monkeypatch):
    path, optimizer = tmp_path / "state.safetensors", trained_pair()
    save_optimizer(optimizer, path)
    whole = path.read_bytes()
    full_disk(monkeypatch)
    with pytest.raises(OSError, match=r"state\.safetensors could not be written, the old .*space"):
        save_optimizer(optimizer, path)
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from lora2qlora.optimizers import AdamW8bit, save_optimizer, state_file

def dies(tensors, target, metadata):
    target.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

state_file.save_file = dies
save_optimizer(AdamW8bit([torch.nn.Parameter(torch.zeros(3))]), Path(sys.argv[1], "state.safetensors"))
"""


def test_what_a_killed_save_left_is_tidied_by_the_next_of_that_file(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    (left,) = tmp_path.iterdir()
    other = tmp_path / ".writing-other"
    other.mkdir()
    (other / "adapter_config.json").write_text("{}")
    (tmp_path / ".writing-file").write_text("a file")
    save_optimizer(trained_pair(), tmp_path / "state.safetensors")
    assert not left.exists()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"state.safetensors", ".writing-other", ".writing-file"}
    load_optimizer(AdamW8bit(pair()), tmp_path / "state.safetensors")


def test_what_cannot_be_tidied_does_not_keep_the_rest(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / f".writing-{name}").mkdir()
        (tmp_path / f".writing-{name}" / "state.safetensors").touch()
    remove, calls = os.unlink, []

    def refuse_once(path, **options):
        calls.append(path)
        if len(calls) == 1:
            raise PermissionError(f"not yours: {path}")
        remove(path, **options)

    monkeypatch.setattr(os, "unlink", refuse_once)
    save_optimizer(trained_pair(), tmp_path / "state.safetensors")
    assert len(list(tmp_path.glob(".writing-*"))) == 1
    load_optimizer(AdamW8bit(pair()), tmp_path / "state.safetensors")


def test_two_writers_do_not_tidy_each_other_away(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    path, optimizer, waits = tmp_path / "state.safetensors", trained_pair(), [True]

    def second_writer_meanwhile(tensors, target, metadata):
        if waits.pop():
            waits.append(False)
            save_optimizer(optimizer, path)
            assert target.parent.exists()
            waits.append(True)
        save_file(tensors, target, metadata=metadata)

    monkeypatch.setattr("lora2qlora.optimizers.state_file.save_file", second_writer_meanwhile)
    save_optimizer(optimizer, path)
    assert list(tmp_path.iterdir()) == [path]
    load_optimizer(AdamW8bit(pair()), path)


def test_states_and_options_that_a_file_cannot_hold_are_named(tmp_path):
    p = parameter((4,))
    plain = torch.optim.SGD([p])
    plain.state[p]["momentum_buffer"] = None
    with pytest.raises(ValueError, match=r"0\.momentum_buffer is a NoneType: states of tensors alone"):
        save_optimizer(plain, tmp_path / "state.safetensors")
    scheduled = AdamW8bit([parameter((4,))], lr=torch.tensor(0.1))
    with pytest.raises(ValueError, match="options of plain numbers alone can be saved"):
        save_optimizer(scheduled, tmp_path / "state.safetensors")
    assert not list(tmp_path.iterdir())


def test_groups_nested_beyond_measure_are_no_state(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "state.safetensors"
    save_file({"0.step": torch.ones(())}, path, metadata={"param_groups": "[" * 100_000})
    with pytest.raises(ValueError, match="no optimizer's state"):
        load_optimizer(AdamW8bit(pair()), path)
