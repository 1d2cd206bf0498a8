"""What a soak tells of its cycles, and that an interrupted one goes on. The cycles themselves are `make soak`."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.recipes import NAMES
from bench.soak import BEST, CHECKPOINT, FINAL, LOADING, STEP, VALIDATION, Outcome, drawn, phase, sound, table
from recipes.stages.run import environment, write_json

Command = Callable[..., subprocess.CompletedProcess[str]]
WHOLE = Outcome("", ("",) * 8, (4, 8), ("", ""))
CYCLE = {
    "number": 0, "recipe": NAMES[0], "flags": "", "new_interpreters": False, "same": list(WHOLE.__dict__), "faults": [],
    "stops": [{"by": "SIGKILL", "after_step": 3, "phase": STEP}, {"by": "SIGTERM", "after_step": 5, "phase": None}],
    "seconds": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "validated", "folder", "expected"),
    [(2, 0, None, LOADING), (3, 0, None, STEP), (3, 0, "checkpoints/.step-3", CHECKPOINT), (4, 0, None, VALIDATION),
     (4, 0, ".adapter.making", BEST), (5, 1, None, STEP), (8, 1, None, VALIDATION), (8, 2, ".adapter.making", FINAL),
     (8, 2, None, FINAL)],
)  # fmt: skip
def test_what_a_training_was_doing(
    steps: int, validated: int, folder: str | None, expected: str, tmp_path: Path
) -> None:
    since = time.time() - 1
    (tmp_path / "steps.jsonl").write_text("{}\n" * steps)
    (tmp_path / "validation.jsonl").write_text("{}\n" * validated)
    if folder:
        (tmp_path / folder).mkdir(parents=True)
    assert phase(tmp_path, WHOLE, 2, since) == expected
    if folder:
        # What an earlier process left behind tells nothing of this one.
        assert phase(tmp_path, WHOLE, 2, time.time() + 1) not in {CHECKPOINT, BEST}


def test_a_cycle_is_sound_when_everything_is_the_same() -> None:
    assert sound(CYCLE)
    assert not sound({**CYCLE, "same": ["steps", "validated", "answers"]})
    assert not sound({**CYCLE, "faults": ["evaluate ended with 1"]})
    [row] = [line for line in table([CYCLE]).splitlines() if NAMES[0] in line]
    assert row.split("|")[2:6] == [" 1 ", " 1 ", " 1 ", " 0 "]


def test_settings_follow_from_the_seed() -> None:
    assert drawn(0, NAMES[1], 3) == drawn(0, NAMES[1], 3)
    assert len({tuple(drawn(0, name, setting)) for name in NAMES for setting in range(10)}) == 50


def test_an_interrupted_soak_goes_on(command: Command, tmp_path: Path) -> None:
    before = {"seed": 0, "environment": environment(), "cycles": [CYCLE]}
    write_json(tmp_path / "soak.json", before)
    done = command("bench", "soak", "--cycles", "1", "--out", "soak.json", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["total"] == {"cycles": 1, "sound": 1, "stops": 2, "killed": 1}
    done = command("bench", "soak", "--cycles", "1", "--seed", "1", "--out", "soak.json")
    assert done.returncode == 2
    assert "soak.json: of another seed" in done.stderr
    write_json(tmp_path / "soak.json", {**before, "cycles": [{**CYCLE, "same": []}]})
    assert command("bench", "soak", "--cycles", "1", "--out", "soak.json").returncode == 1
