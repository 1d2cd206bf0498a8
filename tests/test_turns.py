"""Processes that take turns: one runs, the others stand still, and each is a row whatever becomes of the rest."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.case import Case
from bench.launch import in_turns

WORKER = """
import json, os, sys, threading, time
from pathlib import Path
from bench.turns import Turns

case = json.loads(Path(sys.argv[1]).read_text())
turns, ticks, found = Turns(), [0], []

def tick():
    while True:
        ticks[0] += 1
        time.sleep(0.001)

threading.Thread(target=tick, daemon=True).start()
turns.wait()
for step in range(4):
    began = time.monotonic()
    if step == 2 and case["arm"] == "dies":
        sys.exit("ValueError: no more")
    time.sleep(60 if step == 2 and case["arm"] == "hangs" else 0.2)
    found.append({"began": began, "ended": time.monotonic(), "pid": os.getpid()})
    print(step, os.getpid(), flush=True)
    before = ticks[0]
    turns.wait()
    found[-1]["ticks"] = ticks[0] - before
Path(sys.argv[2]).write_text(json.dumps({"turns": found}))
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "taking_turns.py").write_text(WORKER)
    paths = (str(tmp_path), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    return "taking_turns"


def run(arms: list[str], folder: Path, worker: str, limit: float = 30.0) -> dict[str, dict[str, Any]]:
    cases = [Case("any", arm, "peft", 0, ()) for arm in arms]
    rows = in_turns(cases, folder, limit, lambda _: worker, random.Random(0))
    assert [row["arm"] for row in rows] == arms
    return {row["arm"]: row for row in rows}


def test_one_runs_at_a_time_and_the_others_stand_still(tmp_path: Path, worker: str) -> None:
    rows = run(["a", "b", "c"], tmp_path, worker)
    turns = sorted((turn["began"], turn["ended"], arm) for arm, row in rows.items() for turn in row["turns"])
    assert len(turns) == 12
    assert all(ended <= began for (_, ended, _), (began, _, _) in itertools.pairwise(turns))
    # Everybody takes a step before anybody takes the next.
    assert all({arm for *_, arm in turns[i : i + 3]} == {"a", "b", "c"} for i in range(0, 12, 3))
    # While the two others took 0.4 s, a thread that counts each millisecond did not count.
    assert all(turn["ticks"] < 200 for row in rows.values() for turn in row["turns"])


def test_who_fails_leaves_the_others_to_go_on(tmp_path: Path, worker: str) -> None:
    rows = run(["dies", "a", "hangs"], tmp_path, worker, limit=5.0)
    assert (rows["dies"]["status"], rows["dies"]["reason"]) == ("failed", "ValueError: no more")
    assert (rows["hangs"]["status"], rows["hangs"]["reason"]) == ("timed out", "not done within 5 s")
    assert rows["a"]["status"] == "measured"
    assert len(rows["a"]["turns"]) == 4
    # Of its own time, not of theirs.
    assert rows["a"]["seconds"] < rows["hangs"]["seconds"]
    assert not (tmp_path / "work").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
def test_nobody_outlives_a_parent_that_was_killed(tmp_path: Path, worker: str) -> None:
    code = (
        "import sys, pathlib\nfrom bench.case import Case\nfrom bench.launch import in_turns\n"
        "cases = [Case('any', arm, 'peft', 0, ()) for arm in ('hangs', 'a')]\n"
        f"in_turns(cases, pathlib.Path({str(tmp_path)!r}), 60, lambda _: {worker!r})\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    logs = [tmp_path / "logs" / f"any-{arm}-0.log" for arm in ("hangs", "a")]
    try:
        deadline = time.monotonic() + 60
        while not all(log.is_file() and log.read_text().count("\n") == 2 for log in logs):
            assert time.monotonic() < deadline, [log.read_text() for log in logs if log.is_file()]
            time.sleep(0.05)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    pids = [int(log.read_text().split()[1]) for log in logs]
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    # Nobody may be there to bury it.
    return state != "Z"
