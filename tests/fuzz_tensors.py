"""What may stand in the place of a state's tensor: other numbers, dtypes, shapes, layouts, or no tensor."""

import math
from random import Random

import torch
from fuzz_json import json_leaf
from torch import Tensor, nn

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
DTYPES += (torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16)
EXTREMES = (math.nan, math.inf, -math.inf, -1.0, 0.0, 3.4e38, -3.4e38, 1e-45, 256.0, 1e9)


def tensor_leaf(rng: Random, old):
    """Another value for one of a state; what torch itself cannot make becomes None."""
    if not isinstance(old, Tensor) or rng.random() < 0.1:
        return json_leaf(rng, old)
    try:
        return rng.choice((_number, _number, _bits, _cast, _shape, _shape, _layout, _layout, _no_tensor))(
            rng, old
        )
    except (RuntimeError, TypeError, ValueError, IndexError, MemoryError):
        return None


def _number(rng: Random, old: Tensor) -> Tensor:
    new, value = old.detach().clone(), rng.choice(EXTREMES)
    if not new.numel() or (not new.is_floating_point() and not math.isfinite(value)):
        return new
    if not new.is_floating_point():
        value = int(value) % 256
    flat = new.reshape(-1)
    flat[slice(None) if rng.random() < 0.3 else rng.randrange(len(flat))] = value
    return flat.reshape(old.shape)


def _bits(rng: Random, old: Tensor) -> Tensor:
    new = old.detach().clone().reshape(-1)
    raw = new.view(torch.uint8)
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return new.reshape(old.shape)


def _cast(rng: Random, old: Tensor) -> Tensor:
    return old.detach().to(rng.choice(DTYPES))


def _shape(rng: Random, old: Tensor) -> Tensor:
    flat = old.detach().reshape(-1)
    return rng.choice(
        (
            lambda: flat,
            lambda: old.unsqueeze(0),
            lambda: old.unsqueeze(-1),
            lambda: flat[:-1],
            lambda: torch.cat([flat, flat]),
            lambda: flat[:0],
            lambda: flat[0],
            lambda: old.mT,
            lambda: old.expand(2**40, *old.shape),
            lambda: old.expand(3, *old.shape),
        )
    )()


def _layout(rng: Random, old: Tensor) -> Tensor:
    """As many numbers, kept in another way: nowhere, sparse, apart, trained, or shared."""
    return rng.choice(
        (
            lambda: old.to("meta"),
            lambda: old.to_sparse(),
            lambda: torch.stack([old, old], -1)[..., 0],
            lambda: nn.Parameter(old, requires_grad=old.is_floating_point()),
            lambda: old.clone().requires_grad_(),
            lambda: old.reshape(-1)[:1].expand(old.numel()).reshape(old.shape),
            lambda: torch.zeros_like(old),
            lambda: old.detach().to(torch.float32),
        )
    )()


def _no_tensor(rng: Random, old: Tensor):
    return rng.choice(
        (lambda: old.numpy(), old.tolist, lambda: nn.Linear(1, 1), lambda: old.shape, lambda: old.dtype)
    )()
