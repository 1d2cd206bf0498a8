"""Rows -> cleaned, split -> data/."""

import csv
import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

from recipes.stages.console import say
from recipes.stages.recipe import Example, Reading, Recipe, Row, Split, UserError
from recipes.stages.run import NOT_OURS, BrokenFile, Run, new_run, place_beside, read_jsonl, write_json, writing

SAMPLES = Path(__file__).parents[1] / "samples"
CACHE = Path(__file__).parents[2] / ".cache" / "samples"
SPLITS = ("train", "val", "test")


def sample_file(recipe: Recipe) -> Path:
    """The recipe's own small data; generated ones are written once."""
    if isinstance(recipe.sample, str):
        return SAMPLES / recipe.sample
    path = CACHE / f"{recipe.name}.csv"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        recipe.sample(path)
    return path


def read_rows(recipe: Recipe, source: Path, options: Any) -> tuple[list[Row], Reading]:
    reading = Reading(source)
    rows = list(recipe.read(source, options, reading))
    reading.kept = len(rows)
    if not rows:
        reasons = ", ".join(f"{reason}: {len(lines)}" for reason, lines in reading.dropped.items())
        raise UserError(f"{source}: no usable rows ({reasons or 'the file has none'})")
    return rows, reading


def sample_examples(recipe: Recipe) -> list[Example]:
    rows, _ = read_rows(recipe, sample_file(recipe), recipe.options)
    return [recipe.to_example(row) for row in rows]


@cache
def sample_texts(recipe: Recipe) -> list[str]:
    """What a tokenizer for this recipe has to spell."""
    return list(dict.fromkeys(m.content for example in sample_examples(recipe) for m in example.messages))


def split_rows(rows: Sequence[Row], split: Split, seed: int) -> dict[str, list[Row]]:
    """Rows by split, in their original order. Every value of split.by has its share in every split, and at least
    one row in training."""
    groups: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row[split.by] if split.by else None, []).append(index)
    belongs = ["train"] * len(rows)
    for value, members in groups.items():
        generator = random.Random(f"{seed} {value}")
        if split.assigned:
            held_out = [i for i in members if rows[i][split.assigned] != "train"]
            validation = len(held_out) // 2
            test = len(held_out) - validation
        else:
            held_out = members
            validation, test = round(len(members) * split.validation), round(len(members) * split.test)
            while validation + test >= len(members):
                validation, test = (validation - 1, test) if validation >= test else (validation, test - 1)
        drawn = generator.sample(held_out, validation + test)
        for index in drawn[:validation]:
            belongs[index] = "val"
        for index in drawn[validation:]:
            belongs[index] = "test"
    parts: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for row, name in zip(rows, belongs, strict=True):
        parts[name].append(row)
    return parts


def write_split(folder: Path, name: str, rows: Sequence[Row]) -> None:
    """The same rows twice: JSONL is what later stages read, CSV is for people and spreadsheets."""
    with writing(folder / f"{name}.jsonl") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    with writing(folder / f"{name}.csv", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        columns = list(rows[0]) if rows else []
        table.writerow(columns)
        for row in rows:
            table.writerow(
                [v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in map(row.get, columns)]
            )


def prepare(
    recipe: Recipe,
    source: Path | None,
    options: Any,
    seed: int,
    path: Path | None = None,
    max_length: int | None = None,
    tokenizer: Path | None = None,
    quiet: bool = False,
    training: ExitStack | None = None,
) -> Run:
    """Read, clean and split a source file into a run's data/, which appears whole or not at all.

    With max_length it says which inputs will be cut in training; they are counted where a tokenizer.json is at hand.
    No other process may be training there; `training` is given the lock, for one that follows.
    """
    file = source or sample_file(recipe)
    if path is not None and (path / "data").exists() and not Run(path).prepared:
        raise UserError(
            f"--run {path}: its data/ was not prepared by a recipe and would be replaced; name another folder"
        )
    beside = Path(tempfile.mkdtemp(dir=place_beside(path), prefix=".data.making."))
    try:
        if recipe.closed:
            # Imported here: pyarrow takes longer to load than --help takes to answer.
            from recipes.stages import labelled

            found = labelled.prepare(file, options, recipe.split, seed, beside)
            found["longest_bytes"] += _bytes(recipe.to_example({"text": "", "label": max(found["labels"], key=len)}))
        else:
            found = _prepare_rows(recipe, file, options, seed, beside)
        metadata = {
            "recipe": recipe.name,
            # As the user typed it; where this repository lies is nobody's business.
            "source": str(source) if source else f"{file.parent.name}/{file.name}",
            "sample": source is None,
            "seed": seed,
            **found,
        }
        if max_length:
            metadata["cut"] = will_be_cut(recipe, beside, found["longest_bytes"], max_length, tokenizer)
        write_json(beside / "metadata.json", metadata)
        run = new_run(recipe, path)
        with ExitStack() as here:
            (training or here).enter_context(run.locked())
            shutil.rmtree(run.data, ignore_errors=True)
            beside.chmod(0o755)
            beside.replace(run.data)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    if not quiet:
        tell(run, metadata)
    return run


def _prepare_rows(recipe: Recipe, file: Path, options: Any, seed: int, folder: Path) -> dict[str, Any]:
    rows, reading = read_rows(recipe, file, options)
    parts = split_rows(rows, recipe.split, seed)
    empty = [name for name, part in parts.items() if not part]
    if empty:
        raise UserError(
            f"{file}: {len(rows)} usable rows leave nothing for the {' and '.join(empty)} split; more rows are needed"
        )
    for name, part in parts.items():
        write_split(folder, name, part)
    return {
        **reading.notes,
        "rows": len(rows),
        "longest_bytes": max(_bytes(recipe.to_example(row)) for row in rows),
        "dropped": {
            reason: {"rows": len(lines), "first_lines": lines[:20]} for reason, lines in reading.dropped.items()
        },
        "splits": {
            name: {
                "rows": len(part),
                **({recipe.split.by: dict(Counter(row[recipe.split.by] for row in part).most_common())}
                   if recipe.split.by else {}),
            }
            for name, part in parts.items()
        },
    }  # fmt: skip


# What a chat template and a tokenizer's own marks add to the messages, at most, in tokens.
_TEMPLATE = 48


def _bytes(example: Example) -> int:
    return sum(len(message.content.encode()) for message in example.messages)


def will_be_cut(
    recipe: Recipe, folder: Path, longest: int, max_length: int, tokenizer: Path | None
) -> dict[str, int | str]:
    """How many inputs are longer than max_length, and by how much. A token spells a byte at least, so that most
    files need no counting; training counts exactly."""
    if longest + _TEMPLATE <= max_length:
        return {"max_length": max_length, "texts": 0}
    examples = (recipe.to_example(row) for name in SPLITS for row in read_jsonl(folder / f"{name}.jsonl"))
    long = [example for example in examples if _bytes(example) + _TEMPLATE > max_length]
    if tokenizer is None:
        return {"max_length": max_length, "may_be": len(long), "not_counted": "no tokenizer on this machine yet"}
    from tokenizers import Tokenizer

    count = Tokenizer.from_file(str(tokenizer))
    template = _TEMPLATE // 4
    over = [
        tokens - max_length
        for example in long
        if (tokens := template + sum(len(count.encode(m.content, add_special_tokens=False)) for m in example.messages))
        > max_length
    ]
    return {
        "max_length": max_length,
        "texts": len(over),
        "tokens_over": sum(over),
        "longest_over": max(over, default=0),
    }


def tell(run: Run, metadata: dict[str, Any]) -> None:
    try:
        _tell(run, metadata)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BrokenFile(f"{run.data / 'metadata.json'}: {NOT_OURS} ({error!r})") from None


def _tell(run: Run, metadata: dict[str, Any]) -> None:
    sizes = ", ".join(f"{name} {part['rows']:,}" for name, part in metadata["splits"].items())
    what = "the recipe's own sample" if metadata["sample"] else metadata["source"]
    say(f"data: {metadata['rows']:,} rows from {what} -> {run.data} ({sizes})")
    reasons = list(metadata["dropped"].items())
    for reason, rows in reasons[:20]:
        first = rows.get("first_lines", [])[:5]
        lines = ", ".join(map(str, first)) + (" …" if rows["rows"] > 5 else "")
        say(f"  dropped {rows['rows']:,}: {reason}" + (f" (line {lines})" if first else ""))
    if len(reasons) > 20:
        say(f"  and for {len(reasons) - 20:,} more reasons, in {run.data / 'metadata.json'}")
    for code, rows in list(metadata.get("dropped_classes", {}).items())[:10]:
        say(f"    class {code}: {rows} rows")
    cut = metadata.get("cut", {})
    if cut.get("texts"):
        say(
            f"  {cut['texts']:,} inputs are longer than --max-length {cut['max_length']} and will be cut, by "
            f"{cut['tokens_over'] / cut['texts']:.0f} tokens on average and {cut['longest_over']} at most"
        )
    if cut.get("may_be"):
        say(
            f"  {cut['may_be']:,} inputs may be longer than --max-length {cut['max_length']} tokens "
            f"({cut['not_counted']}); training counts them"
        )
    same = metadata.get("identical_texts", {})
    if same.get("with_different_labels"):
        say(
            f"  {same['with_different_labels']:,} texts occur with different labels, and at most one can be right: "
            f"{run.data / 'conflicts.csv'}"
        )
    if same.get("in_more_than_one_split"):
        say(
            f"  {same['in_more_than_one_split']:,} texts are in more than one split: the test is partly a test of "
            "memory; leave --allow-leak away"
        )
    elif same.get("texts"):
        say(f"  {same['texts']:,} texts occur more than once; each is in one split only")
