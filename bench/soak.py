"""Trainings that are killed again and again, with settings drawn at random: python -m bench soak --out FILE

A cycle trains until something stops it at a random moment, and goes on until it is done. It has to end where a training
of the same settings ended that nothing stopped: the same adapter to the last bit, the same steps, the same answers.
With --out a soak that was interrupted goes on: what a cycle does follows from the seed and its number.
"""

import hashlib
import itertools
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from bench.recipes import NAMES
from bench.report import deliver, markdown
from bench.warm import ROOT, Process, Warm
from fallback.gpu import read_gpu
from recipes.stages.console import say
from recipes.stages.recipe import UserError
from recipes.stages.run import Run, environment, read_json, read_jsonl, write_json

_MOST_TRIES = 12
SETTINGS = 10
"""Different settings of a recipe: cycles that share them share the training that nothing stops."""
_FRESH = 10
"""One in so many cycles starts its processes as a shell does. The others fork them from one that has the libraries."""

LOADING, STEP, CHECKPOINT = "loading", "in a step", "writing a checkpoint"
VALIDATION, BEST, FINAL = "in a validation", "saving the best adapter", "in the final save"
PHASES = (LOADING, STEP, CHECKPOINT, VALIDATION, BEST, FINAL)


@dataclass(frozen=True)
class Soak:
    """Train, kill, resume, evaluate and predict, over and over."""

    cycles: int = 200
    """How often; the recipes take turns."""
    seed: int = 0
    """Decides settings and moments; a moment still falls where the machine's speed lets it."""
    jobs: int = 1
    """Cycles side by side. Every training computes on one thread, so that their number changes nothing."""
    out: Path | None = None
    """JSON file for the cycles, written after each of them. One that is there already is continued."""
    json: bool = False
    """Print them as JSON."""


@dataclass(frozen=True)
class Outcome:
    """What has to be the same."""

    adapter: str
    steps: tuple[str, ...]
    validated: tuple[int, ...]
    """Steps after which there was a validation."""
    answers: tuple[str, str]
    """Of evaluate, as a digest of its file, and of predict."""


class Commands:
    """Commands of one recipe in one folder."""

    def __init__(self, module: str, folder: Path, warm: Warm | None):
        self.module, self.folder, self.warm = module, folder, warm
        self.answered, self.said = folder / "answered", folder / "said"

    def start(self, *arguments: str) -> Process:
        if self.warm:
            return self.warm.start(self.module, list(arguments), self.folder, self.answered, self.said)
        with self.answered.open("w") as answered, self.said.open("w") as said:
            return subprocess.Popen(
                [sys.executable, "-m", self.module, *arguments],
                cwd=self.folder, env=_environment(), stdin=subprocess.DEVNULL, stdout=answered, stderr=said,
            )  # fmt: skip

    def run(self, *arguments: str) -> None:
        self.check(self.start(*arguments).wait(), arguments[0])

    def check(self, code: int, what: str) -> None:
        if code:
            raise Fault(f"{what} ended with {code}: {(self.complaints() or [''])[-1]}")

    def complaints(self) -> list[str]:
        return self.said.read_text(encoding="utf-8", errors="replace").splitlines()


class Fault(Exception):
    """A command did what it should not."""


class Workshop:
    """What cycles share: trainings that nothing stopped, and per thread a process with each backend's libraries."""

    def __init__(self, seed: int):
        self.seed = seed
        self._done: dict[tuple[str, int], Outcome] = {}
        self._locks: dict[tuple[str, int], threading.Lock] = {}
        self._lock = threading.Lock()
        self._here = threading.local()
        self._all: list[Warm] = []

    def warm(self, flags: list[str]) -> Warm | None:
        """A process that has touched a GPU cannot be forked."""
        if read_gpu() is not None:
            return None
        backend = flags[flags.index("--backend") + 1]
        if not hasattr(self._here, backend):
            made = Warm(backend, _environment())
            setattr(self._here, backend, made)
            with self._lock:
                self._all.append(made)
        return getattr(self._here, backend)

    def unstopped(self, name: str, setting: int) -> Outcome:
        key = (name, setting)
        with self._lock:
            mine = self._locks.setdefault(key, threading.Lock())
        with mine:
            if key not in self._done:
                flags = drawn(self.seed, name, setting)
                with tempfile.TemporaryDirectory(prefix="soak-") as folder:
                    commands = Commands(f"recipes.{name}", Path(folder), self.warm(flags))
                    commands.run("train", *flags, "--run", "run")
                    self._done[key] = outcome(commands, name)
            return self._done[key]

    def close(self) -> None:
        for warm in self._all:
            warm.close()


def main(arguments: list[str]) -> None:
    args = tyro.cli(Soak, prog="python -m bench soak", args=arguments)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # Begun in the background, where commands would inherit that they do not hear it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    made_by = environment()
    cycles = known(args, made_by)

    def summary() -> dict[str, Any]:
        command = shlex.join(["python", "-m", "bench", "soak", *arguments])
        ordered = [cycles[number] for number in sorted(cycles)]
        return {"command": command, "seed": args.seed, "environment": made_by, "cycles": ordered, **total(ordered)}

    workshop = Workshop(args.seed)
    try:
        with ThreadPoolExecutor(args.jobs) as jobs:
            waiting = [jobs.submit(cycle, workshop, n) for n in range(args.cycles) if n not in cycles]
            try:
                for one in as_completed(waiting):
                    done = one.result()
                    cycles[done["number"]] = done
                    say(f"{len(cycles):>4}/{args.cycles}  {told(done)}")
                    if args.out:
                        write_json(args.out, summary())
            except BaseException:
                jobs.shutdown(cancel_futures=True)
                raise
    finally:
        workshop.close()
    if not deliver(summary(), args.out, args.json):
        say(table(list(cycles.values())))
    if not all(map(sound, cycles.values())):
        sys.exit(1)


def known(args: Soak, made_by: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The cycles of a soak that goes on."""
    if args.out is None or not args.out.is_file():
        return {}
    before = read_json(args.out)
    same = ("git_commit", "versions")
    if before["seed"] != args.seed or any(before["environment"][name] != made_by[name] for name in same):
        raise UserError(f"--out {args.out}: of another seed, commit or other versions; choose another file")
    return {done["number"]: done for done in before["cycles"]}


def drawn(seed: int, name: str, setting: int) -> list[str]:
    """Flags of a training."""
    chance = random.Random(f"{seed} {name} {setting}")
    flags = ["--backend", chance.choice(("unsloth", "peft")), "--max-steps", str(chance.randint(8, 24))]
    flags += ["--seed", str(chance.randint(0, 999)), "--checkpoint-minutes", chance.choice(("0", "0", "0.01", "0.03"))]
    flags += ["--neftune-alpha", chance.choice(("0", "5")), "--quantization", chance.choice(("none", "none", "4bit"))]
    if name == "gemma3_12b_opercode":
        flags += ["--sampler", chance.choice(("none", "weighted", "sqrt")), "--eval-rows", "24"]
    else:
        flags += ["--accumulation", chance.choice(("1", "2")), "--log-every", "2"]
        flags += ["--early-stopping", chance.choice(("off", "patience=3,min_delta=0.05,watch=train"))]
    return flags


def cycle(workshop: Workshop, number: int) -> dict[str, Any]:
    began = time.monotonic()
    chance = random.Random(f"{workshop.seed} {number}")
    turn, recipe = divmod(number, len(NAMES))
    name, setting, fresh = NAMES[recipe], chance.randrange(SETTINGS), turn % _FRESH == _FRESH - 1
    flags = drawn(workshop.seed, name, setting)
    stops: list[dict[str, Any]] = []
    faults: list[str] = []
    same: list[str] = []
    try:
        whole = workshop.unstopped(name, setting)
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            commands = Commands(f"recipes.{name}", Path(folder), None if fresh else workshop.warm(flags))
            kill_and_resume(chance, commands, flags, whole, stops)
            now = outcome(commands, name)
            same = [part for part, value in asdict(now).items() if value == asdict(whole)[part]]
    except Fault as fault:
        faults.append(str(fault))
    return {
        "number": number, "recipe": name, "flags": shlex.join(flags), "new_interpreters": fresh, "stops": stops,
        "same": same, "faults": faults, "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def outcome(commands: Commands, name: str) -> Outcome:
    """Of a training that is done, evaluated and asked."""
    run = commands.folder / "run"
    short = [] if name == "gemma3_12b_opercode" else ["--temperature", "0", "--max-new-tokens", "24"]
    commands.run("evaluate", "--run", "run", *short)
    answers = hashlib.sha256((run / "predictions.csv").read_bytes()).hexdigest()
    commands.run("predict", "안녕 hello", "--run", "run", *short)
    return Outcome(
        hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest(),
        # Without the times.
        tuple(line.partition(', "seconds"')[0] for line in _lines(run)),
        tuple(line["step"] for line in read_jsonl(run / "validation.jsonl")),
        (answers, commands.answered.read_text(encoding="utf-8")),
    )


def kill_and_resume(
    chance: random.Random, commands: Commands, flags: list[str], whole: Outcome, stops: list[dict[str, Any]]
) -> None:
    """Until the training is done, stop it at one to three random moments; `stops` is told of them."""
    run, planned = commands.folder / "run", chance.randint(1, 3)
    # Of the phases that not every training has, those that this one has often.
    every_step = flags[flags.index("--checkpoint-minutes") + 1] == "0"
    often = [BEST] * ("--eval-rows" in flags and len(whole.validated) > 1) + [CHECKPOINT] * every_step
    for _ in range(_MOST_TRIES):
        begun = (run / "training_config.json").is_file()
        had, since = len(_lines(run)), time.time()
        process = commands.start("train", *(["--resume"] if begun else flags), "--run", "run")
        if len(stops) < planned:
            # Anywhere between the start and the end; some phases are so short that chance alone would miss them.
            reached = chance.randint(min(had, len(whole.steps) - 1), len(whole.steps) - 1)
            aim = chance.choice((None, None, None, VALIDATION, FINAL, *often))
            while process.poll() is None and len(_lines(run)) < reached and aim != FINAL:
                time.sleep(0.01)
            while process.poll() is None and aim not in (None, phase(run, whole, had, since)):
                time.sleep(0.003)
            time.sleep(chance.random() * (0.2 if aim in (None, VALIDATION) else 0.02))
            # Whoever asks politely behind the last step finds the training about to end anyway.
            asked = (signal.SIGTERM, signal.SIGINT) if aim is None and reached < 0.7 * len(whole.steps) else ()
            how = chance.choice((signal.SIGKILL, signal.SIGKILL, *asked))
            if process.poll() is None:
                process.send_signal(how)
                if process.wait():
                    where = phase(run, whole, had, since) if how == signal.SIGKILL else None
                    stops.append({"by": how.name, "after_step": len(_lines(run)), "phase": where})
        code = process.wait()
        if code == 0 or (Run(run).config.is_file() and not Run(run).unfinished):
            return
        complaints = commands.complaints()
        # Ctrl-C while Python was still reading the command's modules: nobody there could have said anything.
        unheard = code == -signal.SIGINT and not any("in as_command" in line for line in complaints)
        if code == 2 or (any(line.startswith("Traceback") for line in complaints) and not unheard):
            commands.check(code, "train")
    raise Fault(f"not done after {_MOST_TRIES} attempts")


def phase(run: Path, whole: Outcome, had: int, since: float) -> str:
    """What a training does that was started then, after so many steps; if it was killed, what it was doing."""
    done = len(_lines(run))
    if _made(itertools.chain((run / "checkpoints").glob(".step-*")), since):
        return CHECKPOINT
    if _made([run / ".adapter.making"], since):
        return FINAL if done >= len(whole.steps) else BEST
    if done <= had < len(whole.steps):
        return LOADING
    record = run / "validation.jsonl"
    validated = record.read_text(encoding="utf-8").count("\n") if record.is_file() else 0
    if done in whole.validated and validated <= whole.validated.index(done):
        return VALIDATION
    return FINAL if done >= len(whole.steps) else STEP


def _made(folders: Any, since: float) -> bool:
    """Whether one of these is there, and no older process left it."""
    try:
        return any(folder.stat().st_ctime >= since for folder in folders)
    except FileNotFoundError:
        return False


def sound(done: dict[str, Any]) -> bool:
    return not done["faults"] and set(done["same"]) == set(Outcome.__dataclass_fields__)


def total(cycles: list[dict[str, Any]]) -> dict[str, Any]:
    stops = [stop for done in cycles for stop in done["stops"]]
    return {
        "total": {
            "cycles": len(cycles), "sound": sum(map(sound, cycles)), "stops": len(stops),
            "killed": sum(stop["by"] == "SIGKILL" for stop in stops),
        },
        "phases": {name: sum(stop["phase"] == name for stop in stops) for name in PHASES},
    }  # fmt: skip


def told(done: dict[str, Any]) -> str:
    stops = [f"{stop['by']} after {stop['after_step']}" + f" {stop['phase'] or ''}".rstrip() for stop in done["stops"]]
    another = sorted(set(Outcome.__dataclass_fields__) - set(done["same"]))
    verdict = "the same" if sound(done) else "; ".join(done["faults"]) or f"ANOTHER {', '.join(another)}"
    return f"{done['number']:>4} {done['recipe']:<22} {', '.join(stops) or 'never stopped'}: {verdict}"


def table(cycles: list[dict[str, Any]]) -> str:
    """A row per recipe."""
    lines = []
    for name in NAMES:
        mine = [done for done in cycles if done["recipe"] == name]
        if mine:
            counts = total(mine)
            kinds = Counter(stop["by"] for done in mine for stop in done["stops"])
            lines.append([
                name, *(str(counts["total"][key]) for key in ("cycles", "sound")),
                *(str(kinds[by]) for by in ("SIGTERM", "SIGINT", "SIGKILL")), *map(str, counts["phases"].values()),
            ])  # fmt: skip
    return markdown(["recipe", "cycles", "sound", "SIGTERM", "SIGINT", "SIGKILL", *PHASES], lines)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _lines(run: Path) -> list[str]:
    record = run / "steps.jsonl"
    return record.read_text(encoding="utf-8").splitlines() if record.is_file() else []
