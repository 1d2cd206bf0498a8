"""Looking at a training from outside itself: how good the answers are by now, on a part of the validation split."""

import json
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.stages import processes
from recipes.stages.classifier import Known
from recipes.stages.recipe import Example, Sampling, Settings

if TYPE_CHECKING:
    from recipes.stages.loading import Model

# A validation row costs about this share of a training row: no backward pass, but a walk over the codes.
_VALIDATION_COST = 0.55
# Share of the training time that looking at it may cost.
_VALIDATION_SHARE = 0.05
# Validation examples whose loss is watched, where answers are free text.
VALIDATION_ANSWERS = 200
# A few short answers, token by token, took as long as two optimiser steps of small models on CPUs: 2.5 % of so many.
_STEPS_BETWEEN_ANSWERS = 80


def evaluations(trained_rows: int, validation_rows: int, share_of_time: float = _VALIDATION_SHARE) -> int:
    """How many evaluations the training can afford; one, at its end, whatever it costs."""
    return max(1, min(20, int(share_of_time * trained_rows / (_VALIDATION_COST * validation_rows))))


def answers_due(before: int, step: int, steps: int) -> bool:
    """Whether a few answers are written at this step's evaluation, by its place and that of the evaluation before;
    always at the last of the steps."""
    times = max(1, steps // _STEPS_BETWEEN_ANSWERS)
    return step * times // steps > before * times // steps


def _sharing() -> processes.Team:
    """With whole weights each process looks at its part. With divided ones every forward pass is everybody's, so that
    all look at everything."""
    return processes.ALONE if processes.sharded() else processes.team()


def keeping_classes(items: Sequence[Example], rows: int, seed: int) -> list[Example]:
    """A sample of about `rows` examples in which every class has its share, and at least two of its own."""
    by_class: dict[str | None, list[int]] = {}
    for index, example in enumerate(items):
        by_class.setdefault(example.label, []).append(index)
    chosen: list[int] = []
    for label, members in by_class.items():
        count = min(len(members), max(2, round(rows * len(members) / len(items))))
        chosen += random.Random(f"{seed} {label}").sample(members, count)
    return [items[index] for index in sorted(chosen)]


@dataclass
class ClassValidation:
    """Answers a part of the validation split as evaluate will answer the test split, and calibrates on it."""

    model: "Model"
    items: Sequence[Example]
    weights: Any
    """Of each item: the sample holds more of the rare classes than the split does."""
    train_rows: dict[str, int]
    max_length: int
    metric: str = "f1_macro"
    higher_is_better: bool = True
    temperature: float = 1.0
    seconds: float = 0.0
    share_of_time: float = _VALIDATION_SHARE

    @classmethod
    def on(
        cls, model: "Model", split: Sequence[Example], train: Sequence[Example], rows: int, settings: Settings
    ) -> "ClassValidation":
        import numpy as np

        items = keeping_classes(split, rows, settings.seed)
        whole, part = Counter(e.label for e in split), Counter(e.label for e in items)
        weights = np.array([whole[e.label] / part[e.label] for e in items])
        train_rows = {str(label): count for label, count in Counter(e.label for e in train).most_common()}
        return cls(model, items, weights, train_rows, settings.max_length)

    @property
    def known(self) -> Known:
        return Known(self.train_rows, self.temperature)

    def __call__(self, step: int, steps: int) -> dict[str, float]:
        import numpy as np

        from recipes.stages.classes import averages
        from recipes.stages.confidence import fit_temperature
        from recipes.stages.scoring import Codes, score

        began = time.perf_counter()
        codes = Codes(self.model.renderer, self.train_rows)
        true = [example.answer for example in self.items]
        prompts = [example.prompt for example in self.items]
        # No doubt is left between codes, as none is in answers: a temperature fitted to bounds was off by half.
        log_p = score(self.model, codes, prompts, self.max_length, include=true, team=_sharing()).log_p
        predicted = [codes.names[i] for i in log_p.argmax(axis=1)]
        of_true = log_p[np.arange(len(true)), [codes.index[name] for name in true]]
        correct = np.array([t == p for t, p in zip(true, predicted, strict=True)])
        self.temperature = fit_temperature(log_p, correct, self.weights)
        found = averages(true, predicted, self.weights)
        seconds = time.perf_counter() - began
        self.seconds += seconds
        return {
            "loss": float(-(self.weights * of_true).sum() / self.weights.sum()),
            **{name: found[name] for name in ("f1_macro", "f1_micro", "accuracy")},
            "temperature": self.temperature,
            "seconds": round(seconds, 3),
        }

    def recall(self, lines: Sequence[dict[str, float]]) -> None:
        """What a training that goes on had found before."""
        for line in lines:
            self.temperature = line["eval_temperature"]
            self.seconds += line["eval_seconds"]

    @staticmethod
    def told(metrics: dict[str, float]) -> str:
        f1, accuracy, loss = (metrics[f"eval_{name}"] for name in ("f1_macro", "accuracy", "loss"))
        return f"macro F1 {f1:.4f}, accuracy {accuracy:.4f}, loss {loss:.4f}"


@dataclass
class AnswerValidation:
    """How probable a part of the validation split's answers are to the model."""

    model: "Model"
    items: Sequence[Example]
    max_length: int
    sampling: Sampling
    stop: Sequence[str]
    log: Path
    """Where a few answers are written now and then: numbers alone do not show how a persona speaks."""
    metric: str = "loss"
    higher_is_better: bool = False
    known: Known | None = None
    seconds: float = 0.0
    share_of_time: float = _VALIDATION_SHARE / 2
    """The other half is for answers."""
    evaluated_at: int = 0
    """The last step with an evaluation."""

    def __call__(self, step: int, steps: int) -> dict[str, float]:
        from recipes.stages.likelihood import answer_loss

        began = time.perf_counter()
        found = answer_loss(self.model, self.items, self.max_length, team=_sharing())
        if answers_due(self.evaluated_at, step, steps):
            self._write_answers(step, found["loss"])
        self.evaluated_at = step
        seconds = time.perf_counter() - began
        self.seconds += seconds
        return {"loss": found["loss"], "perplexity": found["perplexity"], "seconds": round(seconds, 3)}

    def _write_answers(self, step: int, loss: float) -> None:
        from recipes.stages.generation import generate

        shown = self.items[:3]
        brief = replace(self.sampling, temperature=0.0, max_new_tokens=min(40, self.sampling.max_new_tokens))
        answers = generate(self.model, [item.prompt for item in shown], brief, self.stop, self.max_length)
        with (self.log if processes.rank() == 0 else Path(os.devnull)).open("a", encoding="utf-8") as file:
            for item, answer in zip(shown, answers, strict=True):
                line = {"step": step, "loss": loss, "question": item.text, "answer": answer.text}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def recall(self, lines: Sequence[dict[str, float]]) -> None:
        self.seconds += sum(line["eval_seconds"] for line in lines)
        self.evaluated_at = int(lines[-1]["step"]) if lines else 0

    @staticmethod
    def told(metrics: dict[str, float]) -> str:
        return f"loss {metrics['eval_loss']:.4f}, perplexity {metrics['eval_perplexity']:.2f}"
