"""Figures with their uncertainty."""

import math
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
    """How one arm's value stands to another's, over pairs that were measured in turns."""

    value: float
    low: float | None
    """Ends of the interval; None where one pair says nothing about chance."""
    high: float | None
    pairs: int

    @property
    def differs(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 1 or self.high < 1)


RATIO_LEVEL = 0.99
"""Of the intervals by which arms are told apart. One report states a dozen ratios or more: at 95 % something would
differ by chance in half of them, and equal arms were told apart in 3 of 20 comparisons (results/trust.json)."""


def paired_ratio(ours: Sequence[float], theirs: Sequence[float], level: float = RATIO_LEVEL) -> Ratio:
    """Of values measured in pairs."""
    return ratio_of([a / b for a, b in zip(ours, theirs, strict=True)], level)


def ratio_of(ratios: Sequence[float], level: float = RATIO_LEVEL) -> Ratio:
    """Of pairs' ratios. Student's t on the logarithms: of the few pairs that patience allows, a bootstrap's
    percentiles are far too narrow (of three pairs all lie on one side of 1 by chance every fourth time)."""
    log = [math.log(ratio) for ratio in ratios]
    value, low, high = (math.exp(x) if math.isfinite(x) else None for x in mean_interval(log, level))
    assert value is not None
    return Ratio(value, low, high, len(log))


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
        largest = max(largest, difference) if math.isfinite(difference) else largest
        # A gradient's norm is a sum of squares over millions of roundings, and early ones are steep.
        apart = abs(norm - other_norm) / max(abs(other_norm), 1e-9)
        # So put that what is not a number differs.
        if first is None and not (difference <= tolerance and apart <= 10 * tolerance):
            first = number
    if first is None and len(ours) != len(theirs):
        first = min(len(ours), len(theirs)) + 1
    return first is None, first, largest
