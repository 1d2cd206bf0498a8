"""Disks that are full, folders that may not be written to or that go away: one line, and nothing half written."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from recipes.stages import checkpoint
from recipes.stages.run import Run, as_system_error

CIVIL, OPERCODE = "recipes.llama_1b_civil", "recipes.gemma3_12b_opercode"
FEW = ("train", "--backend", "peft", "--max-steps", "4", "--checkpoint-minutes", "0", "--early-stopping", "off")


def on_a_disk(folder: Path, size: str, script: str, options: str = "") -> subprocess.CompletedProcess[str]:
    """Run a shell script whose folder `disk` is a file system of its own, of this size."""
    (folder / "disk").mkdir(exist_ok=True)
    mount = f"mount -t tmpfs -o size={size} none disk"
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here: unshare -rm does not work")
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"{mount} && {script.replace('python', sys.executable)}"],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0], lines[0]


def test_a_disk_that_is_full_in_the_middle_of_a_training(tmp_path: Path) -> None:
    command = " ".join(("python", "-m", CIVIL, *FEW, "--run", "disk/run"))
    done = on_a_disk(tmp_path, "6m", f"{command}; echo rc $?; cp -r disk/run kept")
    assert "rc 2" in done.stdout, done.stdout
    one_line(done, "No space left on device", "free some space", f"go on with python -m {CIVIL} train --resume")
    # Room for one checkpoint of three MiB, and for half of the next, of which nothing stays.
    found, complaints = checkpoint.newest(Run(tmp_path / "kept"))
    assert (checkpoint.step_of(found), complaints) == (1, [])
    assert [path.name for path in (tmp_path / "kept" / "checkpoints").iterdir()] == ["step-1"]
    assert not (tmp_path / "kept" / "adapter").exists()
    done = subprocess.run(
        [sys.executable, "-m", CIVIL, "train", "--resume", "--run", "kept"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "after step 1" in done.stdout


def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    done = on_a_disk(
        tmp_path, "100k",
        f"echo old > disk/a.csv; python -m {OPERCODE} sample --rows 50000 --out disk/a.csv; "
        "echo rc $?; ls -A disk; cat disk/a.csv",
    )  # fmt: skip
    assert done.stdout == "rc 2\na.csv\nold\n"
    one_line(done, "No space left on device")


ANSWER = """
import sys
from pathlib import Path
from recipes.stages.cli import as_command
from recipes.stages.predict import to_file
from bench.report import deliver
def table(_):
    to_file(Path("in.csv"), Path("disk/out.csv"), "text", ["answer"], lambda texts: [["x" * 99]] * len(texts), {})
def figures(_):
    deliver({"rows": ["x" * 99] * 9999}, Path("disk/out.json"), False)
as_command({"table": table, "figures": figures}[sys.argv[1]], [])
"""


def test_answers_and_measurements_are_the_old_ones_or_the_new_ones(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("text\n" + "".join(f"row {i}\n" for i in range(9_000)))
    (tmp_path / "answer.py").write_text(ANSWER)
    for what, file in (("table", "out.csv"), ("figures", "out.json")):
        done = on_a_disk(
            tmp_path, "200k", f"echo old > disk/{file}; python answer.py {what}; echo rc $?; cat disk/{file}; ls disk"
        )
        left = ["out.csv", "out.csv.part", "out.csv.part.json"] if what == "table" else ["out.json"]
        assert done.stdout.split() == ["rc", "2", "old", *left]
        one_line(done, "No space left on device")


def test_prepare_leaves_a_whole_run_or_none(tmp_path: Path) -> None:
    (tmp_path / "payments.csv").write_text(
        "PaymentComment,OperCode\n" + "".join(f"payment for goods {i},{i % 4}\n" for i in range(20_000))
    )
    done = on_a_disk(
        tmp_path, "200k", f"python -m {OPERCODE} prepare --source payments.csv --run disk/run; echo rc $?; ls -A disk"
    )
    assert done.stdout.endswith("rc 2\n"), done.stdout
    one_line(done, "No space left on device", "free some space")


def test_a_folder_that_may_not_be_written_to(tmp_path: Path) -> None:
    done = on_a_disk(
        tmp_path, "1m",
        f"mount -o remount,ro disk && (python -m {CIVIL} prepare --run disk/run; echo rc $?; "
        f"python -m {OPERCODE} sample --rows 9000 --out disk/a.csv; echo rc $?)",
    )  # fmt: skip
    assert done.stdout.count("rc 2") == 2, done.stdout
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 2, done.stderr
    for line in lines:
        assert "Read-only file system" in line
        assert "choose another folder" in line or "a.csv" in line


def test_a_folder_that_goes_away_under_way(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", CIVIL, *FEW[:3], "--max-steps", "2000", *FEW[5:], "--run", "run"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while checkpoint.newest(Run(tmp_path / "run"))[0] is None and time.monotonic() < deadline:
        time.sleep(0.05)
    (tmp_path / "run").rename(tmp_path / "gone")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert said.startswith("error: run")
    assert "No such file or directory; did somebody delete it?" in said
    assert "Traceback" not in said
    assert checkpoint.newest(Run(tmp_path / "gone"))[0] is not None


def test_what_a_library_hides_is_found() -> None:
    hidden = as_system_error(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert hidden is not None
    assert hidden.strerror == "No space left on device"
    assert as_system_error(RuntimeError("shapes do not match")) is None
    assert as_system_error(OSError("libcudart.so.13: cannot open shared object file")) is None
