"""Scores for free-text answers."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from recipes.stages.recipe import Prediction


def score_answers(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Overlap with the reference by characters, which needs no word boundaries: Korean glues particles to words."""
    answers = Counter(p.answer for p in predictions)
    return {
        "character_f1": sum(character_f1(p.answer, p.example.answer) for p in predictions) / len(predictions),
        "identical_to_another": sum(answers[p.answer] > 1 for p in predictions) / len(predictions),
    }


def character_f1(answer: str, reference: str, length: int = 2) -> float:
    """F1 over character pairs, white space left out."""
    one, other = (pairs("".join(text.split()), length) for text in (answer, reference))
    shared = sum((one & other).values())
    return 2 * shared / (one.total() + other.total()) if shared else 0.0


def pairs(text: str, length: int) -> Counter[str]:
    return Counter(text[i : i + length] for i in range(len(text) - length + 1))
