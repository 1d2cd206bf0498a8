"""A trained run whose answer is one of a closed set, ready to be asked: for Python programs and for our stages."""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fallback.choose import Backend
from recipes.stages.console import held_back
from recipes.stages.exported import Exported
from recipes.stages.processes import ALONE, Team
from recipes.stages.recipe import Message, Recipe, UserError
from recipes.stages.run import NOT_OURS, BrokenFile, Run, read_json, write_json

UNSURE = "unsure"


@dataclass(frozen=True)
class Verdict:
    code: str
    confidence: float
    ranking: tuple[tuple[str, float], ...]
    """The codes that were looked at, best first, with their probabilities."""

    @property
    def cells(self) -> list[str]:
        """For a table with the columns of CELLS."""
        second, its = self.ranking[1] if len(self.ranking) > 1 else ("", 0.0)
        return [self.code, f"{self.confidence:.4f}", second, f"{its:.4f}"]


@dataclass(frozen=True)
class Scoring:
    """How far the codes are looked through."""

    exhaustive: bool = False
    """Score every code instead of stopping when the others cannot matter."""
    batch_tokens: int | None = None
    """Tokens whose keys and values are held at one time; what 1 GiB holds, 32,768 at most, if not given."""
    min_confidence: float = 0.0
    """Answer "unsure" below this confidence."""


DEFAULT = Scoring()


@dataclass(frozen=True)
class Known:
    """What an adapter knows of its classes: adapter/classes.json."""

    train_rows: dict[str, int]
    temperature: float = 1.0

    def write(self, folder: Path) -> None:
        write_json(folder / "classes.json", {"temperature": self.temperature, "train_rows": self.train_rows})

    @classmethod
    def of(cls, run: Run) -> "Known":
        return cls.at(run.adapter)

    @classmethod
    def at(cls, folder: Path) -> "Known":
        path = folder / "classes.json"
        stored = read_json(path)
        try:
            known = cls({str(code): int(rows) for code, rows in stored["train_rows"].items()}, stored["temperature"])
            sound = known.train_rows and 0 < float(known.temperature) < math.inf
        except (KeyError, TypeError, ValueError, AttributeError):
            sound = False
        if not sound:
            raise BrokenFile(f"{path}: {NOT_OURS}")
        return known


@dataclass
class Classifier:
    """Classifier(RECIPE, "runs/…").predict(text). Loads the model at the first question."""

    recipe: Recipe
    run: str | Path | None = None
    """A trained run, or a model that export wrote; the recipe's newest run if not named."""
    backend: Backend = "auto"
    scoring: Scoring = DEFAULT
    _loaded: Any = field(default=None, init=False, repr=False)

    def predict(self, text: str, return_confidence: bool = False, top: int = 1) -> Any:
        """The code; with return_confidence (code, confidence); with top=n the n likeliest, each with its
        probability."""
        return self.predict_batch([text], return_confidence, top)[0]

    def predict_batch(self, texts: Sequence[str], return_confidence: bool = False, top: int = 1) -> list[Any]:
        for number, text in enumerate(texts, 1):
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"text {number} is empty: there is nothing to classify")
        verdicts = self.verdicts([self.recipe.ask(text) for text in texts])
        if top > 1:
            return [list(verdict.ranking[:top]) for verdict in verdicts]
        if return_confidence:
            return [(verdict.code, verdict.confidence) for verdict in verdicts]
        return [verdict.code for verdict in verdicts]

    def verdicts(
        self, prompts: Sequence[Sequence[Message]], done: Callable[[int], None] = lambda count: None
    ) -> list[Verdict]:
        return self.rank(*self.log_probabilities(prompts, done))

    def rank(self, log_p: Any, known: Known) -> list[Verdict]:
        from recipes.stages.confidence import probabilities

        names = list(known.train_rows)
        found = []
        for row in probabilities(log_p, known.temperature):
            order = row.argsort()[::-1]
            ranking = tuple((names[i], float(row[i])) for i in order if row[i] > 0)
            code, confidence = ranking[0]
            sure = confidence >= self.scoring.min_confidence
            found.append(Verdict(code if sure else UNSURE, confidence, ranking))
        return found

    def log_probabilities(
        self,
        prompts: Sequence[Sequence[Message]],
        done: Callable[[int], None] = lambda count: None,
        team: Team = ALONE,
    ) -> tuple[Any, Known]:
        """A row per prompt and a column per code, before the temperature."""
        model, known, codes, max_length = self._load()
        from recipes.stages.scoring import TOLERANCE, score

        tolerance = 0.0 if self.scoring.exhaustive else TOLERANCE
        scores = score(model, codes, prompts, max_length, tolerance, self.scoring.batch_tokens, done, team=team)
        return scores.log_p, known

    def use(self, model: Any, run: Run, max_length: int) -> "Classifier":
        """Take a model that is loaded already."""
        return self._take(model, Known.of(run), max_length)

    def _take(self, model: Any, known: Known, max_length: int) -> "Classifier":
        from recipes.stages.scoring import Codes

        self._loaded = model, known, Codes(model.renderer, known.train_rows), max_length
        return self

    def _load(self) -> Any:
        if self._loaded is None:
            from recipes.stages import loading

            path = Path(self.run) if self.run is not None else None
            if model := Exported.at(path):
                with tempfile.TemporaryDirectory() as logs, held_back(Path(logs) / "libraries.log"):
                    self._take(model.load(self.recipe, self.backend), Known.at(model.path), model.max_length)
                return self._loaded
            run, chosen, choice, max_length = loading.open_run(self.recipe, path, self.backend)
            with held_back(run.logs / "libraries.log"):
                self.use(loading.load_to_answer(self.recipe, run, chosen, choice, max_length), run, max_length)
        return self._loaded
