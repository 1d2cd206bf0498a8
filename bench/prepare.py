"""Preparing a bank's export against writing the same bytes: time, ratio and memory; and reading its tokens, before a
first training and before a later one.

Every repetition is a process of its own; the kinds take turns. Timed is the work itself, without the
interpreter's start. The baselines have all lines in memory and write them with one write() each: as text, which is
what open() gives, and as bytes. What a single write() of each whole file takes is told beside them, and is what the
disk and the page cache can do at best.
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

from bench.launch import make_ready
from bench.report import deliver
from recipes.gemma3_12b_opercode import RECIPE
from recipes.samples.payments import write_csv
from recipes.stages.base_model import load_tokenizer, settle
from recipes.stages.console import say
from recipes.stages.recipe import UserError
from recipes.stages.run import Run, environment

WRITERS = {
    "write_text": "write(), a line of text",
    "write_lines": "write(), a line of bytes",
    "write_files": "write(), a whole file",
}
"""What the preparation is held against."""
READERS = {"tokens": "a first training's tokens", "tokens_again": "a later training's tokens"}
"""What a training waits for between its data and its first batch."""
MEMORY = ("prepare", *READERS)


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
        make_ready(RECIPE.name, "tiny", "random")
        kinds = ("prepare", *WRITERS, *READERS)
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
        **{f"{kind}_seconds": median(seconds[kind]) for kind in WRITERS},
        **{f"ratio_to_{kind}": median(_ratios(seconds["prepare"], seconds[kind])) for kind in WRITERS},
        **{f"{kind}_seconds": median(seconds[kind]) for kind in READERS},
        **{f"{kind}_peak_resident_bytes": max(int(run["resident"]) for run in found[kind]) for kind in MEMORY},
        "seconds": seconds,
    }
    if deliver(summary, args.out, args.json):
        return
    say(f"{args.rows:,} rows, {source_bytes / 1e6:.1f} MB in, {summary['output_bytes'] / 1e6:.1f} MB out")
    say(f"  prepare                   {summary['prepare_seconds']:.3f} s")
    for kind, what in WRITERS.items():
        say(f"  {what:<25} {summary[f'{kind}_seconds']:.3f} s   ratio {summary[f'ratio_to_{kind}']:.2f}")
    for kind, what in READERS.items():
        say(f"  {what:<25} {summary[f'{kind}_seconds']:.3f} s")
    for kind in MEMORY:
        say(f"  {f'peak memory, {kind}':<25} {summary[f'{kind}_peak_resident_bytes'] / 1e6:.0f} MB")
    say(f"medians of {args.repeats}; ratios are medians of the pairs' ratios")


def _ratios(ours: list[float], theirs: list[float]) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def one(kind: str, source: Path, run: Path) -> dict[str, float]:
    """The writers write what the preparation before them has left, and the readers read it."""
    if kind == "prepare":
        shutil.rmtree(run, ignore_errors=True)
    if kind == "tokens":
        shutil.rmtree(run / "kept", ignore_errors=True)
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
    elif kind in READERS:
        # A training has loaded it by then, and with it what pyarrow looks for.
        import datasets  # noqa: F401

        from recipes.stages import tokens, train
        from recipes.stages.render import Renderer

        # This project's own, which needs no download.
        tokenizer = load_tokenizer(RECIPE, settle(RECIPE, "tiny", "random").source)
        tokens.CACHE = Path(run) / "kept"
        began = time.perf_counter()
        items = train.examples(RECIPE, Run(Path(run)), "train")
        read = tokens.tokens_of(Renderer(tokenizer, RECIPE.stop_phrase), items, RECIPE.settings.max_length, kind)
        assert len(read.items) == read.table.num_rows > 0
        assert len(list(tokens.CACHE.iterdir())) == 1, "a later training did not find what an earlier one had left"
    else:
        files = [path for path in (Path(run) / "data").iterdir() if path.suffix in (".csv", ".jsonl")]
        parts = [(path.name, pieces(path, kind)) for path in files]
        target = Path(run) / "written"
        target.mkdir(exist_ok=True)
        text: dict[str, Any] = {"mode": "w", "encoding": "utf-8", "newline": ""}
        how: dict[str, Any] = text if kind == "write_text" else {"mode": "wb"}
        began = time.perf_counter()
        for name, lines in parts:
            with (target / name).open(**how) as file:
                for line in lines:
                    file.write(line)
    seconds = time.perf_counter() - began
    written = sum(os.path.getsize(p) for p in (Path(run) / "data").iterdir() if p.suffix in (".csv", ".jsonl"))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "bytes": written, "resident": resident}))


def pieces(path: Path, kind: str) -> list[Any]:
    """What goes into one write()."""
    if kind == "write_files":
        return [path.read_bytes()]
    lines = path.read_bytes().splitlines(keepends=True)
    return [line.decode("utf-8") for line in lines] if kind == "write_text" else lines
