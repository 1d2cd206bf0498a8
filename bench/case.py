"""What is to be measured: one recipe under one backend, once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fallback.choose import BACKENDS, BackendName
from recipes.stages.recipe import Recipe


@dataclass(frozen=True)
class Case:
    recipe: str
    arm: str
    """The backend, and a number behind it where it takes part twice, as in an A/A run."""
    backend: BackendName
    repeat: int
    flags: tuple[str, ...]
    """Of the recipe's own train command: what is measured is what a user runs."""
    phases: tuple[str, ...] = ("train", "generate")
    warmup: int = 3
    """Steps that are not counted, beside the first."""
    new_tokens: int = 32
    """Tokens of an answer whose speed is measured."""
    questions: int = 3
    """Questions that are answered so."""

    @property
    def name(self) -> str:
        return f"{self.recipe}-{self.arm}-{self.repeat}".replace(" ", "-").replace("+", "-")

    @property
    def key(self) -> tuple[str, str, int]:
        return self.recipe, self.arm, self.repeat

    @classmethod
    def of(cls, stored: dict[str, Any]) -> "Case":
        return cls(**{**stored, "flags": tuple(stored["flags"]), "phases": tuple(stored["phases"])})


def arms(backends: Sequence[str]) -> dict[str, BackendName]:
    """Name of each arm -> its backend."""
    named: dict[str, BackendName] = {}
    for backend in backends:
        again = sum(other == backend for other in named.values()) + 1
        named[backend if again == 1 else f"{backend} #{again}"] = next(b for b in BACKENDS if b == backend)
    return named


@dataclass(frozen=True)
class Grid:
    """The sweep: every recipe under every arm, so often."""

    recipes: Sequence[Recipe]
    backends: Sequence[str]
    repeats: int
    flags: dict[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)
    """Of train, by recipe and arm."""
    phases: tuple[str, ...] = ("train", "generate")
    warmup: int = 3
    new_tokens: int = 32
    questions: int = 3

    def cases(self, seed: int) -> list[Case]:
        """In random order, but the arms of a recipe next to each other: a pair should see the same machine."""
        import random

        order = random.Random(seed)
        found: list[Case] = []
        for repeat in range(self.repeats):
            recipes = list(self.recipes)
            order.shuffle(recipes)
            for recipe in recipes:
                pair = list(arms(self.backends).items())
                order.shuffle(pair)
                found += [
                    Case(
                        recipe.name, arm, backend, repeat, self.flags[recipe.name, arm], self.phases, self.warmup,
                        self.new_tokens, self.questions,
                    )
                    for arm, backend in pair
                ]  # fmt: skip
        return found
