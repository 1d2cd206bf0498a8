"""test split -> predictions.csv, evaluation_results.json, pictures."""

import time
from collections.abc import Sequence
from typing import Any

from recipes.stages import processes
from recipes.stages.base_model import Chosen
from recipes.stages.cells import CELLS, table_line
from recipes.stages.classifier import Classifier, Scoring, Verdict
from recipes.stages.console import progress, say
from recipes.stages.loading import Model
from recipes.stages.recipe import Example, Prediction, Recipe, Sampling
from recipes.stages.run import Run, write_json, writing
from recipes.stages.train import examples

# Questions whose answers are shown beside the references and the base model's.
_SIDE_BY_SIDE = 10


def evaluate(recipe: Recipe, run: Run, model: Model, answering: Sampling | Scoring, max_length: int) -> dict[str, Any]:
    """Answer the test split the way predict answers, and score what came."""
    items = examples(recipe, run, "test")
    with progress("answering the test split", "examples") as bar:
        task = bar.add_task("", total=len(items))

        def done(count: int) -> None:
            # The others are about as far.
            bar.advance(task, count * processes.world())

        if isinstance(answering, Scoring):
            classifier = Classifier(recipe, scoring=answering).use(model, run, max_length)
            results = _by_class(run, items, classifier, done)
        else:
            results = _by_answer(recipe, run, items, model, answering, max_length, done)
    if processes.rank():
        return results
    write_json(run.path / "evaluation_results.json", results)
    run.add_metrics(test={name: value for name, value in results.items() if isinstance(value, int | float)})
    return results


def _by_answer(
    recipe: Recipe, run: Run, items: list[Example], model: Model, sampling: Sampling, max_length: int, done: Any
) -> dict[str, Any]:
    from recipes.stages.generation import generate
    from recipes.stages.likelihood import answer_loss

    team = processes.team()
    validation = answer_loss(model, examples(recipe, run, "val"), max_length, team=team)
    began = time.perf_counter()
    answers = generate(model, [example.prompt for example in items], sampling, recipe.stop, max_length, done, team)
    seconds = time.perf_counter() - began
    predictions = [Prediction(e, a.text, a.stopped) for e, a in zip(items, answers, strict=True)]
    with model.network.disable_adapter():
        shown = [example.prompt for example in items[:_SIDE_BY_SIDE]]
        untrained = generate(model, shown, sampling, recipe.stop, max_length, team=team)
    if team.rank == 0:
        with writing(run.path / "predictions.csv", newline="") as file:
            file.write(table_line(("text", "true", "predicted", "stopped")))
            for p in predictions:
                file.write(table_line((p.example.text, p.example.answer, p.answer, str(int(p.stopped)))))
        _write_side_by_side(run, predictions[:_SIDE_BY_SIDE], [answer.text for answer in untrained])
    return {
        "rows": len(predictions),
        "validation_loss": validation["loss"],
        "validation_perplexity": validation["perplexity"],
        **(recipe.score(predictions) if recipe.score else {}),
        "seconds": round(seconds, 2),
    }


def cases(recipe: Recipe, run: Run, model: Model, sampling: Sampling, max_length: int) -> None:
    """The recipe's fixed questions, answered: for reading, not for counting."""
    from recipes.stages.generation import generate

    prompts = [recipe.ask(question) for question in recipe.cases.values()]
    answers = generate(model, prompts, sampling, recipe.stop, max_length, team=processes.team())
    if processes.rank():
        return
    with writing(run.path / "cases.md") as file:
        file.write(f"# Fixed questions\n\nModel: {Chosen.opened(run.config).description}.\n")
        for (title, question), answer in zip(recipe.cases.items(), answers, strict=True):
            text = answer.text + (f"\n\n{recipe.notice}" if recipe.notice else "")
            file.write(f"\n## {title}\n\n{question}\n\n{text}\n")
            say(f"{title}\n  question   {question}\n  answer     {text}\n".replace("\n\n", "\n"))
    say(f"all of them: {run.path / 'cases.md'}")


def _write_side_by_side(run: Run, predictions: Sequence[Prediction], untrained: Sequence[str]) -> None:
    notice = Chosen.opened(run.config).description
    with writing(run.path / "answers.md") as file:
        file.write(f"# Answers to {len(predictions)} questions of the test split\n\nBase model: {notice}.\n")
        for number, (p, before) in enumerate(zip(predictions, untrained, strict=True), 1):
            file.write(f"\n## {number}. {_one_line(p.example.text)}\n\n")
            file.write("| fine-tuned | base model | reference |\n|---|---|---|\n")
            file.write(f"| {_one_line(p.answer)} | {_one_line(before)} | {_one_line(p.example.answer)} |\n")


def _one_line(text: str) -> str:
    """For a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;") or "(empty)"


def _by_class(run: Run, items: list[Example], classifier: Classifier, done: Any) -> dict[str, Any]:
    import numpy as np

    from recipes.stages import pictures
    from recipes.stages.classes import PROBLEM, averages, by_class, confusions, intervals
    from recipes.stages.confidence import calibration_error, coverage_curve, probabilities

    began = time.perf_counter()
    team = processes.team()
    log_p, known = classifier.log_probabilities([example.prompt for example in items], done, team)
    seconds = time.perf_counter() - began
    verdicts = classifier.rank(log_p, known)
    true = [example.answer for example in items]
    predicted = [verdict.ranking[0][0] for verdict in verdicts]
    correct = np.array([t == p for t, p in zip(true, predicted, strict=True)])
    confidence = np.array([verdict.confidence for verdict in verdicts])
    classes = by_class(true, predicted, known.train_rows)
    curve = coverage_curve(confidence, correct)
    asked = classifier.scoring.min_confidence
    sure = confidence >= asked
    results = {
        "rows": len(items),
        "classes": len(classes),
        **averages(true, predicted),
        "calibration_error": calibration_error(confidence, correct),
        "calibration_error_before": calibration_error(probabilities(log_p).max(axis=1), correct),
        "temperature": known.temperature,
        **({"min_confidence": asked, "answered": float(sure.mean())} if asked else {}),
        **({"accuracy_of_answered": float(correct[sure].mean())} if asked and sure.any() else {}),
        "seconds": round(seconds, 2),
        "intervals_95": intervals(true, predicted),
        "problem_classes": [line for line in classes if line["f1"] < PROBLEM],
        "confusions": confusions(true, predicted)[:20],
        "coverage": curve,
        "by_class": classes,
    }
    if team.rank:
        return results
    _write_verdicts(run, items, verdicts)
    pictures.confusion(run.path / "confusion.png", true, predicted)
    pictures.by_size(run.path / "f1_by_class_size.png", classes)
    pictures.coverage(run.path / "coverage.png", curve)
    return results


def _write_verdicts(run: Run, items: Sequence[Example], verdicts: Sequence[Verdict]) -> None:
    with writing(run.path / "predictions.csv", newline="") as file:
        file.write(table_line(("text", "true", *CELLS)))
        for example, verdict in zip(items, verdicts, strict=True):
            file.write(table_line((example.text, example.answer, *verdict.cells)))


def show_answer(recipe: Recipe, run: Run, model: Model, example: Example, max_length: int) -> None:
    say(f"  question   {example.prompt[-1].content.splitlines()[-1]}")
    if recipe.closed:
        verdict = Classifier(recipe).use(model, run, max_length).verdicts([example.prompt])[0]
        say(f"  answer     {verdict.code}, {verdict.confidence:.0%} sure")
    else:
        from recipes.stages.generation import generate

        say(f"  answer     {generate(model, [example.prompt], recipe.sampling, recipe.stop, max_length)[0].text}")
    say(f"  reference  {example.answer}")
    if recipe.notice:
        say(f"  {recipe.notice}")


def tell(results: dict[str, Any]) -> None:
    ranges = results.get("intervals_95", {})
    for name, value in results.items():
        if isinstance(value, float):
            between = "  95 % between {:.4f} and {:.4f}".format(*ranges[name]) if name in ranges else ""
            say(f"  {name:<26} {value:.4f}{between}")
        elif isinstance(value, int):
            say(f"  {name:<26} {value:,}")
    problems = results.get("problem_classes", [])
    if problems:
        say(f"  {len(problems)} of {results['classes']} classes have an F1 below one half:")
    for line in problems[:10]:
        taken = ", ".join(f"{code} ({count})" for code, count in line["taken_for"].items()) or "nothing else"
        say(
            f"    {line['class']:<8} F1 {line['f1']:.2f}, {line['train_rows']} training rows, "
            f"{line['test_rows']} test rows, taken for {taken}"
        )
    if len(problems) > 10:
        say("    …")
