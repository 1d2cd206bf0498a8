"""Processes that take turns: one runs, the others stand still, and each is a row whatever becomes of the rest."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.case import Case
from bench.launch import are_by_step, finished, in_turns, sweep

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="/proc, and a parent's end that its children are told of")
# Four steps, in each of which it looks at what the others are doing; a process of its own is busy all the time.
WORKER = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from bench.turns import Turns

def state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "gone"

turns, found = Turns(), []
case = json.loads(Path(sys.argv[1]).read_text())
pids = Path(sys.argv[1]).parents[2] / "pids"
pids.mkdir(exist_ok=True)
(pids / case["arm"]).write_text(str(os.getpid()))
# It ends by itself, where a test that fails leaves it behind.
busy = "import os; began = os.getppid()\\nwhile os.getppid() == began: pass"
helper = subprocess.Popen([sys.executable, "-c", busy])
(pids / f"{case['arm']}'s helper").write_text(str(helper.pid))
print("ready", flush=True)
turns.wait()
for step in range(4):
    began = time.monotonic()
    if step == 2 and case["arm"] == "dies":
        sys.exit("ValueError: no more")
    if step == 2 and case["arm"] == "kills":
        os.kill(int((pids / "is killed").read_text()), signal.SIGKILL)
    while step == 2 and case["arm"] == "hangs":
        pass
    time.sleep(0.1)
    others = {p.name: state(p.read_text()) for p in pids.iterdir() if not p.name.startswith(case["arm"])}
    found.append({"began": began, "ended": time.monotonic(), "others": others})
    print(step, flush=True)
    turns.wait()
Path(sys.argv[2]).write_text(json.dumps({"turns": found}))
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "taking_turns.py").write_text(WORKER)
    paths = (str(tmp_path), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    return "taking_turns"


def run(arms: list[str], folder: Path, worker: str, limit: float = 60.0) -> dict[str, dict[str, Any]]:
    cases = [Case("any", arm, "peft", 0, ()) for arm in arms]
    rows = in_turns(cases, folder, limit, lambda _: worker, random.Random(0))
    assert [row["arm"] for row in rows] == arms
    assert not (folder / "work").exists()
    return {row["arm"]: row for row in rows}


def states(row: dict[str, Any]) -> list[dict[str, str]]:
    return [turn["others"] for turn in row["turns"]]


@LINUX
def test_one_runs_at_a_time_and_the_others_stand_still(tmp_path: Path, worker: str) -> None:
    rows = run(["a", "b", "c"], tmp_path, worker)
    turns = sorted((turn["began"], turn["ended"], arm) for arm, row in rows.items() for turn in row["turns"])
    assert len(turns) == 12
    assert all(ended <= began for (_, ended, _), (began, _, _) in itertools.pairwise(turns))
    # Everybody takes a step before anybody takes the next.
    assert all({arm for *_, arm in turns[i : i + 3]} == {"a", "b", "c"} for i in range(0, 12, 3))
    for arm, row in rows.items():
        for seen in states(row):
            assert len(seen) == 4
            assert set(seen.values()) <= {"T", "gone"}, (arm, seen)
        assert set(states(row)[0].values()) == {"T"}


@LINUX
def test_who_fails_leaves_the_others_to_go_on(tmp_path: Path, worker: str) -> None:
    """In its own turn or in another's, or for good in it; and nothing that it has started goes on beside them."""
    rows = run(["dies", "is killed", "hangs", "kills", "a"], tmp_path, worker, limit=10.0)
    told = {arm: (row["status"], row.get("reason")) for arm, row in rows.items()}
    assert told == {
        "dies": ("failed", "ValueError: no more"),
        "is killed": ("out of memory", "killed by the system, most likely for its memory"),
        "hangs": ("timed out", "not done within 10 s"),
        "kills": ("measured", None),
        "a": ("measured", None),
    }
    # Of its own time, not of theirs.
    assert rows["a"]["seconds"] < rows["hangs"]["seconds"]
    for arm in ("a", "kills"):
        last = states(rows[arm])[-1]
        for name, state in last.items():
            # Killed, and at most not yet buried; or stopped, until it is found out that it is dead.
            assert state in ("gone", "Z", "T"), (arm, name)
        assert last["hangs"] == "gone"


@LINUX
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nobody_outlives_whoever_measures(tmp_path: Path, worker: str, how: signal.Signals) -> None:
    code = (
        "import pathlib, signal\nfrom bench.case import Case\nfrom bench.launch import in_turns\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "cases = [Case('any', arm, 'peft', 0, ()) for arm in ('hangs', 'a')]\n"
        f"in_turns(cases, pathlib.Path({str(tmp_path)!r}), 60, lambda _: {worker!r})\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    logs = [tmp_path / "logs" / f"any-{arm}-0.log" for arm in ("hangs", "a")]
    deadline = time.monotonic() + 60
    try:
        # One waits stopped while the other hangs.
        while not all(log.is_file() and log.read_text().count("\n") == 3 for log in logs):
            assert time.monotonic() < deadline, [log.read_text() for log in logs if log.is_file()]
            time.sleep(0.05)
    finally:
        parent.send_signal(how)
        parent.wait(30)
    pids = [int((tmp_path / "pids" / arm).read_text()) for arm in ("hangs", "a")]
    helpers = [int((tmp_path / "pids" / f"{arm}'s helper").read_text()) for arm in ("hangs", "a")]
    while left := [pid for pid in pids + (helpers if how == signal.SIGINT else []) if alive(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    for pid in filter(alive, helpers):
        # Who is killed, or told to end at once, cannot end what its children had started.
        os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_without_room_for_all_they_run_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=8 * 2**30))
    assert are_by_step("auto", gpu=False, sizes=["tiny", "small"], arms=3)
    assert not are_by_step("auto", gpu=False, sizes=["tiny", "full"], arms=1)
    assert not are_by_step("auto", gpu=True, sizes=["tiny"], arms=1)
    assert not capsys.readouterr().err
    assert not are_by_step("auto", gpu=False, sizes=["small"], arms=4)
    assert "no memory for 4 arms at once" in capsys.readouterr().err
    assert are_by_step("step", gpu=True, sizes=["full"], arms=4)
    assert not are_by_step("training", gpu=False, sizes=["tiny"], arms=1)


@pytest.mark.parametrize("by_step", [True, False])
def test_arms_that_did_not_take_turns_with_each_other_are_no_pair(tmp_path: Path, by_step: bool) -> None:
    """What is there of a pair is measured again with what is missing, where arms take turns by step."""
    cases = [Case("no_such_recipe", arm, "peft", repeat, ()) for repeat in (0, 1) for arm in ("a", "b")]
    kept = {"recipe": "no_such_recipe", "backend": "peft", "status": "measured", "kept": True}
    there = [("a", 0), ("b", 0), ("a", 1)]
    lines = [f'{{"arm": "{arm}", "repeat": {repeat}, {str(kept)[1:]}' for arm, repeat in there]
    text = "\n".join(lines).replace("'", '"').replace("True", "true") + "\n"
    (tmp_path / "measurements.jsonl").write_text(text)
    list(sweep(cases, tmp_path, 60, {}, lambda case, row: None, by_step, random.Random(0)))
    again = {key[1:] for key, row in finished(tmp_path).items() if "kept" not in row}
    assert again == ({("a", 1), ("b", 1)} if by_step else {("b", 1)})
