"""One text, or standard input a line each -> answers."""

import sys
from collections.abc import Iterable, Iterator
from itertools import islice

from recipes.stages.console import say
from recipes.stages.recipe import Recipe, Sampling, UserError
from recipes.stages.train import Model


def texts(text: str | None) -> Iterable[str]:
    if text is None:
        return lines()
    if not text.strip():
        raise UserError('predict: the text is empty; give one, as in predict "…", or lines on standard input')
    return [text]


def lines() -> Iterator[str]:
    if sys.stdin.isatty():
        say("type a text and press Enter; Ctrl-D ends")
    for line in sys.stdin:
        if line.strip():
            yield line.strip()


def predict(recipe: Recipe, model: Model, questions: Iterable[str], sampling: Sampling, max_length: int) -> int:
    """Print an answer for every question, as soon as its batch is done; returns their number."""
    from recipes.stages.generation import generate

    questions = iter(questions)
    # Somebody typing waits for each answer; a pipe is served in batches.
    size = 1 if sys.stdin.isatty() else sampling.batch_size
    count = 0
    while batch := list(islice(questions, size)):
        answers = generate(model, [recipe.ask(text) for text in batch], sampling, recipe.stop, max_length)
        for answer in answers:
            say(answer.text.replace("\n", " "))
            if recipe.notice:
                say(recipe.notice)
        count += len(batch)
    return count
