"""speed.py, how time is taken: in turns, as a ratio within a round, and where it goes."""

import statistics
import time
from collections import Counter

from torch.profiler import ProfilerActivity, profile


def take_turns(variants: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant, one call a round in turn; two rounds before that warm up."""
    seconds = {name: [] for name in variants}
    for number in range(rounds + 2):
        for name, call in variants.items():
            started = time.perf_counter()
            call()
            if number >= 2:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def speedups(seconds: dict[str, list[float]], reference: str) -> dict[str, float]:
    """How many times as fast as the reference each variant is: the median over rounds."""
    return {
        name: statistics.median(a / b for a, b in zip(seconds[reference], times, strict=True))
        for name, times in seconds.items()
    }


def profile_ops(call, repeats: int = 5) -> dict[str, float]:
    """The operations that take the most time of their own, and the share of each; the rest as "other"."""
    with profile(activities=[ProfilerActivity.CPU]) as report:
        for _ in range(repeats):
            call()
    times = Counter({e.key: e.self_cpu_time_total for e in report.key_averages()})
    whole = sum(times.values())
    shares = {key: value / whole for key, value in times.most_common(8)}
    return shares | {"other": 1 - sum(shares.values())}
