"""Every recipe as a new user runs it, from its sample to its evaluation, and what each evaluation printed.

python -m bench recipes                          all of them at size tiny
python -m bench recipes --recipes gemma2_2b_ohlora polyglot_1_3b_ohlora --out results/recipes_tiny.json
"""

import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from bench.report import deliver, markdown
from fallback.choose import Backend
from recipes.stages.base_model import Size
from recipes.stages.console import say
from recipes.stages.recipe import UserError
from recipes.stages.run import environment, read_json

NAMES = sorted(path.stem for path in (Path(__file__).parents[1] / "recipes").glob("[!_]*.py"))
SHOWN = (
    "accuracy", "f1_macro", "validation_perplexity", "chrf", "rouge_l", "distinct_2", "empty", "identical_to_another",
    "foreign", "stopped_by_itself",
)  # fmt: skip
"""Metrics of the evaluations that stand in the table; each recipe has its own of them."""


@dataclass(frozen=True)
class Recipes:
    """Run every recipe on its own sample."""

    recipes: tuple[str, ...] = tuple(NAMES)
    """Which; all if none is named."""
    size: Size = "tiny"
    """As for train."""
    backend: Backend = "auto"
    """As for train."""
    flags: str = ""
    """More flags for every recipe, as one string, for instance "--max-steps 40"."""
    out: Path | None = None
    """Also write the figures to this JSON file."""
    json: bool = False
    """Print the figures as JSON."""


def main(arguments: list[str]) -> None:
    args = tyro.cli(Recipes, prog="python -m bench recipes", args=arguments)
    unknown = [name for name in args.recipes if name not in NAMES]
    if unknown:
        raise UserError(f"--recipes {unknown[0]!r}: unknown; there are {', '.join(NAMES)}")
    with tempfile.TemporaryDirectory(prefix="bench-recipes-") as folder:
        found = [one(name, args, Path(folder)) for name in args.recipes]
    summary = {
        "command": shlex.join(["python", "-m", "bench", "recipes", *arguments]),
        "environment": environment(),
        "recipes": found,
    }
    if not deliver(summary, args.out, args.json):
        say(table(found))


def one(name: str, args: Recipes, folder: Path) -> dict[str, Any]:
    """A recipe's command in a process of its own; its failure is a line of the table."""
    print(f"{name} …", file=sys.stderr, flush=True)
    run = folder / name
    command = [sys.executable, "-m", f"recipes.{name}", "--size", args.size, "--backend", args.backend]
    began = time.perf_counter()
    done = subprocess.run([*command, "--run", str(run), *shlex.split(args.flags)], capture_output=True, text=True)
    line: dict[str, Any] = {"recipe": name, "seconds": round(time.perf_counter() - began, 1)}
    if done.returncode:
        return {**line, "failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    metrics, config, choice = (read_json(run / f"{part}.json") for part in ("metrics", "training_config", "choice"))
    return {
        **line,
        "model": config["base_model"]["name"],
        "size": config["base_model"]["size"],
        "notice": config["notice"],
        "backend": choice["backend"],
        "train": {key: metrics["train"][key] for key in ("optimizer_steps", "first_loss", "final_loss")},
        "test": metrics["test"],
    }


def table(found: list[dict[str, Any]]) -> str:
    """A row per metric and a column per recipe: the recipes share few metrics."""
    done = [line for line in found if "failed" not in line]
    rows = [["size and backend", *(f"{line['size']}, {line['backend']}" for line in done)]]
    rows.append(
        ["loss, first and last", *("{first_loss:.2f}, {final_loss:.2f}".format(**line["train"]) for line in done)]
    )
    for name in ("rows", *SHOWN):
        if any(name in line["test"] for line in done):
            rows.append([name, *(_cell(line["test"].get(name)) for line in done)])
    rows.append(["whole command, s", *(f"{line['seconds']:.0f}" for line in done)])
    told = [markdown(["", *(line["recipe"] for line in done)], rows)] if done else []
    return "\n".join([*told, *(f"{line['recipe']} failed: {line['failed']}" for line in found if "failed" in line)])


def _cell(value: float | int | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.3f}"
