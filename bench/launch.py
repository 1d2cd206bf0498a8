"""The parent: one interpreter for every case, one after the other or in turns; whatever becomes of it is a row."""

import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import psutil

from bench.case import Case
from bench.turns import CHANNEL
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
    by_step: bool,
    order: random.Random,
) -> Iterator[dict[str, Any]]:
    """Measure what is not there yet, a line of measurements.jsonl each. `skipped`: (recipe, arm) -> why it cannot be
    measured here."""
    there = finished(folder)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    for _, arms in itertools.groupby(cases, lambda case: (case.recipe, case.repeat)):
        group = list(arms)
        able = [case for case in group if (case.recipe, case.arm) not in skipped]
        # What could not be measured may be measurable by now.
        missing = [case for case in able if there.get(case.key, {}).get("status") != "measured"]
        if missing and by_step:
            # Arms that did not take turns with each other are no pair.
            missing = able
        for case in group:
            if case not in missing:
                why = skipped.get((case.recipe, case.arm))
                row = keep(folder, {**_key(case), "status": "skipped", "reason": why}) if why else there[case.key]
                told(case, row)
                yield row
        for case, row in zip(missing, rows_of(missing, folder, limit_seconds, by_step, order=order), strict=True):
            told(case, keep(folder, row))
            yield row


def keep(folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    with (folder / "measurements.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return row


def _key(case: Case) -> dict[str, Any]:
    return {"recipe": case.recipe, "arm": case.arm, "backend": case.backend, "repeat": case.repeat}


TurnBy = Literal["auto", "step", "training"]
"""What arms take turns by: a step, for which all of them are in memory at once, or all that there is to measure."""
_AN_ARM = 2.5 * 2**30
"""Bytes for the training of a small model: 1.1 to 1.9 GiB with its libraries in results/, and a compiler's."""


def are_by_step(by: TurnBy, gpu: bool, sizes: Collection[str], arms: int) -> bool:
    """auto: where there is room for all arms. A GPU's memory may hold one model only, and its speed does not change by
    the second."""
    if by != "auto" or gpu or "full" in sizes:
        return by == "step"
    if arms * _AN_ARM <= psutil.virtual_memory().available:
        return True
    print(f"no memory for {arms} arms at once: they are measured one after the other", file=sys.stderr, flush=True)
    return False


def rows_of(
    cases: Sequence[Case],
    folder: Path,
    limit_seconds: float,
    by_step: bool,
    worker: Callable[[Case], str] = lambda _: "bench.worker",
    order: random.Random | None = None,
) -> Iterator[dict[str, Any]]:
    """A row of each case, whatever becomes of it."""
    if by_step:
        yield from in_turns(cases, folder, limit_seconds, worker, order)
    else:
        for case in cases:
            yield one(case, folder, limit_seconds, worker(case))


def one(case: Case, folder: Path, limit_seconds: float, worker: str = "bench.worker") -> dict[str, Any]:
    """Run one case to its end, its time limit or its failure."""
    return in_turns([case], folder, limit_seconds, lambda _: worker)[0]


def in_turns(
    cases: Sequence[Case],
    folder: Path,
    limit_seconds: float,
    worker: Callable[[Case], str],
    order: random.Random | None = None,
) -> list[dict[str, Any]]:
    """Run cases that are in memory at once and of which one runs at a time, from where it calls Turns.wait to where it
    calls it again: so they all see a machine whose speed changes from second to second in the same state. A case that
    fails, or has used up its time, leaves the others to go on."""
    children = [_Child(case, folder, limit_seconds) for case in cases]
    with ExitStack() as ends:
        for child in children:
            ends.callback(child.end)
            child.start(worker(child.case), alone=len(cases) == 1)
            child.turn()
        while going := [child for child in children if not child.ended]:
            if order:
                order.shuffle(going)
            for child in going:
                child.turn()
    return [child.row() for child in children]


class _Child:
    """A case in an interpreter of its own."""

    def __init__(self, case: Case, folder: Path, limit_seconds: float) -> None:
        self.case, self.limit = case, limit_seconds
        self.work = folder / "work" / case.name
        self.log = folder / "logs" / f"{case.name}.log"
        self.seconds = 0.0
        self.waits = self.ended = False
        self.status: int | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, worker: str, alone: bool) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        write_json(self.work / "case.json", asdict(self.case))
        self.log.parent.mkdir(parents=True, exist_ok=True)
        files = [str((self.work / name).resolve()) for name in ("case.json", "out.json", "run")]
        self.channel, theirs = socket.socketpair()
        with theirs, self.log.open("w", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", worker, *files],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ if alone else {**os.environ, CHANNEL: str(theirs.fileno())},
                pass_fds=() if alone else (theirs.fileno(),),
                # A group of its own: whatever it starts stops with it and ends with it.
                start_new_session=True,
            )

    def turn(self) -> None:
        """Let it run until it waits, ends, or has used up its time. Then it stands still, or is gone."""
        assert self.process is not None
        began = time.perf_counter()
        if self.waits:
            self.waits = False
            # It may have died meanwhile, as where memory is short.
            with suppress(OSError):
                os.killpg(self.process.pid, signal.SIGCONT)
                self.channel.sendall(b".")
        while not self.waits and self.process.poll() is None:
            left = self.limit - self.seconds - (time.perf_counter() - began)
            if left <= 0:
                break
            # Processes that it has started may hold its end of the channel open beyond its own end.
            if select.select([self.channel], [], [], min(left, 0.5))[0]:
                with suppress(OSError):
                    self.waits = bool(self.channel.recv(1))
                if not self.waits:
                    with suppress(subprocess.TimeoutExpired):
                        self.process.wait(left)
        self.seconds += time.perf_counter() - began
        if self.waits:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGSTOP)
        else:
            self.end()

    def end(self) -> None:
        if self.process is None or self.ended:
            return
        self.ended = True
        self.status = self.process.poll()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.channel.close()

    def row(self) -> dict[str, Any]:
        row: dict[str, Any] = {**_key(self.case), "flags": list(self.case.flags), "seconds": round(self.seconds, 2)}
        if self.status == 0:
            row |= {"status": "measured", **read_json(self.work / "out.json")}
        else:
            libraries = self.work / "run" / "logs" / "libraries.log"
            tail = [line for file in (libraries, self.log) for line in _tail(file)]
            row |= {**_reason(self.status, tail, self.limit), "tail": tail}
        # Adapters of measurements are of no use to anybody.
        shutil.rmtree(self.work, ignore_errors=True)
        with suppress(OSError):
            self.work.parent.rmdir()
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
