"""predict --file in one process and in two, taking turns over the same file, and what that means for more of them.

python -m bench scaling --out results/scaling.json

Measured on this machine's processors, each process with one thread in either arm, and counted from the moment the
model is loaded. The projection supposes that what does not become shorter with two processes (reading the file, waiting
for the slower one, writing) does not with more of them either, and deals out whole chunks of rows as predict does.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import tyro

from bench.report import deliver
from recipes.gemma3_12b_opercode import RECIPE
from recipes.samples.payments import write_csv
from recipes.stages import loading, predict, processes
from recipes.stages.classifier import Scoring
from recipes.stages.console import duration, held_back, say
from recipes.stages.recipe import UserError
from recipes.stages.run import environment

NUMBERS = (1, 2, 4, 8)
"""Processes, or GPUs, that it is projected for."""
BANK = 388_706
"""Payments of the file that it is projected for."""


@dataclass(frozen=True)
class Scaling:
    """Measure how predict --file scales."""

    run: Path | None = None
    """A trained run to answer with; without it a tiny model is trained for 60 steps first."""
    rows: int = 4096
    """Rows of the file that is answered."""
    repeats: int = 3
    """Pairs of one process and two."""
    rate: float | None = None
    """Rows a second that one of your GPUs answers: projected with instead of what this machine reached."""
    out: Path | None = None
    """Also write the figures to this JSON file."""
    json: bool = False
    """Print the figures as JSON."""


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--worker"]:
        worker(*map(Path, arguments[1:]))
        return
    args = tyro.cli(Scaling, prog="python -m bench scaling", args=arguments)
    with tempfile.TemporaryDirectory(prefix="bench-scaling-") as folder:
        run = args.run.resolve() if args.run else trained(Path(folder))
        source = Path(folder) / "payments.csv"
        write_csv(source, args.rows, 12, 1)
        pairs = [{n: one(n, run, source, Path(folder) / f"out-{n}.csv") for n in (1, 2)} for _ in range(args.repeats)]
        if (Path(folder) / "out-1.csv").read_bytes() != (Path(folder) / "out-2.csv").read_bytes():
            raise UserError("bench scaling: two processes gave other answers than one")
    speedup = median(pair[1]["seconds"] / pair[2]["seconds"] for pair in pairs)
    rate = args.rate or median(args.rows / pair[1]["seconds"] for pair in pairs)
    summary: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "bench", "scaling", *arguments]),
        "environment": environment(),
        "measured_on": f"processes of one thread each on a CPU with {os.cpu_count()} cores",
        "rows": args.rows,
        "seconds": {str(n): [pair[n]["seconds"] for pair in pairs] for n in (1, 2)},
        "loading_seconds": {str(n): [pair[n]["loading_seconds"] for pair in pairs] for n in (1, 2)},
        "speedup_with_2": speedup,
        "undivided_share": undivided(speedup),
        "rows_per_second_of_one": rate,
        "rate_is_measured": args.rate is None,
        "projected_rows": BANK,
        "projected_seconds": {str(n): projected(n, rate, speedup) for n in NUMBERS},
    }
    if deliver(summary, args.out, args.json):
        return
    say(f"{args.rows:,} rows, {args.repeats} pairs, measured on {summary['measured_on']}")
    for n in (1, 2):
        told = ", ".join(f"{seconds:.1f}" for seconds in summary["seconds"][str(n)])
        say(f"  {n} process{'es' * (n > 1)}: {told} s")
    say(f"  two are {speedup:.2f} times as fast as one, so that {summary['undivided_share']:.1%} stays undivided")
    whose = "as measured here" if args.rate is None else "as you say"
    say(f"{BANK:,} payments, of which one answers {rate:,.1f} a second ({whose}); projected, not measured:")
    for n, seconds in summary["projected_seconds"].items():
        say(f"  {n}: {duration(seconds)}")


def undivided(speedup: float) -> float:
    """The share of the time that two processes do not halve (Amdahl)."""
    return min(1.0, max(0.0, 2 / speedup - 1))


def projected(number: int, rate: float, speedup: float) -> float:
    chunks = -(-BANK // predict.CHUNK)
    share = -(-chunks // number) / chunks
    stays = undivided(speedup)
    return BANK / rate * (stays + (1 - stays) * share)


def trained(folder: Path) -> Path:
    run = folder / "run"
    flags = ("train", "--size", "tiny", "--backend", "peft", "--max-steps", "60", "--run", str(run))
    done = subprocess.run([sys.executable, "-m", f"recipes.{RECIPE.name}", *flags], capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"bench scaling: the training failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
        )
    return run


def one(number: int, run: Path, source: Path, target: Path) -> dict[str, float]:
    target.unlink(missing_ok=True)
    launcher = (
        ["torch.distributed.run", "--standalone", "--nproc_per_node", str(number), "-m", "--"] if number > 1 else []
    )
    command = [sys.executable, "-m", *launcher, "bench", "scaling", "--worker", *map(str, (run, source, target))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise UserError(f"bench scaling: {number} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def worker(path: Path, source: Path, target: Path) -> None:
    """predict --file, timed from where its model is loaded."""
    began = time.perf_counter()
    run, chosen, choice, max_length = loading.open_run(RECIPE, path)
    with held_back(run.logs / "libraries.log"):
        model = loading.load_to_answer(RECIPE, run, chosen, choice, max_length)
        names, answer = predict.answerer(RECIPE, run, model, Scoring(), max_length)
        # All are there before the clock starts.
        processes.gathered(None)
        loaded = time.perf_counter()
        predict.to_file(
            source, target, RECIPE.text_column, names, answer, predict.made_with(run, Scoring(), choice.dtype)
        )
        seconds = time.perf_counter() - loaded
    say(json.dumps({"seconds": seconds, "loading_seconds": loaded - began}))
