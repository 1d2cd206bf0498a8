"""Whether bench compare can be believed here: how often it finds a difference between two equal arms, and how often
it finds one that was put there.

    python -m bench trust --out results/trust.json      hours of patience are well spent: 480 trainings

A comparison of an arm with itself should find nothing; at a level of 99 %, one of a hundred does by chance. The
planted slow-down sleeps at the end of every step of one arm (BENCH_PLANT_SLEEP), for a share of what the step took.
"""

import os
import random
import shlex
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from bench.case import Grid, arms
from bench.compare import Compare, flags, named
from bench.launch import are_by_step, finished, sweep
from bench.report import deliver, differs, said
from bench.statistics import RATIO_LEVEL
from bench.summary import summarise
from fallback.torch_build import usable_gpu
from recipes.stages.console import say
from recipes.stages.recipe import UserError
from recipes.stages.run import environment


@dataclass(frozen=True)
class Trust:
    """Measure the false alarms and the misses of bench compare."""

    runs: int = 20
    """Comparisons of equal arms, and as many with the slow-down."""
    repeats: int = 6
    """Pairs of each comparison."""
    steps: int = 20
    """Training steps of each case."""
    planted: float = 0.10
    """The slow-down, as a share of a step."""
    recipe: str = "polyglot_1_3b_ohlora"
    """The recipe that is trained, at size tiny."""
    out: Path | None = None
    """Also write the figures to this JSON file."""
    json: bool = False
    """Print the figures as JSON."""


def main(arguments: list[str]) -> None:
    args = tyro.cli(Trust, prog="python -m bench trust", args=arguments)
    asked = Compare(
        recipes=args.recipe, backends="peft,peft", size="tiny", phases="train", steps=args.steps, repeats=args.repeats
    )
    found: dict[str, list[dict[str, Any]]] = {"equal": [], "planted": []}
    with tempfile.TemporaryDirectory(prefix="bench-trust-") as folder:
        # The two kinds take turns, so that both see whatever the machine does meanwhile.
        for run in range(args.runs):
            for kind in found:
                ratio = one(asked, run, Path(folder) / f"{kind}-{run}", args.planted if kind == "planted" else 0.0)
                found[kind].append(ratio)
                say(f"{run + 1:>3}/{args.runs}  {kind:<8} step time {said(ratio)}")
    alarms = sum(differs(ratio) for ratio in found["equal"])
    hits = sum(differs(ratio) and ratio["value"] > 1 for ratio in found["planted"])
    summary = {
        "command": shlex.join(["python", "-m", "bench", "trust", *arguments]),
        "environment": environment(),
        "runs": args.runs,
        "repeats": args.repeats,
        "planted": args.planted,
        "level": RATIO_LEVEL,
        "false_alarms": alarms,
        "found": hits,
        "comparisons": found,
    }
    if not deliver(summary, args.out, args.json):
        say(f"{alarms} false alarms in {args.runs} comparisons of equal arms")
        say(f"{hits} of {args.runs} slow-downs by {args.planted:.0%} were found")


def one(asked: Compare, run: int, folder: Path, planted: float) -> dict[str, Any]:
    """One comparison; its ratio of step times, the first arm, which may be slowed down, to the second."""
    recipes, backends = named(asked), ("peft", "peft")
    grid = Grid(
        recipes, backends, asked.repeats,
        {(r.name, arm): flags(asked, "tiny", backend) for r in recipes for arm, backend in arms(backends).items()},
        ("train",), asked.warmup,
    )  # fmt: skip
    os.environ["BENCH_PLANT_SLEEP"] = f"peft:{planted}"
    try:
        by_step = are_by_step(asked.turns, usable_gpu() is not None, [asked.size], len(backends))
        list(sweep(grid.cases(run), folder, asked.limit, {}, lambda case, row: None, by_step, random.Random(run)))
    finally:
        del os.environ["BENCH_PLANT_SLEEP"]
    rows = list(finished(folder).values())
    failed = [row for row in rows if row["status"] != "measured"]
    if failed:
        raise UserError(f"bench trust: {failed[0]['arm']} {failed[0]['status']}: {failed[0]['reason']}")
    (recipe,) = summarise(rows, {"command": "", "seed": run, "settings": asdict(asked)}, {})["recipes"]
    (comparison,) = recipe["comparisons"]
    return comparison["train"]["step_seconds_median"]
