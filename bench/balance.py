"""Which way of weighing rare classes wins: every way trained from the same start on the same data, over several seeds.

Each training is a process of its own, through the user's own train and evaluate; a seed decides the data, the
split, the start and the order. The test split is larger than usual, so that rare classes can be measured on it.
"""

import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from bench.statistics import mean_interval
from recipes.gemma3_12b_opercode import RECIPE
from recipes.samples.payments import write_csv
from recipes.stages.console import say
from recipes.stages.prepare import prepare
from recipes.stages.recipe import Split, UserError
from recipes.stages.run import environment, read_json, write_json

PLAIN = ("--class-weights", "none", "--focal-gamma", "0", "--logit-adjustment", "0", "--sampler", "none")
WAYS: dict[str, tuple[str, ...]] = {
    "cross-entropy": (),
    "weights": ("--class-weights", "balanced"),
    "focal": ("--focal-gamma", "2"),
    "weights + focal": ("--class-weights", "balanced", "--focal-gamma", "2"),
    "weighted sampler": ("--sampler", "weighted"),
    "sqrt sampler": ("--sampler", "sqrt"),
    "logit adjustment": ("--logit-adjustment", "1"),
}
MORE: dict[str, tuple[str, ...]] = {
    "effective weights": ("--class-weights", "effective"),
    "sqrt sampler + logit adjustment": ("--sampler", "sqrt", "--logit-adjustment", "1"),
}
ALL = WAYS | MORE
SCORES = ("f1_macro", "f1_micro", "accuracy", "rare_recall")


@dataclass(frozen=True)
class Balance:
    """Compare the ways of weighing rare classes."""

    ways: tuple[str, ...] = tuple(WAYS)
    """Which ways to compare; there are also those of MORE."""
    seeds: int = 5
    """Trainings of each way."""
    rows: int = 6500
    """Payments per seed: 28 % to train on, 12 % to choose the checkpoint by, 60 % to test on."""
    classes: int = 12
    """Codes among them."""
    jobs: int = 1
    """Trainings at one time, each with its share of the cores."""
    backend: str = "peft"
    """Backend that trains."""
    out: Path | None = None
    """Folder for table, picture and raw figures; what is already there is not trained again."""
    json: bool = False
    """Print the summary as JSON."""
    flags: str = ""
    """More flags for every training, as in --flags="--epochs 3 --lora-rank 32"."""


def main(arguments: list[str]) -> None:
    args = tyro.cli(Balance, prog="python -m bench balance", args=arguments)
    unknown = [way for way in args.ways if way not in ALL]
    if unknown:
        raise UserError(f"--ways {unknown[0]!r}: unknown; there are {', '.join(map(repr, ALL))}")
    folder = args.out or Path(tempfile.mkdtemp(prefix="balance-"))
    folder.mkdir(parents=True, exist_ok=True)
    done = measure(args, folder)
    summary: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "bench", "balance", *arguments]),
        "environment": environment(),
        "rows": args.rows,
        "classes": args.classes,
        "seeds": args.seeds,
        "ways": summarise(args.ways, done),
        "runs": done,
    }
    write_json(folder / "summary.json", summary)
    picture(folder / "balance.png", summary["ways"])
    if args.json:
        print(json.dumps(summary, ensure_ascii=False))
    else:
        tell(summary["ways"])
        say(f"\neverything is in {folder}")


def measure(args: Balance, folder: Path) -> list[dict[str, Any]]:
    """Every way with every seed, in an order drawn by lot: what disturbs the machine disturbs no way more."""
    cases = [(way, seed) for way in args.ways for seed in range(args.seeds)]
    random.Random(0).shuffle(cases)
    for seed in range(args.seeds):
        write_csv(folder / f"payments-{seed}.csv", args.rows, args.classes, seed)
    began = time.monotonic()
    found: list[dict[str, Any]] = []

    def one(case: tuple[str, int]) -> None:
        found.append(train(args, folder, *case))
        if not args.json:
            result = found[-1]
            what = result.get("failed") or f"macro F1 {result['f1_macro']:.3f}, accuracy {result['accuracy']:.3f}"
            say(f"{len(found)}/{len(cases)} after {time.monotonic() - began:.0f} s: {case[0]}, seed {case[1]}: {what}")

    with ThreadPoolExecutor(args.jobs) as pool:
        for future in [pool.submit(one, case) for case in cases]:
            future.result()
    return sorted(found, key=lambda run: (args.ways.index(run["way"]), run["seed"]))


def train(args: Balance, folder: Path, way: str, seed: int) -> dict[str, Any]:
    run = folder / "runs" / f"{way.replace(' ', '-')}-{seed}"
    results = run / "evaluation_results.json"
    if not results.is_file():
        recipe = replace(RECIPE, split=Split(validation=0.12, test=0.60, by="label"))
        prepare(recipe, folder / f"payments-{seed}.csv", recipe.options, seed, run, quiet=True)
        module = [sys.executable, "-m", f"recipes.{RECIPE.name}"]
        environ = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
        for command in (
            ["train", "--run", run, "--size", "tiny", "--backend", args.backend, "--seed", seed, *PLAIN, *ALL[way],
             *shlex.split(args.flags)],
            ["evaluate", "--run", run],
        ):  # fmt: skip
            ended = subprocess.run([*module, *map(str, command)], env=environ, capture_output=True, text=True)
            if ended.returncode:
                last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
                return {"way": way, "seed": seed, "failed": last}
    measured = read_json(results)
    # Rare: the smaller half of the classes.
    rare = sorted(measured["by_class"], key=lambda line: line["train_rows"])[: len(measured["by_class"]) // 2]
    return {
        "way": way,
        "seed": seed,
        **{name: measured[name] for name in SCORES if name in measured},
        "rare_recall": float(np.mean([line["recall"] for line in rare])),
    }


def summarise(ways: Sequence[str], runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    lines = []
    for way in ways:
        mine = [run for run in runs if run["way"] == way and "failed" not in run]
        line: dict[str, Any] = {"way": way, "trainings": len(mine)}
        failed = [run["failed"] for run in runs if run["way"] == way and "failed" in run]
        if failed:
            line["failed"] = failed
        for name in SCORES if mine else ():
            mean, low, high = mean_interval([run[name] for run in mine])
            line[name] = {"mean": mean, "low": low, "high": high}
        lines.append(line)
    return lines


def tell(lines: Sequence[dict[str, Any]]) -> None:
    say(f"\n{'':<32}" + "".join(f"{name:>26}" for name in SCORES))
    for line in sorted(lines, key=lambda line: -line.get("f1_macro", {"mean": 0})["mean"]):
        figures = [line.get(name) for name in SCORES]
        cells = [f"{f['mean']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" if f else "failed" for f in figures]
        say(f"{line['way']:<32}" + "".join(f"{cell:>26}" for cell in cells))
    say(
        "mean over the seeds and its 95 % interval (Student's t); rare_recall: mean recall of the smaller half of codes"
    )


def picture(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    from recipes.stages.pictures import save

    lines = sorted((line for line in lines if "f1_macro" in line), key=lambda line: line["f1_macro"]["mean"])
    figure = Figure(figsize=(8, 0.9 + 0.42 * len(lines)))
    axes = figure.add_subplot()
    for name, colour, label in (
        ("accuracy", "#8a94a0", "accuracy"),
        ("rare_recall", "#c05621", "recall of the rarer half"),
        ("f1_macro", "#2b6cb0", "macro F1"),
    ):
        for place, line in enumerate(lines):
            f = line[name]
            axes.plot([f["low"], f["high"]], [place, place], color=colour, linewidth=3, alpha=0.35)
            axes.plot(f["mean"], place, "o", color=colour, label=label if place == 0 else None)
    axes.set_yticks(range(len(lines)), [line["way"] for line in lines])
    axes.set_xlabel("mean over the seeds, with its 95 % interval")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3, frameon=False)
    save(figure, path)
