"""rsLoRA: the update's length no longer shrinks as the rank grows. Chapter 18."""

import math


def rslora_alpha(rank: int, alpha: float) -> float:
    """The `alpha` with which LoRALinear computes rsLoRA: α √r over r is α / √r.

    A is drawn alike for every rank and B grows at a rate that the optimizer sets, so that B A is a sum of r
    terms of one size; α / r makes its length fall like 1 / √r, α / √r keeps it.

    Raises ValueError: rank below 1, or alpha not positive. Kalajdzievski 2023 (arXiv 2312.03732), section 3.
    """
    if rank < 1 or not alpha > 0:
        raise ValueError(f"need rank >= 1 and alpha > 0, got rank {rank!r:.40} and alpha {alpha!r:.40}")
    return alpha * math.sqrt(rank)
