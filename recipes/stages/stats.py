"""What a file holds, before anything is trained on it."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.stages.console import say
from recipes.stages.prepare import read_rows, sample_file
from recipes.stages.recipe import Recipe
from recipes.stages.render import Renderer


def stats(recipe: Recipe, source: Path | None, options: Any, tokenizer: Any, max_length: int) -> None:
    """Rows, their numbers by facet, and their lengths in tokens as the model will see them."""
    file = source or sample_file(recipe)
    rows, reading = read_rows(recipe, file, options)
    say(f"{file}: {len(rows):,} rows" + "".join(f", {name} {value}" for name, value in reading.notes.items()))
    for reason, lines in reading.dropped.items():
        say(f"  dropped {len(lines):,}: {reason} (line {', '.join(map(str, lines[:5]))}{' …' * (len(lines) > 5)})")
    for facet in recipe.facets:
        counts = Counter(row[facet] for row in rows)
        say(f"\n{facet}")
        for value, count in counts.most_common():
            say(f"  {count:>7,}  {value}")
    renderer = Renderer(tokenizer, recipe.stop_phrase)
    rendered = [tokens for tokens in renderer.examples([recipe.to_example(row) for row in rows]) if tokens is not None]
    say("\ntokens              median    90 %    99 %    most")
    for what, lengths in (
        ("whole example", [len(tokens.input_ids) for tokens in rendered]),
        ("its answers", [tokens.supervised_tokens for tokens in rendered]),
    ):
        say(f"  {what:<15}" + "".join(f"{_quantile(lengths, q):>8,}" for q in (0.5, 0.9, 0.99, 1)))
    longer = sum(len(tokens.input_ids) > max_length for tokens in rendered)
    say(f"  {longer:,} examples are longer than --max-length {max_length}")


def _quantile(values: Sequence[int], share: float) -> int:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
