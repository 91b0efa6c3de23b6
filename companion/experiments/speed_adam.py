"""speed.py, a step of 8-bit AdamW: bitsandbytes', the plain one, the fast one, and torch's in 32 bits."""

import bitsandbytes as bnb
import torch
from lora2qlora import fast, optimizers
from speed_rounds import speedups, take_turns
from torch import nn

PARAMETERS = 16_000_000


def adam_part(rounds: int, parameters: int):
    """A step of 8-bit AdamW."""
    yield {"parameters": parameters, "dtype": "float32"}, lambda: time_adam(parameters, rounds)


def time_adam(parameters, rounds):
    makers = {
        "bitsandbytes": bnb.optim.AdamW8bit,
        "plain": optimizers.AdamW8bit,
        "fast": optimizers.AdamW8bit,
        "torch_32bit": torch.optim.AdamW,
    }
    torch.manual_seed(0)
    start, grad = torch.randn(parameters), torch.randn(parameters)
    weights, steps = {}, {}
    for name, make in makers.items():
        weights[name] = nn.Parameter(start.clone())
        weights[name].grad = grad.clone()
        optimizer = make([weights[name]], lr=1e-3, weight_decay=0.01)
        if name == "fast":
            optimizer.update = fast.adam_step_8bit
        steps[name] = optimizer.step
    for _ in range(3):
        for step in steps.values():
            step()
    moved = {name: weight.detach() - start for name, weight in weights.items()}
    for other, limit in (("plain", 1e-3), ("bitsandbytes", 0.1), ("torch_32bit", 0.1)):
        apart = (moved["fast"] - moved[other]).norm() / moved["fast"].norm()
        assert apart < limit, (other, apart)
    seconds = take_turns(steps, rounds)
    return {"seconds": seconds, "speedup": speedups(seconds, "bitsandbytes")}
