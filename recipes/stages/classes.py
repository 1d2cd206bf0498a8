"""Scores for answers out of a closed set: by class, with intervals, and what the weak classes are taken for."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

PROBLEM = 0.5
"""A class with a lower F1 than this is named as a problem."""


def counts(
    true: Sequence[str], predicted: Sequence[str], weights: np.ndarray | None = None
) -> tuple[list[str], np.ndarray]:
    """The classes that occur in truth, and for each: right answers, answers, rows."""
    classes, t, p = _numbered(true, predicted)
    return classes, _count(t, p, len(classes), np.ones(len(t)) if weights is None else weights)


def _numbered(true: Sequence[str], predicted: Sequence[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The classes that occur in truth, and both columns as their numbers; an answer that is never true is one more."""
    classes = sorted(set(true))
    index = {name: i for i, name in enumerate(classes)}
    numbers = [np.array([index.get(name, len(classes)) for name in column]) for column in (true, predicted)]
    return classes, numbers[0], numbers[1]


def _count(t: np.ndarray, p: np.ndarray, classes: int, weights: np.ndarray) -> np.ndarray:
    right = np.bincount(t, weights * (t == p), classes)
    return np.stack([right, np.bincount(p, weights, classes + 1)[:classes], np.bincount(t, weights, classes)])


def _rates(count: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    right, answered, rows = count
    precision = np.divide(right, answered, out=np.zeros_like(right), where=answered > 0)
    recall = np.divide(right, rows, out=np.zeros_like(right), where=rows > 0)
    f1 = np.divide(2 * right, answered + rows, out=np.zeros_like(right), where=answered + rows > 0)
    return precision, recall, f1


def _averages(count: np.ndarray) -> dict[str, float]:
    right, answered, rows = count
    there = rows > 0
    precision, recall, f1 = (rate[there] for rate in _rates(count))
    share = rows[there] / rows.sum()
    micro_precision = right.sum() / max(answered.sum(), 1e-12)
    accuracy = right.sum() / rows.sum()
    return {
        "accuracy": float(accuracy),
        "precision_macro": float(precision.mean()),
        "recall_macro": float(recall.mean()),
        "f1_macro": float(f1.mean()),
        "precision_weighted": float((share * precision).sum()),
        "recall_weighted": float((share * recall).sum()),
        "f1_weighted": float((share * f1).sum()),
        # Every answer is a code of the set, and so the two differ only if codes are predicted that are never true.
        "f1_micro": float(2 * micro_precision * accuracy / max(micro_precision + accuracy, 1e-12)),
    }


def averages(true: Sequence[str], predicted: Sequence[str], weights: np.ndarray | None = None) -> dict[str, float]:
    return _averages(counts(true, predicted, weights)[1])


def intervals(
    true: Sequence[str], predicted: Sequence[str], draws: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals of the averages: the test split drawn again and again from itself."""
    classes, t, p = _numbered(true, predicted)
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        rows = generator.integers(0, len(t), len(t))
        found.append(_averages(_count(t[rows], p[rows], len(classes), np.ones(len(t)))))
    return {
        name: tuple(float(x) for x in np.quantile([one[name] for one in found], (0.025, 0.975)))  # type: ignore[misc]
        for name in found[0]
    }


def by_class(true: Sequence[str], predicted: Sequence[str], train_rows: dict[str, int]) -> list[dict[str, Any]]:
    """A line for every class, the weakest first."""
    classes, count = counts(true, predicted)
    precision, recall, f1 = _rates(count)
    taken = {name: Counter[str]() for name in classes}
    for t, p in zip(true, predicted, strict=True):
        if t != p:
            taken[t][p] += 1
    lines = [
        {
            "class": name,
            "train_rows": train_rows.get(name, 0),
            "test_rows": int(count[2][i]),
            "precision": float(precision[i]),
            "recall": float(recall[i]),
            "f1": float(f1[i]),
            "taken_for": dict(taken[name].most_common(3)),
        }
        for i, name in enumerate(classes)
    ]
    return sorted(lines, key=lambda line: (line["f1"], line["class"]))


def confusions(true: Sequence[str], predicted: Sequence[str]) -> list[dict[str, Any]]:
    """Pairs that are mixed up, the most frequent first."""
    pairs = Counter((t, p) for t, p in zip(true, predicted, strict=True) if t != p)
    return [{"true": t, "predicted": p, "rows": count} for (t, p), count in pairs.most_common()]
