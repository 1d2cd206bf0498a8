"""How fast this repository trains beside the tools that a user could pick instead: python -m bench train

Ours, TRL and Unsloth, each in a process of its own, on the same model, tokens, rows and steps; where there is memory
for it they take turns step by step, in random order, since a shared machine changes speed by more than tools differ,
but less within seconds. What is learned is compared too: a faster training that is another is no gain.
"""

import importlib
import math
import os
import random
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import tyro

from bench.case import Case
from bench.compare import checked
from bench.launch import TurnBy, are_by_step, make_ready, rows_of
from bench.recipes import NAMES
from bench.report import deliver, markdown, said, short
from bench.statistics import TOLERANCES, paired_ratio, ratio_of
from fallback.choose import Backend, BackendName, Dtype
from fallback.torch_build import usable_gpu
from recipes.stages.base_model import Size
from recipes.stages.console import say
from recipes.stages.recipe import UserError
from recipes.stages.run import environment

OURS = "ours"
AGAIN = "ours-again"
COMPILED = "ours-compiled"
OWN = (OURS, AGAIN, COMPILED)
RIVALS: dict[str, BackendName | None] = {
    "trl": "peft",
    "trl-everything": "peft",
    "unsloth": "unsloth",
    "unsloth-compiled": "unsloth",
    AGAIN: None,
    COMPILED: None,
}
"""Arm -> what loads its model. TRL takes the loss on the answers, or on everything as it does unless told otherwise.
Ours beside itself shows what a comparison here cannot tell apart; compiled it is `train --compile`, whose first step is
told with the compiling in it."""
# Nothing that is drawn at random, and nothing that only our settings know.
LIKE_WITH_LIKE = (
    "--neftune-alpha", "0", "--warmup-ratio", "0", "--weight-decay", "0", "--early-stopping",
    "off", "--log-every", "1000000", "--epochs", "100000",
)  # fmt: skip


@dataclass(frozen=True)
class Train:
    """Train the same thing with this repository, TRL and Unsloth, and compare."""

    recipes: str = "gemma3_12b_opercode,llama_1b_civil"
    """Which, with commas between them."""
    arms: str = ",".join(arm for arm in RIVALS if arm not in OWN)
    """What to compare with, with commas between them."""
    backend: Backend = "auto"
    """Of ours."""
    size: Size = "small"
    """Of the models, with random weights."""
    dtype: Dtype = "auto"
    """What all of them compute in."""
    steps: int = 24
    """Optimiser steps of each training."""
    warmup: int = 3
    """Steps that are not counted, beside the first, which is told apart: it compiles."""
    repeats: int = 3
    """Rounds; every round runs every arm once."""
    batch_size: int | None = None
    """Instead of the recipe's."""
    accumulation: int | None = None
    """Instead of the recipe's. The others take so many forward passes for a step, ours takes as few as there is room
    for."""
    dropout: bool = False
    """Train with the recipe's own dropout, as a user does. Each arm draws its own, so losses are close, not the
    same."""
    turns: TurnBy = "auto"
    """What the arms take turns by: a step, for which all of them are in memory at once, or a whole training. auto: a
    step without a GPU, where there is memory for it and models are not of full size."""
    limit: float = 900.0
    """Seconds of its own after which a training is given up."""
    seed: int = 0
    """Decides the order."""
    out: Path | None = None
    """Also write the figures to this JSON file."""
    json: bool = False
    """Print the figures as JSON."""


def main(arguments: list[str]) -> None:
    args = tyro.cli(Train, prog="python -m bench train", args=arguments)
    recipes = checked(args.recipes, tuple(NAMES), "--recipes")
    rivals = checked(args.arms, tuple(RIVALS), "--arms")
    if args.steps <= args.warmup + 1:
        raise UserError(f"--steps {args.steps}: the first and {args.warmup} more are not counted; take more steps")
    by_step = are_by_step(args.turns, usable_gpu() is not None, [args.size], 1 + len(rivals))
    folder = Path(tempfile.mkdtemp(prefix="bench-train-"))
    rows: list[dict[str, Any]] = []
    # Whoever compiles has to in the first round, whatever this machine has compiled before.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled")
    try:
        for name in recipes:
            make_ready(name, args.size, "random")
        order = random.Random(args.seed)
        for repeat in range(args.repeats):
            for name in recipes:
                cases = [case(args, name, arm, repeat) for arm in (OURS, *rivals)]
                order.shuffle(cases)
                for row in rows_of(cases, folder, args.limit, by_step, worker, order):
                    rows.append(row)
                    print(f"{name} #{repeat + 1} {row['arm']}: {brief(row)}", file=sys.stderr, flush=True)
                    for line in row.get("tail", ()):
                        print(f"    {line}", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    recipes_found = {
        name: compared([row for row in rows if row["recipe"] == name], rivals, args.warmup, args.dropout)
        for name in recipes
    }
    summary: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "bench", "train", *arguments]),
        "environment": environment(),
        "settings": {**asdict(args), "out": None, "turns": "step" if by_step else "training"},
        "recipes": recipes_found,
    }
    if not deliver(summary, args.out, args.json):
        for name, found in recipes_found.items():
            say(f"\n{name}, size {args.size}, {found['dtype'] or 'not measured'}")
            say(table(found))


def case(args: Train, name: str, arm: str, repeat: int) -> Case:
    backend = RIVALS.get(arm) or args.backend
    flags = ["--size", args.size, "--weights", "random", "--backend", backend, "--dtype", args.dtype]
    flags += ["--max-steps", str(args.steps), *LIKE_WITH_LIKE]
    recipe = importlib.import_module(f"recipes.{name}").RECIPE
    # A small model's own settings may go without.
    flags += ["--lora-dropout", str(recipe.settings.lora_dropout if args.dropout else 0)]
    if recipe.closed:
        # The validation at the end is not measured.
        flags += ["--eval-rows", "12"]
    for flag, value in (("--batch-size", args.batch_size), ("--accumulation", args.accumulation)):
        if value is not None:
            flags += [flag, str(value)]
    if arm == COMPILED:
        flags += ["--compile"]
    return Case(name, arm, backend, repeat, tuple(flags), ("train",), args.warmup)  # type: ignore[arg-type]


def worker(case: Case) -> str:
    return "bench.worker" if case.arm in OWN else "bench.rivals"


def brief(row: dict[str, Any]) -> str:
    if row["status"] != "measured":
        return f"{row['status']}: {row['reason']}"
    return f"{row['train']['tokens_per_second']:,.0f} tokens/s"


MEDIANS = (
    "tokens_per_second", "supervised_tokens_per_second", "samples_per_second", "first_step_seconds",
    "peak_resident_bytes", "peak_allocated_bytes",
)  # fmt: skip


def compared(
    rows: Sequence[dict[str, Any]], rivals: Sequence[str], warmup: int, dropout: bool = False
) -> dict[str, Any]:
    """Of one recipe: each arm's medians, and ours to every other in pairs. With dropout nobody's losses are another's,
    and whether it is the same training cannot be said."""
    arms: dict[str, Any] = {}
    runs = {
        arm: {row["repeat"]: row for row in rows if row["arm"] == arm and row["status"] == "measured"}
        for arm in (OURS, *rivals)
    }
    for arm, good in runs.items():
        if not good:
            failed = next(row for row in rows if row["arm"] == arm)
            arms[arm] = {"status": failed["status"], "reason": failed["reason"]}
            continue
        told = [row["train"] for row in good.values()]
        arms[arm] = {"status": "measured", "runs": len(told), "losses": [step["loss"] for step in told[0]["steps"]]}
        if handicap := next(iter(good.values())).get("handicap"):
            arms[arm]["handicap"] = handicap
        for name in MEDIANS:
            values = [one[name] for one in told if one[name] is not None]
            arms[arm][name] = median(values) if values else None
    ours = runs[OURS]
    if not ours:
        return {"dtype": None, "arms": arms, "ratio_to_trl": None, "best_other": None, "ratio_to_best_other": None}
    dtype = next(iter(ours.values()))["choice"]["dtype"]
    for name in ("mfu", "matmul_flops_per_second"):
        arms[OURS][name] = median(row["train"][name] for row in ours.values())
    for arm in rivals:
        both = sorted(ours.keys() & runs[arm].keys())
        if both:
            rounds = [speed(ours[k]["train"]["steps"], runs[arm][k]["train"]["steps"], warmup) for k in both]
            arms[arm]["ours_to_this"] = asdict(ratio_of(rounds))
            arms[arm]["rounds"] = rounds
            where = "allocated" if arms[OURS]["peak_allocated_bytes"] else "resident"
            own, its = ([of[k]["train"][f"peak_{where}_bytes"] for k in both] for of in (ours, runs[arm]))
            arms[arm]["memory_of_ours_to_this"] = asdict(paired_ratio(own, its))
            arms[arm]["losses_apart"] = losses_apart(arms[OURS]["losses"], arms[arm]["losses"])
            arms[arm]["same_rows"] = all(
                [step["tokens"] for step in ours[k]["train"]["steps"]]
                == [step["tokens"] for step in runs[arm][k]["train"]["steps"]]
                for k in both
            )
            same = arms[arm]["same_rows"] and (dropout or arms[arm]["losses_apart"] <= TOLERANCES[dtype])
            arms[arm]["same_training"] = None if dropout and same else same
    if compiled := runs.get(COMPILED):
        arms[COMPILED]["compiled"] = [row["compiled"] for row in compiled.values()]
        arms[COMPILED]["this_to"] = {}
        for arm in (OURS, *(arm for arm in rivals if arm not in OWN)):
            pairs = [
                (of["train"]["steps"], runs[arm][k]["train"]["steps"]) for k, of in compiled.items() if k in runs[arm]
            ]
            if pairs:
                arms[COMPILED]["this_to"][arm] = asdict(ratio_of([speed(*pair, warmup) for pair in pairs]))
    ratios = {arm: arms[arm]["ours_to_this"]["value"] for arm in rivals if "ours_to_this" in arms[arm]}
    fair = (arm for arm in ratios if arm not in OWN and arms[arm]["same_training"] is not False)
    best = min(fair, key=lambda arm: ratios[arm], default=None)
    return {
        "dtype": dtype,
        "arms": arms,
        "ratio_to_trl": ratios.get("trl"),
        "best_other": best,
        "ratio_to_best_other": ratios[best] if best else None,
    }


def speed(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], warmup: int) -> float:
    """Of one round: how many times as fast ours gets through a token, by steps; the middle of them, since a step in
    which the machine did something else is nobody's. What one arm seldom waits for, as a compiler at a new shape, is in
    its tokens per second alone."""
    pairs = list(zip(ours, theirs, strict=False))[1 + warmup :]
    return math.exp(median(math.log(b["seconds"] / b["tokens"] / (a["seconds"] / a["tokens"])) for a, b in pairs))


def losses_apart(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest relative difference of the losses of one step, over the first steps: later ones have their own
    roundings behind them."""
    return max(abs(a - b) / max(abs(b), 1e-9) for a, b in list(zip(ours, theirs, strict=False))[:5])


def table(found: dict[str, Any]) -> str:
    header = ["arm", "tokens/s", "answer tokens/s", "rows/s", "first step", "peak memory", "ours is", "same losses"]
    made = markdown(header, [[arm, *_cells(of)] for arm, of in found["arms"].items()])
    told = [
        f"{arm} is slower here than elsewhere: {of['handicap']}."
        for arm, of in found["arms"].items()
        if "handicap" in of
    ]
    ours = found["arms"][OURS]
    if ours["status"] == "measured":
        told.append(
            f"Ours computes at {ours['mfu']:.0%} of the {ours['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s at which "
            "this machine multiplies large matrices."
        )
    for arm, ratio in found["arms"].get(COMPILED, {}).get("this_to", {}).items():
        told.append(f"{COMPILED} to {arm}: {said(ratio)}.")
    if found["best_other"]:
        told.append(f"The fastest other is {found['best_other']}: ours is x {found['ratio_to_best_other']:.2f}.")
    return "\n\n".join([made, *told])


def _cells(of: dict[str, Any]) -> list[str]:
    if of["status"] != "measured":
        return [f"{of['status']}: {of['reason']}", *[""] * 6]
    ratio = of.get("ours_to_this")
    return [
        f"{of['tokens_per_second']:,.0f}",
        f"{of['supervised_tokens_per_second']:,.0f}",
        f"{of['samples_per_second']:.1f}",
        f"{of['first_step_seconds']:.1f} s",
        f"{(of['peak_allocated_bytes'] or of['peak_resident_bytes']) / 2**20:,.0f} MiB",
        short(ratio) if ratio else "",
        _same(of) if ratio else "",
    ]


def _same(of: dict[str, Any]) -> str:
    if of["same_training"]:
        return "yes"
    apart = f"{of['losses_apart']:.1%} apart" if of["same_rows"] else "other rows"
    return apart if of["same_training"] is None else f"no, {apart}"
