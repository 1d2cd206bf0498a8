"""The comparison: its statistics against cases of known truth, its sweeps through the real command."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, recipe

from bench import report
from bench.case import Grid, arms
from bench.launch import _reason, _tail, finished
from bench.results import changes, differences
from bench.statistics import paired_ratio, same_training
from bench.summary import summarise
from fallback.torch_build import usable_gpu

Command = Callable[..., subprocess.CompletedProcess[str]]
SMALL = ("--recipes", "polyglot_1_3b_ohlora", "--size", "tiny", "--steps", "4", "--warmup", "1")


def alarms(slower: float, pairs: int, tries: int = 300) -> float:
    """Share of simulated comparisons that find a difference, where one arm is slower by so much."""
    generator = np.random.default_rng(1)
    found = 0
    for _ in range(tries):
        centres = generator.normal(0, 0.03, (pairs, 2)) + np.array([np.log1p(slower), 0])
        both = np.median(np.exp(generator.normal(centres[..., None], 0.08, (pairs, 2, 20))), axis=-1)
        found += paired_ratio(both[:, 0].tolist(), both[:, 1].tolist()).differs
    return found / tries


@pytest.mark.parametrize("pairs", [3, 6])
def test_two_equal_arms_are_rarely_told_apart(pairs: int) -> None:
    assert alarms(0.0, pairs) <= 0.03


def test_ten_percent_are_found() -> None:
    assert alarms(0.10, 8) > 0.85


def test_one_pair_says_nothing() -> None:
    ratio = paired_ratio([2.0], [1.0])
    assert ratio.value == pytest.approx(2)
    assert not ratio.differs
    assert "nothing of chance" in report.said(asdict(ratio))
    one = [row for row in rows_of(slower=0.5) if row["repeat"] == 0]
    assert "Infinity" not in json.dumps(summary_of(one))
    assert "x 2.00 as fast, one pair" in report.verdicts(summary_of(one))[0][0]


def test_the_same_training_and_the_step_from_which_it_is_another() -> None:
    steps = [(5.0 / n, 1.0 / n) for n in range(1, 9)]
    assert same_training(steps, steps, "float32") == (True, None, 0)
    other = [(loss * (1.02 if n >= 4 else 1.0001), norm) for n, (loss, norm) in enumerate(steps)]
    same, first, largest = same_training(other, steps, "float32")
    assert (same, first) == (False, 5)
    assert largest == pytest.approx(0.02)
    assert same_training(other, steps, "bfloat16")[0]
    assert same_training(steps[:5], steps, "float32")[:2] == (False, 6)
    broken = [*steps[:3], (float("nan"), 1.0), *steps[4:]]
    assert same_training(broken, broken, "float32")[:2] == (False, 4), "what is not a number is the same as nothing"
    assert not same_training(steps, [(loss, float("inf")) for loss, _ in steps], "float32")[0]
    steep = [(loss, norm * 1.2) for loss, norm in steps]
    assert same_training(steep, steps, "float32")[:2] == (False, 1)


def test_cases_are_mixed_and_pairs_stay_together() -> None:
    recipes = [recipe(name) for name in ("llama_1b_civil", "gemma3_1b_counsel", "gemma2_2b_ohlora")]
    flags = {(r.name, arm): ("--size", "tiny") for r in recipes for arm in ("peft", "peft #2")}
    grid = Grid(recipes, ("peft", "peft"), 4, flags)
    assert arms(grid.backends) == {"peft": "peft", "peft #2": "peft"}
    cases = grid.cases(seed=3)
    assert grid.cases(seed=3) == cases
    assert grid.cases(seed=4) != cases
    assert len({case.key for case in cases}) == len(cases) == 24
    for one, other in zip(cases[::2], cases[1::2], strict=True):
        assert (one.recipe, one.repeat) == (other.recipe, other.repeat)
        assert {one.arm, other.arm} == {"peft", "peft #2"}
    assert {case.arm for case in cases[::2]} == {"peft", "peft #2"}, "the same arm always goes first"


def rows_of(slower: float = 1.0, loss: float = 1.0, reason: str | None = None) -> list[dict[str, Any]]:
    """Rows as a sweep leaves them, of two arms and three repeats."""
    found = []
    for repeat in range(3):
        for arm, factor, scale in (("peft", 1.0, 1.0), ("unsloth", slower, loss)):
            seconds = 0.1 * factor * (1 + 0.01 * repeat)
            train = {
                "step_seconds_median": seconds, "tokens_per_second": 100 / seconds, "throttled": None,
                "peak_resident_bytes": 2**30,
                "tensor_bytes": {"base weights": 2**28, "LoRA": 2**20, "gradients": 2**20, "optimiser": 2**21},
                "steps": [
                    {"seconds": seconds, "loss": 3.0 * scale - n / 10, "grad_norm": 1.0, "batch": f"b{n}"}
                    for n in range(5)
                ],
            }  # fmt: skip
            found.append(
                {
                    "recipe": "some", "arm": arm, "backend": arm, "repeat": repeat, "status": "measured",
                    "model": "m", "size": "tiny", "notice": "NOT m itself", "settings": {"lora_rank": 8},
                    "choice": {"backend": arm, "dtype": "float32", "attention": "sdpa", "reasons": {}}
                    | {"quantization": "none", "optimizer": "adamw_torch", "triton": False},
                    "proof": {"patched": {}}, "train": train,
                }
            )  # fmt: skip
    if reason:
        found.append(
            {"recipe": "some", "arm": "peft+liger", "backend": "peft+liger", "repeat": 0, "status": "skipped"}
            | {"reason": reason}
        )
    return found


ENVIRONMENT = {
    "time": "now", "python": "3.11", "system": "Linux", "processor": "some", "cores": 2, "memory_bytes": 2**33,
    "gpu": None, "versions": {"torch": "2.13"}, "git_commit": "abc", "git_changed_files": 0,
}  # fmt: skip


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    settings = {"native": False, "case": "grid", "backends": "unsloth,peft+liger,peft"}
    return summarise(rows, {"command": "python -m bench compare", "seed": 1, "settings": settings}, ENVIRONMENT)


def test_a_report_says_what_arms_took_turns_by() -> None:
    assert "were measured one after the other" in report.as_markdown(summary_of(rows_of()))
    assert "took turns step by step" in report.as_markdown({**summary_of(rows_of()), "by_step": True})


def test_the_verdicts() -> None:
    ((told, warning),) = report.verdicts(summary_of(rows_of()))
    assert "no difference shown" in told
    assert "same training" in told
    assert not warning
    ((told, warning),) = report.verdicts(summary_of(rows_of(slower=0.5)))
    assert "unsloth trains x 2.00 [2.00, 2.00] as fast" in told
    assert not warning
    # Twice as fast at another training is a warning, not a success.
    ((told, warning),) = report.verdicts(summary_of(rows_of(slower=0.5, loss=1.1)))
    assert "differs from step 1" in told
    assert warning


def test_other_batches_are_another_training() -> None:
    rows = rows_of()
    rows[1]["train"]["steps"][2]["batch"] = "another"
    ((told, _),) = report.verdicts(summary_of(rows))
    assert "the batches are not the same" in told


def test_what_is_not_alike_stands_beside_the_ratio() -> None:
    rows = rows_of()
    for row in rows[1::2]:
        row["choice"]["quantization"] = "4bit"
        row["settings"] = {"lora_rank": 64}
    (found,) = summary_of(rows)["recipes"]
    assert found["comparisons"][0]["unlike"] == ["quantization: 4bit / none", "lora_rank: 64 / 8"]
    assert "quantization: 4bit / none" in report.as_markdown(summary_of(rows))


def test_a_skipped_arm_is_no_number() -> None:
    summary = summary_of(rows_of(reason="its kernels need a GPU"))
    assert [(arm["arm"], arm["measured"]) for arm in summary["recipes"][0]["arms"]] == [
        ("unsloth", 3), ("peft+liger", 0), ("peft", 3),
    ]  # fmt: skip
    assert summary["recipes"][0]["baseline"] == "peft"
    assert ("some, peft+liger: skipped: its kernels need a GPU", True) in report.verdicts(summary)
    assert "peft+liger" not in report.header_of(summary["recipes"][0])


@pytest.mark.parametrize(
    ("status", "tail", "expected"),
    [
        (None, [], "timed out"),
        (-signal.SIGKILL, ["step 3"], "out of memory"),
        (1, ["Traceback", "torch.OutOfMemoryError: CUDA out of memory."], "out of memory"),
        (2, ["error: out of memory at batch 4 x 1, length 512: take --preset 12gb"], "out of memory"),
        (1, ["RuntimeError: something else"], "failed"),
        (-11, ["step 3"], "failed"),
    ],
)
def test_what_becomes_of_a_case_that_fails(status: int | None, tail: list[str], expected: str) -> None:
    found = _reason(status, tail, 60)
    assert found["status"] == expected
    assert found["reason"]
    if status == -11:
        assert "SIGSEGV" in found["reason"]


def test_what_a_finalizer_says_last_is_not_the_reason(tmp_path: Path) -> None:
    """As a process says it on its way out, after what it died of."""
    log = tmp_path / "case.log"
    log.write_text(
        "Traceback (most recent call last):\n"
        '  File "worker.py", line 9, in main\n'
        "RuntimeError: the shapes do not fit\n"
        "Exception ignored in: <function BaseFileLock.__del__ at 0x7f>\n"
        "Traceback (most recent call last):\n"
        '  File "filelock/_api.py", line 975, in __del__\n'
        "AttributeError: 'NoneType' object has no attribute 'getpid'\n",
        encoding="utf-8",
    )
    assert _reason(1, _tail(log), 60) == {"status": "failed", "reason": "RuntimeError: the shapes do not fit"}
    log.write_text("Exception ignored in: <generator object>\nRuntimeError: of its own\n", encoding="utf-8")
    assert _tail(log) == ["RuntimeError: of its own"], "without a traceback nobody can tell whose it is"


def test_a_regression_is_told_from_chance_and_from_another_machine() -> None:
    before, after = rows_of(), rows_of(slower=1.5)
    lines = {(line["arm"], line["name"]): line for line in differences(before, after, 0.05)}
    assert lines["unsloth", "step_seconds_median"]["regression"]
    assert not lines["peft", "step_seconds_median"]["regression"]
    assert not any(line["regression"] for line in differences(after, before, 0.05)), "faster is no regression"
    larger = [{**row, "flags": ["--size", "small"]} for row in after]
    assert differences(before, larger, 0.05) == [], "another size is another measurement"
    other = {**ENVIRONMENT, "cores": 8, "versions": {"torch": "2.14"}, "git_commit": "def"}
    assert changes(ENVIRONMENT, other) == {
        "machine": ["cores 2 -> 8"], "versions": ["torch 2.13 -> 2.14"], "code": ["abc -> def"],
    }  # fmt: skip
    assert changes(ENVIRONMENT, ENVIRONMENT) == {"machine": [], "versions": [], "code": []}


def test_a_sweep(command: Command, tmp_path: Path) -> None:
    done = command("bench", "compare", *SMALL, "--backends", "peft+liger,peft,peft", "--repeats", "2", "--out", "found")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(finished(tmp_path / "found").values())
    measured = [row for row in rows if row["status"] == "measured"]
    assert {row["arm"] for row in measured} == {"peft", "peft #2"}
    assert len(measured) == 4
    for row in rows:
        if row["arm"] == "peft+liger":
            assert row["status"] == "skipped"
            assert "GPU" in row["reason"] or "kernels" in row["reason"]
    for row in measured:
        assert row["proof"]["in_the_process"] == []
        train, generate = row["train"], row["generate"]
        assert len(train["steps"]) == 4
        assert train["tokens_per_second"] < train["padded_tokens_per_second"] + 1e-9
        assert train["supervised_tokens_per_second"] < train["tokens_per_second"]
        assert 0 < train["mfu"] < 1
        assert len(generate["decode_tokens_per_second"]) == 3
    for repeat in (0, 1):
        ends = [(s["ended"], row["arm"]) for row in measured if row["repeat"] == repeat for s in row["train"]["steps"]]
        arms_in_time = [arm for _, arm in sorted(ends)]
        if usable_gpu() is None:
            assert all(len(set(arms_in_time[i : i + 2])) == 2 for i in range(0, 8, 2)), "a step each, in turns"
    (found,) = json.loads((tmp_path / "found" / "summary.json").read_text())["recipes"]
    (comparison,) = found["comparisons"]
    assert comparison["pairs"] == 2
    assert comparison["same_training"] == {
        "same": True, "batches_identical": True, "from_step": None, "largest_difference": 0.0,
    }  # fmt: skip
    assert "skipped" in done.stdout
    assert not (tmp_path / "found" / "work").exists(), "adapters of measurements are left"
    # Shown again, and compared with itself.
    (tmp_path / "found" / "report.html").unlink()
    again = command("bench", "report", "found", "--json")
    assert json.loads(again.stdout)["recipes"] == [found]
    assert (tmp_path / "found" / "report.html").is_file()
    assert command("bench", "diff", "found", "found").returncode == 0
    assert command("bench", "list", ".").stdout.startswith("found  4 measured, 2 not")


def test_a_slow_down_of_one_arm_is_found(command: Command) -> None:
    """Ten times as slow, so that no noise of a test machine hides it; the fine limit is for bench trust to measure."""
    done = command("bench", "trust", "--runs", "1", "--repeats", "4", "--steps", "9", "--planted", "9", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["found"] == 1
    ((equal,), (planted,)) = found["comparisons"].values()
    assert equal["pairs"] == planted["pairs"] == 4
    assert planted["value"] > 3 > equal["value"]


def test_what_the_trainer_costs_beside_the_bare_step(command: Command) -> None:
    done = command("bench", "overhead", "--recipe", "gemma3_12b_opercode", "--size", "tiny", "--steps", "7", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["step_seconds"]) == len(found["bare_step_seconds"]) == 3
    assert found["ratio"] > 0


def test_a_case_that_takes_too_long_is_a_row(command: Command, tmp_path: Path) -> None:
    done = command("bench", "compare", *SMALL, "--backends", "peft", "--repeats", "1", "--limit", "1", "--out", "found")
    assert done.returncode == 0, done.stderr
    assert "timed out: not done within 1 s" in done.stdout
    (row,) = finished(tmp_path / "found").values()
    assert row["status"] == "timed out"


def test_an_interrupted_sweep_is_finished(tmp_path: Path) -> None:
    started = subprocess.Popen(
        [
            sys.executable, "-m", "bench", "compare", *SMALL, "--backends", "peft", "--repeats", "3", "--phases",
            "train", "--out", "found",
        ],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # A shell that runs the tests in the background has everything in them ignore Ctrl-C.
        text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not finished(tmp_path / "found") and time.monotonic() < deadline:
        time.sleep(0.2)
    started.send_signal(signal.SIGINT)
    _, told = started.communicate(timeout=60)
    assert started.returncode == 130
    assert "--resume found" in told
    kept = finished(tmp_path / "found")
    assert 1 <= len(kept) < 3
    # The power may also go in the middle of a line.
    with (tmp_path / "found" / "measurements.jsonl").open("a") as file:
        file.write('{"recipe": "polyglot')
    # On another machine its rows would be no pairs.
    there = tmp_path / "found" / "environment.json"
    here = there.read_text()
    there.write_text(here.replace('"cores": ', '"cores": 9'))
    resume = [sys.executable, "-m", "bench", "compare", "--resume", "found"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    refused = subprocess.run(resume, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "begun under other conditions (cores 9" in refused.stderr
    there.write_text(here)
    again = subprocess.run(
        resume,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    rows = finished(tmp_path / "found")
    assert len(rows) == 3
    assert all(rows[key] == row for key, row in kept.items()), "what was there was measured again"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--backends", "unsloth,magic"), "--backends 'magic': unknown; there are unsloth, peft+liger, peft"),
        (("--recipes", "nothing"), "--recipes 'nothing': unknown"),
        (("--phases", ""), "--phases: name at least one of train, generate"),
        (("--repeats", "0"), "--repeats 0: every case is run at least once"),
        (("--steps", "4"), "--steps 4: the first and 3 more are not counted"),
        (("--resume", "nowhere"), "--resume nowhere: no sweep was begun there"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    command: Command, tmp_path: Path, given: tuple[str, ...], message: str
) -> None:
    done = command("bench", "compare", *given)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir()), "a folder is left that would pass for a sweep"


def test_a_sweep_is_not_overwritten(command: Command, tmp_path: Path) -> None:
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "plan.json").write_text("{}")
    done = command("bench", "compare", "--out", "found")
    assert done.returncode == 2
    assert "--resume found" in done.stderr


def test_the_arm_without_unsloth_refuses_to_run_beside_it() -> None:
    """In a process that imported Unsloth there is no baseline any more."""
    code = (
        "import sys, types; sys.modules['unsloth'] = types.ModuleType('unsloth')\n"
        "from bench.worker import proof\n"
        "try: proof('peft', {})\n"
        "except RuntimeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "this is the arm without Unsloth, and in its process there is unsloth" in done.stdout


def test_each_backend_at_its_own_defaults_is_said_to_be_so() -> None:
    from bench.compare import Compare, flags

    like = {flags(Compare(), "tiny", backend)[4:] for backend in ("unsloth", "peft")}
    assert len(like) == 1
    native = [flags(replace(Compare(), native=True), "tiny", backend) for backend in ("unsloth", "peft")]
    assert "--no-checkpointing" in native[1]
    assert native[0][-3:] == ("--quantization", "4bit", "--checkpointing")
    summary = {**summary_of(rows_of()), "native": True}
    assert "NOT like with like" in report.as_markdown(summary)
