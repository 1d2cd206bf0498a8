"""Figures with their uncertainty."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean, and the interval of Student's t around it; as wide as can be where one value says nothing of others."""
    from scipy.stats import t

    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, float("-inf"), float("inf")
    reach = float(t.ppf((1 + level) / 2, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return mean, mean - reach, mean + reach


@dataclass(frozen=True)
class Ratio:
    """How one arm's value stands to another's, over pairs that were measured one after the other."""

    value: float
    low: float
    high: float
    pairs: int

    @property
    def differs(self) -> bool:
        return self.low > 1 or self.high < 1


def paired_ratio(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], level: float = 0.95, seed: int = 0
) -> Ratio:
    """Ratio of medians, one for every pair of repeats, each with its single values (the steps).

    The bootstrap draws pairs. With the few that patience allows its percentiles would be far too narrow (of three
    pairs all lie on one side of 1 by chance every fourth time), so what is taken from it is the spread, and Student's
    t decides how far that reaches.
    """
    from scipy.stats import t

    log = np.log([np.median(a) / np.median(b) for a, b in zip(ours, theirs, strict=True)])
    pairs, middle = len(log), float(np.mean(log))
    if pairs < 2:
        return Ratio(float(np.exp(middle)), 0.0, float("inf"), pairs)
    drawn = log[np.random.default_rng(seed).integers(pairs, size=(4000, pairs))].mean(axis=1)
    reach = float(t.ppf((1 + level) / 2, pairs - 1)) * float(drawn.std()) * float(np.sqrt(pairs / (pairs - 1)))
    value, low, high = np.exp([middle, middle - reach, middle + reach]).tolist()
    return Ratio(value, low, high, pairs)


# Relative difference of two losses of the same step that rounding explains, by what was computed in.
TOLERANCES = {"float32": 0.005, "bfloat16": 0.03, "float16": 0.03}


def same_training(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], dtype: str
) -> tuple[bool, int | None, float]:
    """Whether two trainings took the same steps; each step is (loss, gradient norm). Returns the verdict, the first
    step that differs, and the largest relative difference of the losses."""
    tolerance = TOLERANCES[dtype]
    largest, first = 0.0, None
    for number, ((loss, norm), (other_loss, other_norm)) in enumerate(zip(ours, theirs, strict=False), 1):
        difference = abs(loss - other_loss) / max(abs(other_loss), 1e-9)
        largest = max(largest, difference)
        # A gradient's norm is a sum of squares over millions of roundings, and early ones are steep.
        apart = abs(norm - other_norm) / max(abs(other_norm), 1e-9)
        if first is None and (difference > tolerance or apart > 10 * tolerance):
            first = number
    if first is None and len(ours) != len(theirs):
        first = min(len(ours), len(theirs)) + 1
    return first is None, first, largest
