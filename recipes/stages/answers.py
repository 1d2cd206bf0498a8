"""Scores for free-text answers, chosen for Korean: by syllables, since Korean glues particles to its words."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from recipes.stages.recipe import Prediction


def score_answers(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Overlap with the references, and what makes a chat model bad: silence, sameness, not ending."""
    answers = [p.answer for p in predictions]
    references = [p.example.answer for p in predictions]
    return {
        "chrf": chrf(answers, references),
        "rouge_l": sum(rouge_l(a, r) for a, r in zip(answers, references, strict=True)) / len(answers),
        "distinct_2": distinct(answers, 2),
        "empty": sum(not answer for answer in answers) / len(answers),
        "identical_to_another": identical(predictions),
        "foreign": sum(map(foreign, answers)) / len(answers),
        "stopped_by_itself": sum(p.stopped for p in predictions) / len(predictions),
    }


def chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """chrF2 of sacrebleu, 0 to 100: character n-grams up to six, white space left out, no word n-grams."""
    from sacrebleu.metrics import CHRF

    return float(CHRF(char_order=6, word_order=0, beta=2, whitespace=False).corpus_score(answers, [references]).score)


def syllables(text: str) -> str:
    """The tokenisation of ROUGE-L here: every character but white space; for Hangul that is the syllable."""
    return "".join(text.split())


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of syllables, 0 to 1."""
    one, other = syllables(answer), syllables(reference)
    shared = _longest_common(one, other)
    return 2 * shared / (len(one) + len(other)) if shared else 0.0


def _longest_common(one: str, other: str) -> int:
    """Length of the longest common subsequence, a row of the table at a time as the bits of one integer."""
    places: dict[str, int] = {}
    for place, letter in enumerate(one):
        places[letter] = places.get(letter, 0) | 1 << place
    row, full = 0, (1 << len(one)) - 1
    for letter in other:
        candidates = row | places.get(letter, 0)
        row = candidates & ~(candidates - ((row << 1) | 1)) & full
    return row.bit_count()


def distinct(answers: Sequence[str], length: int) -> float:
    """Different word n-grams of all answers, as a share of all of them: low where a model repeats itself."""
    counts: Counter[tuple[str, ...]] = Counter()
    for answer in answers:
        words = answer.split()
        counts.update(tuple(words[i : i + length]) for i in range(len(words) - length + 1))
    return len(counts) / counts.total() if counts else 0.0


def foreign(answer: str) -> bool:
    """Whether a Korean reader would call it foreign: most of its letters are not Hangul, or one of them is neither
    Hangul nor Latin, such as kana, Chinese or Cyrillic."""
    letters = [unicodedata.name(letter, "").partition(" ")[0] for letter in answer if letter.isalpha()]
    scripts = Counter(letters)
    return 2 * scripts["HANGUL"] < scripts.total() or bool(scripts.keys() - {"HANGUL", "LATIN"})


def identical(predictions: Sequence[Prediction]) -> float:
    """Share of answers that some other question got word for word."""
    asked_by_answer: dict[str, set[str]] = {}
    for p in predictions:
        asked_by_answer.setdefault(p.answer, set()).add(p.example.text)
    return sum(len(asked_by_answer[p.answer]) > 1 for p in predictions) / len(predictions)
