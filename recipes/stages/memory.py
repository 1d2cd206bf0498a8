"""What a persona remembers: lines of a file, of which the one that a question is about is put before the question.

Relatedness is the cosine between character n-grams, which needs no download; a sentence-transformers model is used
where the user names one.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.stages.recipe import Message, Recipe, UserError

# Whatever white space is in it: a pattern that trimmed its parts would take hours over a line of blanks.
_ITEM = re.compile(r"\[([^:\]]*[^:\]\s][^:\]]*):([^\]]*[^\]\s][^\]]*)\]")
Similarity = Callable[[str, Sequence[str]], list[float]]


@dataclass(frozen=True)
class Recall:
    """What is remembered while answering."""

    memory: Path | None = None
    """File with a line per item, as in [오늘 일정: 친구랑 카페 방문]."""
    memory_threshold: float = 0.6
    """An item less related to the question than this (cosine) is not brought up."""
    memory_model: str | None = None
    """A sentence-transformers model to measure relatedness by, instead of character n-grams."""


class Memory:
    def __init__(self, items: Sequence[str], threshold: float = 0.6, similarity: Similarity | None = None):
        self.items, self.threshold = list(items), threshold
        self.similarity = similarity or by_characters

    @classmethod
    def of(cls, recall: Recall) -> "Memory":
        if recall.memory is None:
            return cls(())
        return cls(read_items(recall.memory), recall.memory_threshold, _by_model(recall.memory_model))

    def ranked(self, question: str) -> list[tuple[float, str]]:
        """All items with how related they are, the most related first."""
        if not self.items:
            return []
        return sorted(zip(self.similarity(question, self.items), self.items, strict=True), key=lambda pair: -pair[0])

    def related(self, question: str) -> str:
        """The most related item, or nothing."""
        ranked = self.ranked(question)
        return ranked[0][1] if ranked and ranked[0][0] >= self.threshold else ""


def read_items(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(f"--memory {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--memory {path}: {error.strerror if isinstance(error, OSError) else error}; it must be a UTF-8 text file"
        ) from None
    items = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not _ITEM.fullmatch(line.strip()):
            raise UserError(f"--memory {path}: line {number}: {line.strip()[:60]!r} is not of the form [오늘 일정: …]")
        items.append(line.strip())
    if not items:
        raise UserError(f"--memory {path}: the file is empty; write lines like [오늘 일정: 친구랑 카페 방문]")
    return items


def grams(text: str) -> Counter[str]:
    """Pairs of characters within words: Korean words change at their ends, and share their beginnings."""
    return Counter(word[i : i + 2] for word in re.findall(r"\w+", text.lower()) for i in range(max(1, len(word) - 1)))


def cosine(one: Counter[str], other: Counter[str]) -> float:
    shared = sum(count * other[gram] for gram, count in one.items())
    norm = math.sqrt(sum(c * c for c in one.values()) * sum(c * c for c in other.values()))
    return shared / norm if norm else 0.0


def by_characters(question: str, items: Sequence[str]) -> list[float]:
    """An item is related by its name, by what it says, or by both. A question holds more words than what it is about,
    so that of its n-grams only those count that occur in some item."""
    known: set[str] = set()
    for item in items:
        known.update(grams(item))
    asked = Counter({gram: count for gram, count in grams(question).items() if gram in known})
    found = []
    for item in items:
        match = _ITEM.fullmatch(item)
        parts = (*match.groups(), " ".join(match.groups())) if match else (item,)
        found.append(max(cosine(asked, grams(part)) for part in parts))
    return found


def _by_model(name: str | None) -> Similarity | None:
    if name is None:
        return None
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError(
            f"--memory-model {name}: sentence-transformers is not installed; pip install sentence-transformers, or "
            "leave --memory-model away"
        ) from None
    try:
        model: Any = SentenceTransformer(name, trust_remote_code=False, model_kwargs={"use_safetensors": True})
    except (OSError, ValueError) as error:
        raise UserError(f"--memory-model {name}: {' '.join(str(error).split())[:160]}") from None

    def similarity(question: str, items: Sequence[str]) -> list[float]:
        vectors = model.encode([question, *items], normalize_embeddings=True)
        return [float(vectors[0] @ vector) for vector in vectors[1:]]

    return similarity


def asker(recipe: Recipe, recall: Any) -> Callable[[str], tuple[Message, ...]]:
    """recipe.ask, with what is remembered put before the question where there is a memory."""
    if not isinstance(recall, Recall) or recall.memory is None:
        return recipe.ask
    memory = Memory.of(recall)
    return lambda text: recipe.ask(text, memory.related(text))
