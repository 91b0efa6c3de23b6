"""Models to shard, and what the processes of test_sharding.py do with them: each returns plain numbers."""

from functools import partial

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lora2qlora.adapters import add_lora
from lora2qlora.qlora import NF4Linear, quantize_base
from lora2qlora.sharding import save_sharded_adapter, shard, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def odd_model(seed: int = 0, double_quant: bool = True, compute_dtype=torch.float32):
    """A small Llama, QLoRA, whose sizes nothing divides: rows, bytes and blocks come out odd."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=42,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=14,
        intermediate_size=77,
        vocab_size=101,
    )
    model = LlamaForCausalLM(config)
    quantize_base(model, "all-linear", double_quant, compute_dtype)
    add_lora(model, "all-linear", rank=3, alpha=6)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    return model


def ids_of(rows: int = 4, length: int = 12, seed: int = 1):
    return torch.randint(101, (rows, length), generator=torch.Generator().manual_seed(seed))


def losses_of(model, ids, steps: int = 5) -> list[float]:
    """Losses of a few steps of AdamW on one batch; the mean of all processes where there are several."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    losses = torch.stack(losses)
    if dist.is_initialized():
        dist.all_reduce(losses)
        losses /= dist.get_world_size()
    return losses.tolist()


def my_rows(ids):
    return ids.chunk(dist.get_world_size())[dist.get_rank()]


def layers_of(model) -> dict[str, NF4Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}


def one_layer(out: int, in_: int, double_quant: bool) -> nn.Module:
    torch.manual_seed(0)
    layer = NF4Linear.from_linear(nn.Linear(in_, out), 64, double_quant, torch.float32)
    return nn.Sequential(layer)


def forward_and_backward(model, in_: int):
    """Output, and the gradient of the input, of the same numbers everywhere."""
    x = torch.randn(5, in_, generator=torch.Generator().manual_seed(2), requires_grad=True)
    y = model(x)
    y.square().sum().backward()
    return y.detach(), x.grad


def same_bits(shapes: list[tuple[int, int]], double_quant: bool) -> list[tuple]:
    """For each shape: are output and gradient of a sharded layer those of a whole one, twice, bit for bit?"""
    found = []
    for out, in_ in shapes:
        plain, sharded = (one_layer(out, in_, double_quant) for _ in range(2))
        shard(sharded, blocks=[sharded[0]])
        mine = sharded[0].packed.to_local().numel()
        same = all(
            torch.equal(a, b)
            for _ in range(2)
            for a, b in zip(forward_and_backward(plain, in_), forward_and_backward(sharded, in_), strict=True)
        )
        found.append((same, torch.equal(whole(sharded[0].packed), plain[0].packed), mine))
    return found


def train_sharded(folder: str) -> dict:
    """Train, save the adapter and the state in both forms, and load both into other models."""
    model = odd_model()
    names = shard(model)
    losses = losses_of(model, my_rows(ids_of()))
    save_sharded_adapter(model, f"{folder}/adapter")
    assert all(isinstance(p, DTensor) for p in model.parameters())  # as before it was saved
    state = get_model_state_dict(model, options=WHOLE)
    dcp.save(get_model_state_dict(model), checkpoint_id=f"{folder}/parts", no_dist=False)
    by_parts, by_whole = odd_model(5), odd_model(6)
    shard(by_parts)
    shard(by_whole)
    parts = get_model_state_dict(by_parts)
    dcp.load(parts, checkpoint_id=f"{folder}/parts")
    set_model_state_dict(by_parts, parts)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(by_whole, dict(state), options=options)  # which divides what it is given
    plain = odd_model(7)
    dist.broadcast_object_list(held := [state])
    plain.load_state_dict(held[0])
    return {
        "names": names,
        "losses": losses,
        "same": [same_state(model, other) for other in (by_parts, by_whole, plain)],
        "different": same_state(model, odd_model(5)),
    }


def same_state(one, other) -> bool:
    """Whether two models hold the same numbers, sharded or not."""
    first, second = (dict(m.named_parameters()) | dict(m.named_buffers()) for m in (one, other))
    return all(torch.equal(whole(first[name]), whole(second[name])) for name in first if name in second)


def no_cast(dtype) -> list:
    """The dtypes that layers dequantize from under a policy of mixed precision; bits must be right."""
    model = odd_model()
    seen, plain = set(), layers_of(odd_model())
    shard(model, precision=MixedPrecisionPolicy(param_dtype=dtype, cast_forward_inputs=False))

    def watch(layer, reference, weight, to):
        seen.add((str(weight.packed.dtype), str(weight.absmax.codes.dtype), str(weight.absmax.scales.dtype)))
        assert torch.equal(weight.packed, reference.packed)
        assert torch.equal(weight.absmax.dequantize(), reference.absmax.dequantize())
        return type(layer).dequantize(weight, to)

    for name, layer in layers_of(model).items():
        layer.dequantize = partial(watch, layer, plain[name].weight)
    ids = my_rows(ids_of())
    model(input_ids=ids, labels=ids).loss.backward()
    return sorted(seen)
