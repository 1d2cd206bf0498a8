"""How sure an answer out of a closed set is, and whether that can be believed."""

from collections.abc import Sequence
from typing import Any

import numpy as np

# Codes below this share of the probability are scaled as one: what a confidence is must not depend on how many of
# the unlikely codes the scoring happened to look at.
FLOOR = 0.01
_SHARES = [share / 20 for share in range(20, 0, -1)]


def probabilities(log_p: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """A distribution over the codes for each row: probabilities to the power 1 / temperature, normalised."""
    p = np.exp(log_p - log_p.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    likely = p >= FLOOR
    rest = np.where(likely, 0.0, p).sum(axis=1, keepdims=True)
    scaled_rest = rest ** (1 / temperature)
    share_of_rest = np.divide(p, rest, out=np.zeros_like(p), where=rest > 0)
    scaled = np.where(likely, p ** (1 / temperature), scaled_rest * share_of_rest)
    return scaled / scaled.sum(axis=1, keepdims=True)


def fit_temperature(log_p: np.ndarray, correct: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The temperature under which the best code's probability says best how often it is right."""
    weights = np.ones(len(correct)) if weights is None else weights

    def surprise(temperature: float) -> float:
        sure = probabilities(log_p, temperature).max(axis=1).clip(1e-6, 1 - 1e-6)
        return float((weights * -np.log(np.where(correct, sure, 1 - sure))).sum())

    candidates = np.exp(np.linspace(np.log(0.2), np.log(10), 61))
    middle = float(min(candidates, key=surprise))
    return float(min(np.linspace(middle / 1.07, middle * 1.07, 31), key=surprise))


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: how far confidence and accuracy lie apart, averaged over bins of confidence."""
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    error = 0.0
    for b in range(bins):
        inside = which == b
        if inside.any():
            error += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    return float(error)


def coverage_curve(
    confidence: np.ndarray, correct: np.ndarray, steps: Sequence[float] = _SHARES
) -> list[dict[str, Any]]:
    """What answering only the surest share of the rows brings, and the --min-confidence that does it."""
    order = np.argsort(-confidence, kind="stable")
    curve = []
    for share in steps:
        answered = order[: max(1, round(share * len(order)))]
        curve.append(
            {
                "coverage": len(answered) / len(order),
                "min_confidence": float(confidence[answered[-1]]),
                "accuracy": float(correct[answered].mean()),
            }
        )
    return curve
