"""Will it fit, how long does it take: calculated, for one recipe or all; and what such figures are worth here.

python -m bench plan                                    all recipes in one table
python -m bench plan --recipe NAME --rows N --json      as python -m recipes.NAME plan
python -m bench plan --check --out results/plan_check.json
"""

import importlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from bench.recipes import NAMES
from bench.report import deliver, markdown
from fallback.choose import BACKENDS, BackendName
from recipes.stages import plan
from recipes.stages.cli import run_command
from recipes.stages.console import held_back, say
from recipes.stages.recipe import UserError
from recipes.stages.run import environment


@dataclass(frozen=True)
class Plan:
    """Calculate trainings before any download. With --recipe NAME: that one in full, with all flags of
    python -m recipes.NAME plan."""

    recipes: tuple[str, ...] = tuple(NAMES)
    """Which stand in the table, or are checked; all if none is named."""
    rows: int = 10_000
    """Training examples."""
    gpu: tuple[str, ...] = ("12GB", "16GB", "24GB")
    """Cards, by name or memory."""
    check: bool = False
    """Hold the memory calculated against that of real trainings on this machine, term by term."""
    backends: tuple[BackendName, ...] = BACKENDS
    """Of --check: under which; one that cannot run here is left out."""
    out: Path | None = None
    """Also write the figures to this JSON file."""
    json: bool = False
    """Print the figures as JSON."""


def main(arguments: list[str]) -> None:
    if "--recipe" in arguments:
        at = arguments.index("--recipe")
        name = "".join(arguments[at + 1 : at + 2])
        run_command(recipe_named(name), ["plan", *arguments[:at], *arguments[at + 2 :]])
        return
    args = tyro.cli(Plan, prog="python -m bench plan", args=arguments)
    recipes = [recipe_named(name) for name in args.recipes]
    if args.check:
        from bench import plan_check

        summary = plan_check.check(recipes, args.backends, arguments)
        if not deliver(summary, args.out, args.json):
            say(plan_check.table(summary))
        return
    gpus = [plan.card(name) for name in args.gpu]
    with tempfile.TemporaryDirectory() as folder, held_back(Path(folder) / "libraries.log"):
        found = [line_of(recipe, args.rows, gpus) for recipe in recipes]
        summary = {"rows": args.rows, "environment": environment(), "recipes": found}
        if not deliver(summary, args.out, args.json):
            say(table(found, args.rows))


def recipe_named(name: str) -> Any:
    if name not in NAMES:
        raise UserError(f"--recipe {name!r}: unknown; there are {', '.join(NAMES)}")
    return importlib.import_module(f"recipes.{name}").RECIPE


def line_of(recipe: Any, rows: int, gpus: list[Any]) -> dict[str, Any]:
    settings = recipe.settings
    planned = plan.plan(recipe, settings, rows)
    return {
        "recipe": recipe.name,
        "total_parameters": planned.total_parameters,
        "trainable_parameters": planned.trainable_parameters,
        "adapter_bytes": planned.adapter_bytes,
        "optimizer_steps": planned.optimizer_steps,
        "batch": [settings.batch_size, settings.accumulation, settings.max_length],
        "peak_bytes": {name: sum(terms.values()) for name, terms in planned.memory_bytes.items()},
        "fits": {gpu.name: plan.verdict(plan.need(recipe, settings, gpu), gpu) for gpu in gpus},
    }


def table(found: list[dict[str, Any]], rows: int) -> str:
    """A row per recipe."""
    backends = {name: None for line in found for name in line["peak_bytes"]}
    gpus = list(found[0]["fits"]) if found else []
    header = ["recipe", "parameters", "trained", "adapter, bytes", f"steps for {rows:,}", "batch x parts x tokens",
              *(f"{name}, GiB" for name in backends), *gpus]  # fmt: skip
    lines = [
        [
            line["recipe"],
            *(f"{line[name]:,}" for name in
              ("total_parameters", "trainable_parameters", "adapter_bytes", "optimizer_steps")),
            " x ".join(map(str, line["batch"])),
            *(f"{line['peak_bytes'][name] / plan.GIB:.1f}" if name in line["peak_bytes"] else "" for name in backends),
            *(line["fits"][name] for name in gpus),
        ]
        for line in found
    ]  # fmt: skip
    return markdown(header, lines)
