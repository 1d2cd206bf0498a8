"""Where the figures of a measurement go."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.stages.run import write_json


def deliver(summary: dict[str, Any], out: Path | None, as_json: bool) -> bool:
    """Into a file and onto standard output, as was asked; False where words should follow."""
    if out:
        write_json(out, summary)
    if as_json:
        print(json.dumps(summary, ensure_ascii=False))
    return as_json


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; its first column is text, the others are figures."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))
