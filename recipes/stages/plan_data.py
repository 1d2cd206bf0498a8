"""How many tokens an epoch has, counted with the tokenizer that is at hand."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.stages.base_model import ensure_files, load_tokenizer, settle, tokenizer_file
from recipes.stages.prepare import read_rows, sample_file
from recipes.stages.recipe import Recipe, Row
from recipes.stages.render import Renderer
from recipes.stages.run import find_run, read_jsonl

_COUNTED = 1000
"""Examples that are rendered; of more, these are spread over the file."""


@dataclass(frozen=True)
class Counted:
    rows: int
    """Examples that an epoch trains on."""
    tokens_per_epoch: int
    how: str


def count(
    recipe: Recipe, options: Any, source: Path | None, run: Path | None, rows: int | None, max_length: int
) -> Counted:
    """Of a prepared run, a file, or the recipe's sample; with `rows` alone the sample's mean, scaled."""
    if run is not None:
        prepared = find_run(recipe, run, lambda run: run.prepared, "prepare it, or name a file with --source")
        there: Sequence[Row] = list(read_jsonl(prepared.data / "train.jsonl"))
        share, what = 1.0, str(run)
    else:
        there, _ = read_rows(recipe, source or sample_file(recipe), options)
        share, what = _trained_share(recipe, there), str(source) if source else "the recipe's own sample"
    mean, whose, looked_at = _mean_tokens(recipe, there, max_length)
    trained = rows if rows is not None else max(1, round(share * len(there)))
    scaled = rows is not None or looked_at < len(there)
    how = f"{'an estimate from' if scaled else 'counted in'} {looked_at:,} examples of {what}, by {whose}"
    return Counted(trained, round(mean * trained), how)


def _trained_share(recipe: Recipe, rows: Sequence[Row]) -> float:
    split = recipe.split
    if split.assigned:
        return sum(row[split.assigned] == "train" for row in rows) / len(rows)
    return 1 - split.validation - split.test


def _mean_tokens(recipe: Recipe, rows: Sequence[Row], max_length: int) -> tuple[float, str, int]:
    chosen, whose = settle(recipe, "full", "pretrained"), f"{recipe.base.hub_id}'s tokenizer"
    if tokenizer_file(chosen) is None:
        chosen = settle(recipe, "tiny", "random")
        whose = f"this project's own small tokenizer, since {recipe.base.hub_id}'s is not on this machine"
        ensure_files(recipe, chosen)
    renderer = Renderer(load_tokenizer(recipe, chosen.source), recipe.stop_phrase)
    some = rows[:: -(-len(rows) // _COUNTED)]
    rendered = list(renderer.examples([recipe.to_example(row) for row in some], max_length))
    lengths = [len(tokens.input_ids) for tokens in rendered if tokens is not None]
    return sum(lengths) / max(1, len(some)), whose, len(some)
