"""The parent: one interpreter for every case, one after the other; whatever becomes of it is a row."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.case import Case
from recipes.stages.console import private
from recipes.stages.recipe import UserError
from recipes.stages.run import BrokenFile, read_json, read_jsonl, write_json, write_whole

TAIL = 15
"""Lines of a failed case's log that its row keeps."""
_CONTROL = re.compile(r"\x1b\[[0-9;]*m")
# What Python says of an error in a finalizer, last of all where a process ends: it is not what the process died of.
_IGNORED = re.compile(r"^Exception ignored\b.*\n(?:Traceback .*\n(?:[ \t].*\n)*(?:[\w.]+(?::.*)?\n?)?)?", re.M)


def finished(folder: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The rows that are there already. The last line may be half of one, where the power went."""
    rows: dict[tuple[str, str, int], dict[str, Any]] = {}
    file = folder / "measurements.jsonl"
    if file.is_file():
        try:
            for row in read_jsonl(file):
                rows[row["recipe"], row["arm"], row["repeat"]] = row
        except BrokenFile:
            write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()))
    return rows


def sweep(
    cases: Sequence[Case],
    folder: Path,
    limit_seconds: float,
    skipped: dict[tuple[str, str], str],
    told: Callable[[Case, dict[str, Any]], None],
) -> Iterator[dict[str, Any]]:
    """Measure what is not there yet, a line of measurements.jsonl each. `skipped`: (recipe, arm) -> why it cannot be
    measured here."""
    there = finished(folder)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    for case in cases:
        row = there.get(case.key)
        # What could not be measured may be measurable by now.
        if row is None or row["status"] != "measured":
            why = skipped.get((case.recipe, case.arm))
            if why:
                row = {**_key(case), "status": "skipped", "reason": why}
            else:
                row = one(case, folder, limit_seconds)
            with (folder / "measurements.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        told(case, row)
        yield row


def _key(case: Case) -> dict[str, Any]:
    return {"recipe": case.recipe, "arm": case.arm, "backend": case.backend, "repeat": case.repeat}


def one(case: Case, folder: Path, limit_seconds: float, worker: str = "bench.worker") -> dict[str, Any]:
    """Run one case to its end, its time limit or its failure."""
    work = folder / "work" / case.name
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_json(work / "case.json", asdict(case))
    log = folder / "logs" / f"{case.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    files = [str((work / name).resolve()) for name in ("case.json", "out.json", "run")]
    command = [sys.executable, "-m", worker, *files]
    began = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        # A group of its own: whatever it starts ends with it.
        child = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            status = child.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    row: dict[str, Any] = {**_key(case), "flags": list(case.flags), "seconds": round(time.perf_counter() - began, 2)}
    if status == 0:
        row |= {"status": "measured", **read_json(work / "out.json")}
    else:
        libraries = work / "run" / "logs" / "libraries.log"
        tail = [line for file in (libraries, log) for line in _tail(file)]
        row |= {**_reason(status, tail, limit_seconds), "tail": tail}
    # Adapters of measurements are of no use to anybody.
    shutil.rmtree(work, ignore_errors=True)
    with suppress(OSError):
        work.parent.rmdir()
    return row


def _tail(log: Path) -> list[str]:
    if not log.is_file():
        return []
    text = _IGNORED.sub("", _CONTROL.sub("", log.read_text(encoding="utf-8", errors="replace")))
    return private(text).strip().splitlines()[-TAIL:]


def make_ready(recipe: str, size: str, weights: str) -> None:
    """Make a random model's files in a process of its own, before anything is measured."""
    command = [sys.executable, "-m", "bench.worker", "--ready", recipe, size, weights]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{recipe}, size {size}: its model could not be made: {(done.stderr.splitlines() or [''])[-1]}")


def _reason(status: int | None, tail: list[str], limit_seconds: float) -> dict[str, str]:
    if status is None:
        return {"status": "timed out", "reason": f"not done within {limit_seconds:.0f} s"}
    last = tail[-1] if tail else f"exit status {status}"
    if status == -signal.SIGKILL:
        return {"status": "out of memory", "reason": "killed by the system, most likely for its memory"}
    if status < 0 and status != -signal.SIGKILL:
        return {"status": "failed", "reason": f"killed by {signal.Signals(-status).name}; its last words: {last}"}
    if any("OutOfMemoryError" in line or "out of memory" in line.lower() for line in tail):
        return {"status": "out of memory", "reason": last}
    return {"status": "failed", "reason": last}
