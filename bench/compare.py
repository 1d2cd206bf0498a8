"""How much memory and time Unsloth saves on this machine, whether that is more than noise, and whether the training
is still the same.

    python -m bench compare                                        every recipe, Unsloth against plain PEFT
    python -m bench compare --recipes gemma3_1b_counsel --size full --weights pretrained
    python -m bench compare --backends peft,peft                   an A/A run: it should find nothing
    python -m bench compare --case ohlora-table                    the table that Oh-LoRA was introduced with
"""

import json
import random
import secrets
import shlex
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from bench import report
from bench.case import Case, Grid, arms
from bench.launch import TurnBy, are_by_step, finished, make_ready, sweep
from bench.recipes import NAMES
from bench.results import changes
from bench.summary import summarise
from fallback.choose import BACKENDS, BackendName, CannotRun, Dtype, choose, why_not
from fallback.gpu import Gpu
from fallback.torch_build import usable_gpu
from recipes.stages.base_model import Weights, architecture, model_type, settle
from recipes.stages.console import duration, say
from recipes.stages.recipe import Recipe, UserError
from recipes.stages.run import environment, read_json, write_json


@dataclass(frozen=True)
class Compare:
    """Train and answer under several backends, in turns, and compare."""

    recipes: str = ",".join(NAMES)
    """Which, with commas between them."""
    backends: str = "unsloth,peft"
    """What is compared, with commas; ratios are to the last of them. peft,peft is an A/A run."""
    size: Literal["auto", "tiny", "small", "full"] = "auto"
    """auto takes full where a GPU has room for it, else tiny."""
    weights: Weights = "random"
    """Random weights need no download, and are as fast and as large as published ones."""
    phases: str = "train,generate"
    """What is measured."""
    steps: int = 16
    """Training steps of each case."""
    warmup: int = 3
    """Steps that are not counted, beside the first, which is told apart: it compiles."""
    repeats: int = 3
    """How often each case is run; an interval needs two, a narrow one six."""
    batch_size: int | None = None
    """Instead of the recipe's."""
    max_length: int | None = None
    """Instead of the recipe's."""
    dtype: Dtype = "auto"
    """What both arms compute in; a precision that cannot run here is a skipped row."""
    new_tokens: int = 32
    """Tokens of an answer whose speed is measured."""
    native: bool = False
    """Compare each backend at its own defaults instead of like with like; the report says so."""
    case: Literal["grid", "ohlora-table"] = "grid"
    """ohlora-table: gemma2_2b_ohlora, 25 answers of 80 tokens, and 15 steps of batch 4 at rank 64: as many as 20 rows
    make in 3 epochs."""
    turns: TurnBy = "auto"
    """What the arms take turns by: a step or an answer, for which all of them are in memory at once, or a whole case.
    auto: a step without a GPU, where there is memory for it and no model is of full size."""
    limit: float = 1800.0
    """Seconds of its own after which a case is given up."""
    seed: int | None = None
    """Decides the order of the cases; drawn and recorded if not given."""
    out: Path | None = None
    """Folder of the results; a new one under runs/bench/ if not given."""
    resume: Path | None = None
    """Finish the sweep in this folder, with its own settings."""
    json: bool = False
    """Print summary.json to standard output, and everything else to standard error."""


# What each library does if nobody tells it otherwise: the comparison that most published figures are.
NATIVE: dict[str, tuple[str, ...]] = {
    "unsloth": ("--quantization", "4bit", "--checkpointing"),
    "peft+liger": ("--quantization", "none", "--no-checkpointing"),
    "peft": ("--quantization", "none", "--no-checkpointing"),
}


def main(arguments: list[str]) -> None:
    args = tyro.cli(Compare, prog="python -m bench compare", args=arguments)
    folder, args, seed = settle_folder(args, arguments)
    recipes, backends, phases = asked_for(args)
    gpu = usable_gpu()
    plan = read_json(folder / "plan.json")
    sizes = plan.get("sizes") or {r.name: size_for(r, args, gpu) for r in recipes}
    grid = Grid(
        recipes, backends, args.repeats,
        {(r.name, arm): flags(args, sizes[r.name], b) for r in recipes for arm, b in arms(backends).items()},
        phases, args.warmup, args.new_tokens, 25 if args.case == "ohlora-table" else 3,
    )  # fmt: skip
    skipped = obstacles(grid, sizes, gpu, args.dtype)
    cases = grid.cases(seed)
    if (by_step := plan.get("by_step")) is None:
        by_step = are_by_step(args.turns, gpu is not None, sizes.values(), len(backends))
    same_machine(folder, sizes, by_step)
    for recipe in recipes:
        if any((recipe.name, arm) not in skipped for arm in arms(backends)) and args.weights == "random":
            make_ready(recipe.name, sizes[recipe.name], args.weights)
    tell = progress(cases, folder, args.json)
    try:
        for _ in sweep(cases, folder, args.limit, skipped, tell, by_step, random.Random(seed)):
            pass
    except KeyboardInterrupt:
        print(f"\nstopped; to finish it: python -m bench compare --resume {folder}", file=sys.stderr)
        raise
    finally:
        rows = list(finished(folder).values())
        if rows:
            summary = summarise(rows, read_json(folder / "plan.json"), read_json(folder / "environment.json"))
            report.write(folder, summary, rows)
    if args.json:
        print(json.dumps(summary, ensure_ascii=False))
        return
    report.show(summary)
    say(f"everything is in {folder}; to look at: {folder / 'report.html'}")


def settle_folder(args: Compare, arguments: list[str]) -> tuple[Path, Compare, int]:
    """A new folder with the settings written into it, or an old one's settings read from it."""
    if args.resume is not None:
        try:
            plan = read_json(args.resume / "plan.json")
        except FileNotFoundError:
            raise UserError(f"--resume {args.resume}: no sweep was begun there") from None
        return args.resume, replace(Compare(**plan["settings"]), json=args.json), plan["seed"]
    if args.case == "ohlora-table":
        args = replace(
            args, recipes="gemma2_2b_ohlora", batch_size=4, steps=15, warmup=min(args.warmup, 3), new_tokens=80
        )
    # A folder that a typing error left behind would pass for a sweep.
    asked_for(args)
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: every case is run at least once")
    if args.steps <= args.warmup + 1:
        raise UserError(f"--steps {args.steps}: the first and {args.warmup} more are not counted; take more steps")
    folder = args.out or Path("runs/bench") / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    if (folder / "plan.json").is_file():
        raise UserError(f"--out {folder}: there is a sweep already; finish it with --resume {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    seed = args.seed if args.seed is not None else secrets.randbelow(2**31)
    command = shlex.join(["python", "-m", "bench", "compare", *arguments])
    stored = {**asdict(args), "out": None, "resume": None}
    write_json(folder / "plan.json", {"command": command, "seed": seed, "settings": stored})
    return folder, args, seed


def same_machine(folder: Path, sizes: dict[str, Any], by_step: bool) -> None:
    """Write down where a sweep runs, or refuse to go on with it elsewhere: rows of two machines, or of two versions of
    the code, are no pairs."""
    now, file = environment(), folder / "environment.json"
    if file.is_file():
        changed = [part for parts in changes(read_json(file), now).values() for part in parts if "->" in part]
        if changed:
            raise UserError(
                f"--resume {folder}: begun under other conditions ({'; '.join(changed)}); begin a new sweep"
            )
        return
    write_json(file, now)
    write_json(folder / "plan.json", {**read_json(folder / "plan.json"), "sizes": sizes, "by_step": by_step})


def asked_for(args: Compare) -> tuple[list[Recipe], tuple[str, ...], tuple[str, ...]]:
    """Recipes, backends and phases."""
    backends = checked(args.backends, BACKENDS, "--backends")
    return named(args), backends, checked(args.phases, ("train", "generate"), "--phases")


def checked(given: str, known: tuple[str, ...], flag: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in given.split(",") if part.strip())
    for part in parts:
        if part not in known:
            raise UserError(f"{flag} {part!r}: unknown; there are {', '.join(known)}")
    if not parts:
        raise UserError(f"{flag}: name at least one of {', '.join(known)}")
    return parts


def named(args: Compare) -> list[Recipe]:
    import importlib

    return [
        importlib.import_module(f"recipes.{name}").RECIPE for name in checked(args.recipes, tuple(NAMES), "--recipes")
    ]


def size_for(recipe: Recipe, args: Compare, gpu: Gpu | None) -> Literal["tiny", "small", "full"]:
    if args.size != "auto":
        return args.size
    return "full" if gpu is not None and weights_bytes(recipe) * 1.5 + 3 * 2**30 < gpu.memory_bytes else "tiny"


def weights_bytes(recipe: Recipe) -> float:
    """About what the base weights take: enough to tell 24 GB from 8."""
    c = architecture(recipe)
    width, inner, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    head = c.get("head_dim", width // heads)
    attention = 2 * width * head * (heads + c.get("num_key_value_heads", heads))
    layers = c["num_hidden_layers"] * (attention + 3 * width * inner)
    embeddings = c["vocab_size"] * width * (1 if c.get("tie_word_embeddings", True) else 2)
    return layers * (0.6 if recipe.settings.quantization == "4bit" else 2) + embeddings * 2


def flags(args: Compare, size: str, backend: BackendName) -> tuple[str, ...]:
    """The recipe's train command for one arm. Nothing may end a training early; validation comes once, after it.
    Nothing is dropped at random, or the losses of two backends would differ by what each of them drew."""
    found = ["--size", size, "--backend", backend, "--max-steps", str(args.steps), "--epochs", "100000"]
    found += ["--early-stopping", "off", "--log-every", "1000000", "--lora-dropout", "0", "--neftune-alpha", "0"]
    if size == "full":
        found += ["--weights", args.weights]
    if args.batch_size is not None:
        found += ["--batch-size", str(args.batch_size)]
    if args.max_length is not None:
        found += ["--max-length", str(args.max_length)]
    if args.dtype != "auto":
        found += ["--dtype", args.dtype]
    if args.case == "ohlora-table":
        found += ["--lora-rank", "64"]
    return (*found, *(NATIVE[backend] if args.native else ()))


def obstacles(grid: Grid, sizes: dict[str, Any], gpu: Gpu | None, dtype: Dtype) -> dict[tuple[str, str], str]:
    """(recipe, arm) -> why it cannot be measured here: a skipped row, never a number under another's name."""
    found = {}
    for recipe in grid.recipes:
        kind = model_type(recipe, settle(recipe, sizes[recipe.name], "random"))
        for arm, backend in arms(grid.backends).items():
            why = why_not(backend, gpu, kind)
            try:
                choose(kind, "peft", gpu=gpu, dtype=dtype)
            except CannotRun as error:
                why = str(error)
            if why:
                found[recipe.name, arm] = why
    return found


def progress(cases: list[Case], folder: Path, quiet: bool) -> Any:
    """Tells what became of every case, and how long the rest will take."""
    began, new = time.monotonic(), 0
    there = len(finished(folder))
    lines = 0

    def tell(case: Case, row: dict[str, Any]) -> None:
        nonlocal new, lines
        lines += 1
        new += lines > there
        left = (time.monotonic() - began) / new * (len(cases) - lines) if new else 0
        line = f"{lines:>3}/{len(cases)}  {case.recipe:<22} {case.arm:<11} #{case.repeat + 1}  {report.brief(row)}"
        line += f"   {duration(left)} left" if left else ""
        print(line, file=sys.stderr if quiet else sys.stdout, flush=True)

    if shutil.disk_usage(folder).free < 2**30:
        print(f"less than 1 GiB is free where {folder} is", file=sys.stderr)
    return tell
