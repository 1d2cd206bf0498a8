"""Preparing a bank's export against writing the same bytes: time, ratio and memory.

Every repetition is a process of its own; the two kinds take turns. Timed is the work itself, without the
interpreter's start. The baseline has all lines in memory and writes them with one write() each; what a single
write() of each whole file takes is told beside it, and is what the disk and the page cache can do at best.
"""

import json
import os
import resource
import shlex
import shutil
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
from recipes.stages.console import say
from recipes.stages.recipe import UserError
from recipes.stages.run import environment


@dataclass(frozen=True)
class Prepare:
    """Measure prepare on a synthetic file of the true shape."""

    rows: int = 388_706
    """Payments in the file."""
    classes: int = 86
    """Codes among them."""
    repeats: int = 5
    """Repetitions of each kind."""
    out: Path | None = None
    """Also write the figures to this JSON file."""
    json: bool = False
    """Print the figures as JSON."""


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--worker"]:
        worker(*arguments[1:])
        return
    args = tyro.cli(Prepare, prog="python -m bench prepare", args=arguments)
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as folder:
        source = Path(folder) / "payments.csv"
        write_csv(source, args.rows, args.classes)
        kinds = ("prepare", "write_lines", "write_files")
        found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
        for _ in range(args.repeats):
            for kind in kinds:
                found[kind].append(one(kind, source, Path(folder) / "run"))
        source_bytes = source.stat().st_size
    seconds = {kind: [run["seconds"] for run in runs] for kind, runs in found.items()}
    summary: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "bench", "prepare", *arguments]),
        "environment": environment(),
        "rows": args.rows,
        "classes": args.classes,
        "source_bytes": source_bytes,
        "output_bytes": found["prepare"][0]["bytes"],
        "prepare_seconds": median(seconds["prepare"]),
        "write_lines_seconds": median(seconds["write_lines"]),
        "write_files_seconds": median(seconds["write_files"]),
        "ratio_to_writing_lines": median(_ratios(seconds["prepare"], seconds["write_lines"])),
        "ratio_to_writing_files": median(_ratios(seconds["prepare"], seconds["write_files"])),
        "prepare_peak_resident_bytes": max(int(run["resident"]) for run in found["prepare"]),
        "seconds": seconds,
    }
    if deliver(summary, args.out, args.json):
        return
    say(f"{args.rows:,} rows, {source_bytes / 1e6:.1f} MB in, {summary['output_bytes'] / 1e6:.1f} MB out")
    say(f"  prepare                   {summary['prepare_seconds']:.3f} s")
    say(f"  write(), a line each      {summary['write_lines_seconds']:.3f} s   ratio {_told(summary, 'lines')}")
    say(f"  write(), a file each      {summary['write_files_seconds']:.3f} s   ratio {_told(summary, 'files')}")
    say(f"  peak resident memory      {summary['prepare_peak_resident_bytes'] / 1e6:.0f} MB")
    say(f"medians of {args.repeats}; ratios are medians of the pairs' ratios")


def _ratios(ours: list[float], theirs: list[float]) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def _told(summary: dict[str, Any], what: str) -> str:
    return f"{summary[f'ratio_to_writing_{what}']:.2f}"


def one(kind: str, source: Path, run: Path) -> dict[str, float]:
    """The writers write what the preparation before them has left."""
    if kind == "prepare":
        shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, "-m", "bench", "prepare", "--worker", kind, str(source), str(run)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"bench prepare: {kind} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def worker(kind: str, source: str, run: str) -> None:
    if kind == "prepare":
        from recipes.stages import labelled  # noqa: F401  (loading is the interpreter's start, not the work)
        from recipes.stages.prepare import prepare

        began = time.perf_counter()
        prepare(RECIPE, Path(source), RECIPE.options, 42, Path(run), RECIPE.settings.max_length, quiet=True)
    else:
        files = [path for path in (Path(run) / "data").iterdir() if path.suffix in (".csv", ".jsonl")]
        contents = [(path.name, path.read_bytes()) for path in files]
        parts = [(name, c.splitlines(keepends=True) if kind == "write_lines" else [c]) for name, c in contents]
        target = Path(run) / "written"
        target.mkdir(exist_ok=True)
        began = time.perf_counter()
        for name, lines in parts:
            with (target / name).open("wb") as file:
                for line in lines:
                    file.write(line)
    seconds = time.perf_counter() - began
    written = sum(os.path.getsize(p) for p in (Path(run) / "data").iterdir() if p.suffix in (".csv", ".jsonl"))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "bytes": written, "resident": resident}))
