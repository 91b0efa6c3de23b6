"""The rule of noise: an effect counts when it exceeds two standard errors of the paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

ERRORS = 2  # standard errors that an effect must exceed
FEWEST = 3  # pairs below which nothing is said


@dataclass(frozen=True)
class Effect:
    """The mean of paired differences, its standard error (both in the unit of the values), and the pairs."""

    mean: float
    error: float
    pairs: int

    def exceeds(self, threshold: float = 0.0) -> str:
        """The verdict on "the effect is more than `threshold`": HOLDS, FAILS or UNDECIDED."""
        distance = self.mean - threshold
        if abs(distance) <= ERRORS * self.error:
            return "UNDECIDED"
        return "HOLDS" if distance > 0 else "FAILS"

    def stays_below(self, threshold: float = 0.0) -> str:
        """The verdict on "the effect is less than `threshold`"."""
        return {"HOLDS": "FAILS", "FAILS": "HOLDS"}.get(self.exceeds(threshold), "UNDECIDED")


def paired_effect(values: Sequence[float], others: Sequence[float]) -> Effect:
    """values - others, pair by pair: over seeds, roundings, chats or texts.

    The standard error is that of the mean of independent differences: s / √n, with n - 1 degrees of freedom.
    Raises ValueError: sequences of different lengths, fewer than three pairs, a value that is not finite.
    """
    if len(values) != len(others) or len(values) < FEWEST:
        raise ValueError(f"need {FEWEST} pairs or more, got {len(values)} and {len(others)} values")
    differences = [float(a) - float(b) for a, b in zip(values, others, strict=True)]
    if not all(map(math.isfinite, differences)):
        raise ValueError(f"pair {[math.isfinite(d) for d in differences].index(False)} is not finite")
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return Effect(statistics.fmean(differences), error, len(differences))


def relative_effect(values: Sequence[float], others: Sequence[float]) -> Effect:
    """The paired effect on logarithms: 0.05 is about 5 % more, and pairs of unlike sizes count alike.

    Raises ValueError as `paired_effect` does, and where a value is not positive.
    """
    for value in (*values, *others):
        if not value > 0:
            raise ValueError(f"need positive values, got {value!r}")
    return paired_effect([math.log(v) for v in values], [math.log(v) for v in others])
