"""One text, a file, or lines on standard input -> answers."""

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from recipes.stages import processes
from recipes.stages.cells import CELLS, answer_cells, table_line
from recipes.stages.classifier import Classifier, Scoring
from recipes.stages.console import progress, say, typed
from recipes.stages.loading import Model
from recipes.stages.memory import asker
from recipes.stages.read import Layout, csv_records, layout_of
from recipes.stages.recipe import Reading, Recipe, Sampling, UserError
from recipes.stages.run import Run, read_json, write_json

Answerer = Callable[[Sequence[str]], list[list[str]]]
"""Texts -> for each the cells of its answer."""

# Rows that are answered, written and never answered again, whatever happens afterwards.
CHUNK = 1024


def texts(text: str | None) -> Iterable[str]:
    if text is None:
        return lines()
    if not text.strip():
        raise UserError('predict: the text is empty; give one, as in predict "…", or lines on standard input')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("predict: the text is not valid in this terminal's encoding; put it into a file") from None
    return [text]


def lines() -> Iterator[str]:
    if sys.stdin.isatty():
        say("type a text and press Enter; Ctrl-D ends")
    for line in typed():
        if line.strip():
            yield line.strip()


def answerer(
    recipe: Recipe, run: Run, model: Model, answering: Sampling | Scoring, max_length: int, recall: Any = None
) -> tuple[list[str], Answerer]:
    """The names of an answer's cells, and what fills them."""
    ask = asker(recipe, recall)
    if isinstance(answering, Scoring):
        classifier = Classifier(recipe, scoring=answering).use(model, run, max_length)

        def classify(batch: Sequence[str]) -> list[list[str]]:
            return [verdict.cells for verdict in classifier.verdicts([ask(text) for text in batch])]

        return CELLS, classify
    from recipes.stages.generation import several

    def respond(batch: Sequence[str]) -> list[list[str]]:
        found = several(model, [ask(text) for text in batch], answering, recipe.stop, max_length)
        return [[*(answer.text for answer in some), str(sum(answer.stopped for answer in some))] for some in found]

    return answer_cells(answering.answers), respond


def tell_speed(recipe: Recipe, model: Model, questions: Sequence[str], sampling: Sampling, max_length: int) -> None:
    """Prefill and decode, each question alone, as in a conversation."""
    from statistics import median

    from recipes.stages.generation import speed

    found = [speed(model, recipe.ask(question), sampling, max_length) for question in questions]
    say(
        f"{len(found)} questions of {median(one.prompt_tokens for one in found):.0f} tokens, "
        f"{found[0].new_tokens} new tokens each, one at a time; medians:"
    )
    say(f"  prefill         {median(one.prompt_tokens / one.prefill_seconds for one in found):10.1f} tokens/s")
    say(f"  first token in  {median(one.prefill_seconds for one in found):10.3f} s")
    say(f"  decode          {median(one.new_tokens / one.decode_seconds for one in found):10.1f} tokens/s")


def to_terminal(recipe: Recipe, answer: Answerer, questions: Iterable[str], batch_size: int) -> None:
    """Print an answer for every question, as soon as its batch is done."""
    questions = iter(questions)
    # Somebody typing waits for each answer; a pipe is served in batches.
    size = 1 if sys.stdin.isatty() else batch_size
    while batch := list(islice(questions, size)):
        for cells in answer(batch):
            for line in ["\t".join(cells[:2])] if recipe.closed else cells[:-1]:
                say(line.replace("\n", " "))
            if recipe.notice:
                say(recipe.notice)


def to_file(
    source: Path, target: Path, text_column: str, names: Sequence[str], answer: Answerer, made_with: dict[str, Any]
) -> int:
    """Every row of a CSV file with its answer in further columns; returns the number of rows.

    What is done lies in `<target>.part`. If the same command is given again after an interruption, it goes on
    behind the last whole row there.
    """
    if target.is_dir() or not target.parent.is_dir():
        raise UserError(f"--out {target}: no file can be there; name one in a folder that exists")
    layout = layout_of(source, (text_column,), Reading(source), older=("cp1251",))
    status = source.stat()
    order = {**made_with, "source": _mark(source), "bytes": status.st_size, "modified": status.st_mtime_ns}
    part, about = target.with_name(target.name + ".part"), target.with_name(target.name + ".part.json")
    team = processes.team()
    rows, size = processes.first(lambda: list(_finished(part, about, order)))
    if rows:
        say(f"{part}: {rows:,} rows are done, going on behind them")
    total = sum(1 for _ in csv_records(source, layout))
    records = (cells for _, cells in islice(csv_records(source, layout), rows, None))
    writes = team.rank == 0
    with (
        (part if writes else Path(os.devnull)).open("a", encoding="utf-8", newline="") as file,
        progress("answering", "rows") as bar,
    ):
        if writes:
            # Whatever came after the last finished chunk may be half a row.
            file.truncate(size)
        if not size:
            file.write(table_line((*layout.header, *names)))
        task = bar.add_task("", total=total, completed=rows)
        while batch := list(islice(records, CHUNK * team.size)):
            # Whole chunks to each process: what is computed together is the same, however many there are.
            chunks = [batch[i : i + CHUNK] for i in range(0, len(batch), CHUNK)]
            mine = [(n, list(_answered(c, layout, text_column, answer, len(names)))) for n, c in team.mine(chunks)]
            answered = team.together(mine)
            rows += len(batch)
            bar.advance(task, len(batch))
            if writes:
                file.writelines(table_line(cells) for chunk in answered for cells in chunk)
                file.flush()
                os.fsync(file.fileno())
                write_json(about, {"order": order, "rows": rows, "bytes": os.fstat(file.fileno()).st_size})
    if writes:
        part.replace(target)
        about.unlink(missing_ok=True)
    return total


def _mark(path: Path) -> str:
    """Tells a path from others without naming it."""
    return hashlib.sha256(str(path.resolve()).encode(errors="surrogateescape")).hexdigest()[:16]


def _answered(
    batch: Sequence[list[str]], layout: Layout, text_column: str, answer: Answerer, width: int
) -> Iterator[list[str]]:
    """The batch's rows with their answers; rows without a text get none."""
    at = layout.where[text_column]
    asked = [i for i, cells in enumerate(batch) if len(cells) > at and cells[at].strip()]
    answers = dict(zip(asked, answer([batch[i][at] for i in asked]) if asked else [], strict=True))
    for i, cells in enumerate(batch):
        padded = [*cells, *[""] * (layout.width - len(cells))][: layout.width]
        yield [*padded, *answers.get(i, [""] * width)]


def _finished(part: Path, about: Path, order: dict[str, Any]) -> tuple[int, int]:
    """Rows and bytes of an unfinished file that are done."""
    if not part.is_file() or not about.is_file():
        return 0, 0
    before = read_json(about)
    try:
        differences = [key for key in order if before["order"].get(key) != order[key]]
        done = int(before["rows"]), int(before["bytes"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{about}: not what was written there; delete it and {part} to start over") from None
    if differences:
        raise UserError(
            f"{part} was begun with another {' and '.join(differences)}; finish it with that, or delete it to start "
            "over"
        )
    return done


def made_with(run: Run, answering: Sampling | Scoring, dtype: str) -> dict[str, Any]:
    """What answers depend on, to tell whether an unfinished file can be continued."""
    settings = {"min_confidence": answering.min_confidence} if isinstance(answering, Scoring) else asdict(answering)
    weights = (run.adapter / "adapter_model.safetensors").stat()
    return {"run": _mark(run.path), "adapter": weights.st_mtime_ns, "dtype": dtype, **settings}
