"""Trainings that are killed again and again, with settings drawn at random: python -m bench soak --out FILE

A cycle trains once without a break, and once more with signals at random moments, resumed until it is done: both have
to end with the same adapter, to the last bit. Then the killed one is evaluated and asked.
"""

import hashlib
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from bench.recipes import NAMES
from bench.report import deliver, markdown
from recipes.stages.console import say
from recipes.stages.run import environment, write_json

_ROOT = Path(__file__).parents[1]
_MOST_TRIES = 12


@dataclass(frozen=True)
class Soak:
    """Train, kill, resume, evaluate and predict, over and over."""

    cycles: int = 200
    """How often."""
    seed: int = 0
    """Decides settings and moments; a moment still falls where the machine's speed lets it."""
    out: Path | None = None
    """JSON file for the cycles, written after each of them."""
    json: bool = False
    """Print them as JSON."""


def main(arguments: list[str]) -> None:
    args = tyro.cli(Soak, prog="python -m bench soak", args=arguments)
    cycles: list[dict[str, Any]] = []

    def summary() -> dict[str, Any]:
        command = shlex.join(["python", "-m", "bench", "soak", *arguments])
        return {"command": command, "environment": environment(), "cycles": cycles, "total": total(cycles)}

    for number in range(args.cycles):
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            done = cycle(random.Random(f"{args.seed} {number}"), Path(folder))
        cycles.append(done)
        say(f"{number + 1:>4}/{args.cycles}  {told(done)}")
        if args.out:
            write_json(args.out, summary())
    if not deliver(summary(), args.out, args.json):
        say(table(cycles))
    if any(not sound(done) for done in cycles):
        sys.exit(1)


def drawn(chance: random.Random) -> tuple[str, list[str]]:
    """A recipe, and flags of its training."""
    name = chance.choice(NAMES)
    flags = ["--backend", chance.choice(("unsloth", "peft")), "--max-steps", str(chance.randint(6, 30))]
    flags += ["--seed", str(chance.randint(0, 999)), "--checkpoint-minutes", chance.choice(("0", "0.01", "0.03"))]
    flags += ["--neftune-alpha", chance.choice(("0", "5")), "--quantization", chance.choice(("none", "none", "4bit"))]
    if name == "gemma3_12b_opercode":
        flags += ["--sampler", chance.choice(("none", "weighted", "sqrt")), "--eval-rows", "24"]
    else:
        flags += ["--accumulation", chance.choice(("1", "2")), "--log-every", "2"]
        flags += ["--early-stopping", chance.choice(("off", "patience=3,min_delta=0.05,watch=train"))]
    return name, flags


def cycle(chance: random.Random, folder: Path) -> dict[str, Any]:
    began = time.monotonic()
    name, flags = drawn(chance)
    module = f"recipes.{name}"
    faults: list[str] = []

    def run(*arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=folder, env=_environment(), capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if done.returncode:
            faults.append(f"{arguments[0]} ended with {done.returncode}: {(done.stderr.splitlines() or [''])[-1]}")

    run("train", *flags, "--run", "whole")
    whole = folder / "whole"
    stops: list[str] = []
    if not faults:
        stops = kill_and_resume(chance, module, flags, folder, len(_lines(whole)), faults)
    same = not faults and _weights(whole) == _weights(folder / "cut") and _steps(whole) == _steps(folder / "cut")
    if not faults:
        run("evaluate", "--run", "cut")
        run("predict", "안녕 hello", "--run", "cut")
    return {
        "recipe": name, "flags": shlex.join(flags), "stops": stops, "same_adapter": same, "faults": faults,
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def kill_and_resume(
    chance: random.Random, module: str, flags: list[str], folder: Path, steps: int, faults: list[str]
) -> list[str]:
    """Until the training is done, stop it at one to three random moments; what stopped it, and after which step."""
    stops: list[str] = []
    run, planned = folder / "cut", chance.randint(1, 3)
    for _ in range(_MOST_TRIES):
        begun = (run / "training_config.json").is_file()
        arguments = ["--resume", "--run", "cut"] if begun else [*flags, "--run", "cut"]
        with (folder / "said").open("w") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", module, "train", *arguments],
                cwd=folder, env=_environment(), stdout=subprocess.DEVNULL, stderr=said, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        if len(stops) < planned:
            # Anywhere between the start and the final save, more often late than by the clock alone.
            reached = chance.randint(len(_lines(run)), steps)
            while process.poll() is None and len(_lines(run)) < reached:
                time.sleep(0.01)
            time.sleep(chance.random() * 0.5)
            how = chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
            if process.poll() is None:
                process.send_signal(how)
                process.wait()
                stops.append(f"{how.name} after {len(_lines(run))}")
        if process.wait() == 0:
            return stops
        error = (folder / "said").read_text(encoding="utf-8", errors="replace")
        if "Traceback" in error or process.returncode == 2:
            faults.append(f"train ended with {process.returncode}: {(error.splitlines() or [''])[-1]}")
            return stops
    faults.append(f"not done after {_MOST_TRIES} attempts")
    return stops


def sound(done: dict[str, Any]) -> bool:
    return bool(done["same_adapter"] and not done["faults"])


def total(cycles: list[dict[str, Any]]) -> dict[str, int]:
    return {
        "cycles": len(cycles),
        "sound": sum(map(sound, cycles)),
        "stops": sum(len(done["stops"]) for done in cycles),
        "killed": sum(stop.startswith("SIGKILL") for done in cycles for stop in done["stops"]),
    }


def told(done: dict[str, Any]) -> str:
    verdict = "same adapter" if sound(done) else "; ".join(done["faults"]) or "ANOTHER ADAPTER"
    return f"{done['recipe']:<22} {', '.join(done['stops']) or 'never stopped'}: {verdict}"


def table(cycles: list[dict[str, Any]]) -> str:
    lines = []
    for name in NAMES:
        mine = [done for done in cycles if done["recipe"] == name]
        if mine:
            counts = total(mine)
            lines.append([name, *(str(counts[key]) for key in ("cycles", "stops", "killed", "sound"))])
    return markdown(["recipe", "cycles", "stops", "of them SIGKILL", "same adapter, evaluated, answered"], lines)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(_ROOT)}


def _lines(run: Path) -> list[str]:
    record = run / "steps.jsonl"
    return record.read_text(encoding="utf-8").splitlines() if record.is_file() else []


def _steps(run: Path) -> list[str]:
    """Without the times."""
    return [line.partition(', "seconds"')[0] for line in _lines(run)]


def _weights(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
