"""test split -> predictions.csv, evaluation_results.json."""

import csv
import time
from collections.abc import Sequence
from typing import Any

from recipes.stages.console import progress, say
from recipes.stages.recipe import Example, Prediction, Recipe, Sampling
from recipes.stages.run import Run, write_json, writing
from recipes.stages.train import Model, examples


def evaluate(recipe: Recipe, run: Run, model: Model, sampling: Sampling, max_length: int) -> dict[str, Any]:
    from recipes.stages.generation import generate

    items = examples(recipe, run, "test")
    began = time.perf_counter()
    with progress("answering the test split", "examples") as bar:
        task = bar.add_task("", total=len(items))
        answers = generate(
            model,
            [example.prompt for example in items],
            sampling,
            recipe.stop,
            max_length,
            lambda count: bar.advance(task, count),
        )
    seconds = time.perf_counter() - began
    predictions = [Prediction(e, a.text, a.stopped) for e, a in zip(items, answers, strict=True)]
    results = {
        "rows": len(predictions),
        **recipe.score(predictions),
        "stopped_by_itself": sum(p.stopped for p in predictions) / len(predictions),
        "empty": sum(not p.answer for p in predictions) / len(predictions),
        "seconds": round(seconds, 2),
    }
    write_predictions(run, predictions)
    write_json(run.path / "evaluation_results.json", results)
    run.add_metrics(test=results)
    return results


def write_predictions(run: Run, predictions: Sequence[Prediction]) -> None:
    with writing(run.path / "predictions.csv", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["text", "true", "predicted", "stopped"])
        for p in predictions:
            table.writerow([p.example.prompt[-1].content, p.example.answer, p.answer, int(p.stopped)])


def show_answer(recipe: Recipe, model: Model, example: Example, max_length: int) -> None:
    from recipes.stages.generation import generate

    answer = generate(model, [example.prompt], recipe.sampling, recipe.stop, max_length)[0]
    say(f"  question   {example.prompt[-1].content.splitlines()[-1]}")
    say(f"  answer     {answer.text}")
    say(f"  reference  {example.answer}")
    if recipe.notice:
        say(f"  {recipe.notice}")


def tell(results: dict[str, Any]) -> None:
    for name, value in results.items():
        if isinstance(value, float):
            say(f"  {name:<20} {value:.4f}")
        elif isinstance(value, int):
            say(f"  {name:<20} {value:,}")
