"""Confidence against what it claims: right as often as it says."""

import numpy as np
import pytest

from recipes.stages.classes import averages, by_class, confusions, intervals
from recipes.stages.confidence import calibration_error, coverage_curve, fit_temperature, probabilities


def overconfident(rows: int = 4000, classes: int = 12, factor: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities that are too sharp by a factor, and whether their best code is right."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(rows, classes)) * 1.5
    true_p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truth = np.array([generator.choice(classes, p=p) for p in true_p])
    sharp = factor * logits
    log_p = sharp - np.log(np.exp(sharp).sum(1, keepdims=True))
    return log_p, log_p.argmax(1) == truth


def test_the_temperature_undoes_overconfidence() -> None:
    log_p, correct = overconfident()
    temperature = fit_temperature(log_p, correct)
    assert temperature > 1.5
    before = calibration_error(probabilities(log_p).max(1), correct)
    after = calibration_error(probabilities(log_p, temperature).max(1), correct)
    assert after < before / 3


def test_what_was_not_looked_at_does_not_change_a_confidence() -> None:
    log_p = np.log(np.array([[0.7, 0.285, 0.009, 0.005, 0.001]]))
    for unseen in (3, 4):
        partly = log_p.copy()
        partly[0, unseen:] = -np.inf
        for temperature in (0.5, 1.0, 3.0):
            whole, part = probabilities(log_p, temperature), probabilities(partly, temperature)
            assert np.allclose(whole[0, :2], part[0, :2], atol=0.03)
            assert part.sum() == pytest.approx(1)
    assert np.allclose(probabilities(log_p), np.exp(log_p))
    assert probabilities(log_p, 4.0)[0].argmax() == 0


def test_coverage_of_a_ranking_that_is_right() -> None:
    correct = np.array([True] * 80 + [False] * 20)
    confidence = np.linspace(1, 0, 100)
    curve = coverage_curve(confidence, correct)
    assert curve[0] == {"coverage": 1.0, "min_confidence": 0.0, "accuracy": 0.8}
    half = next(point for point in curve if point["coverage"] == 0.5)
    assert half["accuracy"] == 1.0
    assert (confidence >= half["min_confidence"]).mean() == 0.5


def test_averages_as_scikit_learn_has_them() -> None:
    from sklearn.metrics import precision_recall_fscore_support

    generator = np.random.default_rng(1)
    true = generator.choice(list("abcde"), 500, p=[0.5, 0.3, 0.1, 0.07, 0.03]).tolist()
    predicted = [t if generator.random() < 0.7 else str(generator.choice(list("abcde"))) for t in true]
    weights = generator.random(500)
    for w in (None, weights):
        got = averages(true, predicted, w)
        for kind in ("macro", "weighted", "micro"):
            precision, recall, f1, _ = precision_recall_fscore_support(
                true, predicted, average=kind, sample_weight=w, zero_division=0
            )
            assert got[f"f1_{kind}"] == pytest.approx(f1)
            if kind != "micro":
                assert (got[f"precision_{kind}"], got[f"recall_{kind}"]) == pytest.approx((precision, recall))


def test_intervals_hold_the_value_and_narrow_with_rows() -> None:
    generator = np.random.default_rng(2)

    def width(rows: int) -> float:
        true = generator.choice(["a", "b"], rows).tolist()
        predicted = [t if generator.random() < 0.8 else "a" for t in true]
        low, high = intervals(true, predicted)["accuracy"]
        assert low <= averages(true, predicted)["accuracy"] <= high
        return high - low

    assert width(2000) < 0.5 * width(100)


def test_problem_classes_and_what_they_are_taken_for() -> None:
    true, predicted = ["a"] * 8 + ["b"] * 4, ["a"] * 8 + ["a"] * 3 + ["b"]
    weakest = by_class(true, predicted, {"a": 80, "b": 40})[0]
    assert (weakest["class"], weakest["test_rows"], weakest["train_rows"]) == ("b", 4, 40)
    assert weakest["taken_for"] == {"a": 3}
    assert weakest["f1"] == pytest.approx(0.4)
    assert confusions(true, predicted) == [{"true": "b", "predicted": "a", "rows": 3}]
