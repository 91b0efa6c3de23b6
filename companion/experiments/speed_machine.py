"""speed.py, the machine: what it can do at most."""

import torch
from speed_rounds import take_turns


def machine_part(rounds: int, size: int):
    """What this machine can do at most: bytes copied, and bf16 and fp32 arithmetic in a large product."""
    yield {"size": size}, lambda: time_machine(size, rounds)


def time_machine(size, rounds):
    source, target = torch.ones(size, size), torch.ones(size, size)
    half = torch.randn(size, size).bfloat16()
    variants = {
        "copy": lambda: target.copy_(source),
        "fresh": lambda: source.clone(),
        "float32": lambda: source @ target,
        "bfloat16": lambda: half @ half,
    }
    best = {name: min(times) for name, times in take_turns(variants, rounds).items()}
    return {
        "bytes_per_second": 2 * source.nbytes / best["copy"],
        "fresh_bytes_per_second": 2 * source.nbytes / best["fresh"],
        "float32_flops_per_second": 2 * size**3 / best["float32"],
        "bfloat16_flops_per_second": 2 * size**3 / best["bfloat16"],
    }
