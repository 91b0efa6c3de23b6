"""Sharding: NF4 bytes as parameters, the same bits whole and divided, state and adapters in and out."""

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2qlora.adapters import save_adapter
from lora2qlora.memory import storage_bytes
from lora2qlora.sharding import make_plain, make_shardable, shard
from processes import together
from safetensors.torch import load_file
from sharded import (
    ids_of,
    layers_of,
    losses_of,
    no_cast,
    odd_model,
    one_layer,
    same_bits,
    train_sharded,
)
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

SHAPES = [(16, 64), (7, 9), (1, 1), (3, 64), (64, 3), (33, 130)]


@pytest.fixture
def as_rank():
    """A group of many ranks of which this process is one, and the others are not there."""

    def be(rank: int, ranks: int) -> None:
        leave()
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())

    def leave():
        if dist.is_initialized():
            dist.destroy_process_group()

    yield be
    leave()


# --- bytes as parameters -----------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [True, False])
def test_shardable_is_the_same_layer_and_plain_again(double_quant):
    plain, model = (odd_model(double_quant=double_quant) for _ in range(2))
    size = storage_bytes(model)
    names = make_shardable(model)
    assert names == list(layers_of(model))
    integers = {n for n, p in model.named_parameters() if not p.is_floating_point()}
    kinds = ("packed", "codes") if double_quant else ("packed",)
    assert integers == {f"{name}.{kind}" for name in names for kind in kinds}
    assert not any(p.requires_grad for n, p in model.named_parameters() if n in integers)
    floats = {n.rsplit(".", 1)[1] for n, _ in model.named_buffers() if "proj" in n}
    assert floats == ({"scales", "offset"} if double_quant else {"absmax"})
    assert storage_bytes(model) == size
    assert list(model.state_dict()) != []
    assert set(model.state_dict()) == set(plain.state_dict())
    assert losses_of(model, ids_of(), 2) == losses_of(plain, ids_of(), 2)
    assert make_plain(model) == names
    assert [n for n, _ in model.named_buffers()] == [n for n, _ in plain.named_buffers()] or set(
        dict(model.named_buffers())
    ) == set(dict(plain.named_buffers()))
    assert make_plain(model) == []
    assert losses_of(model, ids_of(), 2) == losses_of(plain, ids_of(), 2)


@pytest.mark.parametrize("assign", [True, False])
def test_a_state_of_either_kind_loads_into_the_other(assign):
    plain, shardable = odd_model(1), odd_model(2)
    make_shardable(shardable)
    for source, target in ((plain, shardable), (shardable, odd_model(3))):
        frozen = {n for n, p in target.named_parameters() if not p.requires_grad}
        target.load_state_dict(source.state_dict(), assign=assign)
        assert all(torch.equal(v, source.state_dict()[k]) for k, v in target.state_dict().items())
        assert {n for n, p in target.named_parameters() if not p.requires_grad} == frozen
    state = plain.state_dict()
    key = next(k for k in state if k.endswith("packed"))
    with pytest.raises(RuntimeError, match="never cast"):
        shardable.load_state_dict(state | {key: state[key].float()})


def test_a_cast_leaves_the_bytes():
    model, plain = odd_model(), odd_model()
    make_shardable(model)
    model.to(torch.float16)
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.dequantize(layer.weight), layers_of(plain)[name].dequantize(layer.weight))
        assert (layer.packed.dtype, layer.scales.dtype) == (torch.uint8, torch.float32)


# --- what each rank holds ------------------------------------------------------------------------------


@settings(max_examples=25)
@given(out=st.integers(1, 40), in_=st.integers(1, 40), ranks=st.integers(1, 9))
def test_every_rank_holds_its_part_and_all_of_them_the_whole(out, in_, ranks):
    count = out * in_
    packed, codes = -(-count // 2), -(-count // 64)
    held = {"packed": 0, "codes": 0}
    try:
        for rank in range(ranks):
            dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
            model = one_layer(out, in_, True)
            original = {name: getattr(model[0], name).clone() for name in held}
            shard(model, blocks=[model[0]])
            for name, size in (("packed", packed), ("codes", codes)):
                part, most = getattr(model[0], name).to_local(), -(-size // ranks)
                assert torch.equal(part, original[name][rank * most : (rank + 1) * most])
                assert storage_bytes(part) == most  # padded: all ranks take as much
                held[name] += part.numel()
            dist.destroy_process_group()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert held == {"packed": packed, "codes": codes}


def test_each_block_is_gathered_by_itself(as_rank):
    as_rank(0, 2)
    model = odd_model()
    names = shard(model)
    groups = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    assert groups == ["", *names]


# --- refused -----------------------------------------------------------------------------------------------


def refused(model, error, words, **options):
    """`shard` raises, and the model is as it was."""
    before = {n: (type(p), id(p)) for n, p in [*model.named_parameters(), *model.named_buffers()]}
    with pytest.raises(error, match=words):
        shard(model, **options)
    assert before == {n: (type(p), id(p)) for n, p in [*model.named_parameters(), *model.named_buffers()]}


def test_without_a_group():
    refused(odd_model(), ValueError, "no process group.*torchrun")


def test_what_cannot_be_sharded(as_rank):
    as_rank(0, 2)
    sharded = odd_model()
    shard(sharded)
    with pytest.raises(ValueError, match=r"Llama.* is sharded already"):
        shard(sharded)
    with pytest.raises(ValueError, match=r"q_proj.base is sharded: take the whole state"):
        make_plain(sharded)
    counted = nn.parallel.DistributedDataParallel(odd_model())
    refused(counted, ValueError, "is wrapped in DistributedDataParallel already: build the model anew")
    mixed = odd_model()
    next(p for p in mixed.parameters() if p.requires_grad).data = torch.zeros(3, 42, dtype=torch.bfloat16)
    refused(mixed, ValueError, r"dtypes \['torch.bfloat16', 'torch.float32'\].*reduced together")
    refused(one_layer(4, 4, True), ValueError, "Sequential has no blocks by its _no_split_modules")
    refused(odd_model(), ValueError, "block 0 is no part of this Llama", blocks=[nn.Linear(2, 2)])
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, 2))
    refused(odd_model(), ValueError, "one dimension, got 2", mesh=mesh)


@pytest.mark.parametrize(
    ("storage", "error", "words"),
    [
        (torch.uint8, ValueError, "0 holds its 4 bits in torch.uint8.*bnb_4bit_quant_storage"),
        (torch.bfloat16, None, ""),
    ],
)
def test_bitsandbytes_needs_float_storage(as_rank, storage, error, words):
    as_rank(0, 2)
    linear = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", quant_storage=storage).to("cpu")
    model = nn.Sequential(linear)
    if error:
        refused(model, error, words, blocks=[linear])
    else:
        shard(model, blocks=[linear])


def test_another_kind_of_layer(as_rank):
    as_rank(0, 2)
    model = one_layer(4, 6, True)
    model.append(bnb.nn.Linear8bitLt(4, 4, has_fp16_weights=False).to("cpu"))
    other = nn.Module()
    other.in_features = other.out_features = 4
    refused(nn.Sequential(other), TypeError, "0 is a Module, of which it is not known", blocks=[other])


def test_make_shardable_refuses():
    with pytest.raises(ValueError, match="no NF4Linear: quantize_base first"):
        make_shardable(nn.Linear(2, 2))
    model = odd_model()
    make_shardable(model)
    with pytest.raises(ValueError, match=r"q_proj.base is shardable already, and 13 others"):
        make_shardable(model)


# --- two processes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [True, False])
def test_divided_layers_give_the_same_bits(double_quant):
    answers = together(2, same_bits, SHAPES, double_quant)
    for i, (out, in_) in enumerate(SHAPES):
        assert all(answer[i][:2] == (True, True) for answer in answers)
        assert sum(answer[i][2] for answer in answers) == -(-out * in_ // 2)


def test_two_processes_train_as_one(tmp_path):
    alone = odd_model()
    losses = losses_of(alone, ids_of())
    answers = together(2, train_sharded, str(tmp_path))
    for answer in answers:
        assert answer["names"] == ["model.layers.0", "model.layers.1"]
        np.testing.assert_allclose(answer["losses"], losses, rtol=0, atol=2e-6)
        assert answer["same"] == [True, True, True]
        assert not answer["different"]
    assert losses[0] - losses[-1] > 0.1
    save_adapter(alone, tmp_path / "alone")
    name = "adapter_model.safetensors"
    one, two = load_file(tmp_path / "alone" / name), load_file(tmp_path / "adapter" / name)
    assert one.keys() == two.keys()
    # Adam divides by the root of a gradient's square: what is rounding there is seen here.
    assert max((one[key] - two[key]).abs().max() for key in one) < 1e-4
    for file in ("adapter_config.json",):
        assert (tmp_path / "alone" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()


def test_mixed_precision_casts_no_byte():
    for answer in together(2, no_cast, torch.bfloat16):
        assert answer == [("torch.uint8", "torch.uint8", "torch.float32")]
