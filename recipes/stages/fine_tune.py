"""The whole of a training, around train.train: decisions before anything is written, and what happens when it is
stopped, runs out of memory, or a backend dies."""

import os
import shlex
import shutil
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fallback import compiled, leave_out
from fallback.choose import BACKENDS, CannotRun, Choice, choose
from fallback.gpu import Gpu, read_gpu
from fallback.torch_build import usable_gpu
from recipes.stages import checkpoint, crash, prepare, processes, resume, train
from recipes.stages.base_model import Chosen, model_type, published_config, settle, tokenizer_file
from recipes.stages.console import held_back, say
from recipes.stages.recipe import Recipe, Settings, StartOver, UserError
from recipes.stages.room import TooMuchAtOnce, less_memory, out_of_memory
from recipes.stages.run import Run, as_system_error, environment, explained, read_json, write_json
from recipes.stages.stopping import EarlyStopping

# Where accelerate divides the weights, auto does not take what was never seen to learn there.
_UNTRIED = dict.fromkeys(BACKENDS[:-1], "never tried with weights that are divided among processes")


def fine_tune(recipe: Recipe, args: Any, watch: Any = None) -> tuple[Run, Chosen, Choice, Settings]:
    """Every decision first, then the data, then the training; nothing is written before the decisions stand. `watch`
    is a callbacks.Watch that looks on."""
    begun = resume.begun(recipe, args.run) if args.resume else None
    if begun is None and args.run is None and watch is None:
        offer_to_resume(recipe)
    chosen = settle(recipe, args.size, args.weights, args.model)
    settings: Settings = args.settings
    EarlyStopping.parse(settings.early_stopping)
    if recipe.closed and settings.attention == "flash_attention_2":
        raise UserError(
            "--attention flash_attention_2: codes are scored under masks that it cannot be given; use --attention sdpa"
        )
    say(f"{recipe.name}, size {chosen.size}: {chosen.description}")
    if chosen.weights == "pretrained":
        published_config(chosen)
    died = backends_that_died(args)
    if begun is not None and begun.choice["backend"] in died:
        # It died before a step was done: there is nothing to go on with but the settings.
        begun = None
    failed = died | (_UNTRIED if processes.sharded() else {})
    choice = choose(
        model_type(recipe, chosen),
        args.backend,
        settings.quantization,
        settings.optimizer,
        attention=settings.attention,
        dtype=settings.dtype,
        failed={**tried_out(chosen, usable_gpu()), **failed},
        large=in_bfloat16(chosen, begun),
    )
    say(f"backend {choice.backend}: {choice.reasons['backend']}")
    if choice.device == "cpu" and read_gpu() is not None:
        say(choice.reasons["device"])
    if args.preset:
        say(
            f"preset {args.preset}: batch {settings.batch_size} x {settings.accumulation}, length {settings.max_length}"
        )
    if args.resume and args.source is not None:
        raise UserError("--resume: the data are those of the run; leave --source away")
    if settings.compile:
        together = "nobody has tried it with several processes" * (processes.launched() or processes.sharded())
        if obstacle := together or compiled.obstacle(choice):
            raise UserError(f"--compile: {obstacle}")
        compiled.get_ready()
    choice.module()
    processes.join(choice.device)
    agreed(choice)
    with ExitStack() as training:
        run = Run(Path(processes.first(lambda: str(prepared(recipe, args, chosen, training).path))))
        training.enter_context(held_back(run.logs / "libraries.log"))
        found = processes.first(lambda: _name(begin(recipe, run, args, chosen, choice, begun)))
        start = Path(found) if found else None
        if processes.rank() == 0:
            training.enter_context(crash.recorded(run))
        try:
            metrics = train.train(recipe, run, settings, chosen, choice, args.balance, watch, start)
        except (UserError, CannotRun):
            raise
        except Exception as error:
            if processes.lost(error):
                raise UserError(
                    f"another process of this training was lost at step {steps_done(run) + 1}, so that all stop; go on "
                    f"with {train.going_on(recipe, run)}"
                ) from error
            if refused := as_system_error(error):
                refused.filename = refused.filename or str(run.path)
                raise UserError(f"{explained(refused)}, then go on with {train.going_on(recipe, run)}") from error
            alone = not processes.launched()
            if out_of_memory(error):
                fewer = error.fewer if isinstance(error, TooMuchAtOnce) else None
                if fewer and alone and args.auto_batch and watch is None:
                    say(f"{error}: going on with at most {fewer:,}")
                    flags = {"--run": str(run.path), "--batch-tokens": str(fewer)}
                    raise StartOver({**flags, "--resume": "", "--accept-changes": ""}) from error
                raise UserError(less_memory(recipe, settings, args.preset, error)) from error
            if args.backend != "auto" or failed or choice.backend == BACKENDS[-1] or steps_done(run) or start:
                raise
            if not alone:
                traceback.print_exception(error)
                raise UserError(f"{choice.backend}: {how_it_died(error)}; take --backend {BACKENDS[-1]}") from error
            raise StartOver(step_down(run, choice, error)) from error
        if processes.rank() == 0:
            run.add_metrics(base_model=chosen.stored(), train=metrics)
            shutil.rmtree(run.checkpoints, ignore_errors=True)
        means = f", means of {metrics['loss_window']} steps," if metrics["loss_window"] > 1 else ""
        say(
            f"loss {metrics['first_loss']:.3f} -> {metrics['final_loss']:.3f}{means} in "
            f"{metrics['train_seconds']:.0f} s; adapter in {run.adapter}"
        )
    # What was trained is circles of references, and as large as what its caller may load next.
    leave_out.let_go()
    return run, chosen, choice, settings


def in_bfloat16(chosen: Chosen, begun: resume.Begun | None) -> bool:
    """Whether a processor that multiplies it well is to do so: as a training was begun, or for more than a tiny model.
    DeepSpeed and FSDP were tried in float32."""
    if begun is not None:
        return begun.choice["dtype"] == "bfloat16"
    return chosen.large and not processes.sharded()


def tried_out(chosen: Chosen, gpu: Gpu | None) -> dict[str, str]:
    """What `auto` does not take for a small model, and why: a minute of compiling before a training of a minute."""
    if chosen.size == "full" or gpu is None:
        return {}
    return {"unsloth": f"it would compile for longer than a model of size {chosen.size} trains"}


def prepared(recipe: Recipe, args: Any, chosen: Chosen, training: ExitStack) -> Run:
    """A run with data, and its lock in `training`."""
    if args.run is not None and Run(args.run).prepared and args.source is None:
        run = Run(args.run)
        training.enter_context(run.locked())
        prepare.tell(run, read_json(run.data / "metadata.json"))
        return run
    settings: Settings = args.settings
    return prepare.prepare(
        recipe, args.source, args.options, settings.seed, args.run, settings.max_length, tokenizer_file(chosen),
        training=training,
    )  # fmt: skip


def agreed(choice: Choice) -> None:
    """Processes that compute in different ways would not learn together."""
    mine = choice.as_json()
    theirs = processes.first(lambda: mine)
    for name in resume.DECISIONS:
        if theirs[name] != mine[name]:
            raise UserError(
                f"process {processes.rank()} would take {name} {mine[name]} and the first one {theirs[name]} "
                f"({choice.reasons['device']}): name what all can do with --backend, --dtype and --attention"
            )


def _name(path: Path | None) -> str | None:
    return str(path) if path else None


def begin(
    recipe: Recipe, run: Run, args: Any, chosen: Chosen, choice: Choice, begun: resume.Begun | None
) -> Path | None:
    """Write down what was decided, and find the checkpoint to go on from."""
    config = train.decisions(run, args.settings, chosen, args.balance, args.preset)
    if begun is None:
        run.forget_training()
        if not (args.resume or _AGAIN in os.environ):
            (run.path / "stepped_down.json").unlink(missing_ok=True)
        write_json(run.path / "environment.json", environment())
        train.record(run, config, choice)
        return None
    changes = begun.changes(config, choice)
    if changes and not args.accept_changes:
        raise UserError(
            f"--resume: {run.path} was begun differently ({'; '.join(changes)}); --accept-changes goes on all the same"
        )
    if changes:
        say(f"changed since {run.path} was begun: {'; '.join(changes)}")
        config["changes"] = [*begun.config.get("changes", []), *changes]
        train.record(run, config, choice)
    if begun.processes != config["processes"]:
        each = f"{args.settings.batch_size} x {args.settings.accumulation}"
        change = f"processes: {begun.processes} -> {config['processes']}, now with {each} examples of each step"
        say(change)
        config["changes"] = [*config.get("changes", begun.config.get("changes", [])), change]
        train.record(run, config, choice)
    try:
        before = dict(read_json(run.path / "environment.json")["versions"])
    except (UserError, OSError, KeyError, TypeError, ValueError):
        # It decides nothing.
        before = {}
    now = environment()["versions"]
    if other := [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]:
        say(f"other versions than at its beginning, so the result may differ in its last digits: {', '.join(other)}")
    start, damaged = checkpoint.newest(run)
    for complaint in damaged:
        say(f"damaged and not used: {complaint}")
    say(f"going on with {run.path} after step {checkpoint.step_of(start)}")
    return start


def offer_to_resume(recipe: Recipe) -> None:
    for run in resume.newest_first(recipe)[:1]:
        if run.unfinished and (fault := crash.before_first_step(run)):
            say(
                f"{run.path} died before its first step was done ({fault}); if this does too, go on with the next "
                f"backend: {train.going_on(recipe, run)} --backend auto"
            )
        start, _ = checkpoint.newest(run)
        if run.unfinished and start is not None:
            say(
                f"{run.path} stopped after step {checkpoint.step_of(start)}; this is a new run, "
                f"and that one goes on with {train.going_on(recipe, run)}"
            )


def steps_done(run: Run) -> int:
    record = run.path / "steps.jsonl"
    return len(record.read_bytes().splitlines()) if record.is_file() else 0


_AGAIN = "RECIPES_STARTED_OVER"
"""Set in the environment of a command that is given again."""


def backends_that_died(args: Any) -> dict[str, str]:
    """Backend -> how, in an attempt of this very training; one that is begun anew tries them again."""
    if args.run is None or not (args.resume or _AGAIN in os.environ):
        return {}
    run, record = Run(args.run), args.run / "stepped_down.json"
    died = read_json(record) if record.is_file() else {}
    if args.resume and args.backend == "auto" and (fault := crash.before_first_step(run)):
        backend = read_json(run.path / "choice.json")["backend"]
        if backend != BACKENDS[-1]:
            died[backend] = f"it died before its first step was done ({fault}; see {run.logs / 'crash.txt'})"
            write_json(record, died)
            say(f"{backend}: {died[backend]}; stepping down")
    return died


def step_down(run: Run, choice: Choice, error: Exception) -> dict[str, str]:
    """Before the first step nothing is lost yet: the flags that take the next rung of the ladder."""
    traceback.print_exception(error)
    died = how_it_died(error)
    record = run.path / "stepped_down.json"
    write_json(record, {**(read_json(record) if record.is_file() else {}), choice.backend: died})
    say(f"{choice.backend}: {died}; the whole message is in {run.logs / 'libraries.log'}; stepping down")
    return {"--run": str(run.path)}


def how_it_died(error: Exception) -> str:
    (reason, *_) = str(error).strip().splitlines() or [""]
    return f"it died before its first step was done ({type(error).__name__}: {reason})"


@contextmanager
def starting_over(recipe: Recipe, given: list[str]) -> Iterator[None]:
    """Give the same command again where that is needed: a process that loaded one backend is no place for another, and
    one that ran out of memory keeps holes in what it has."""
    try:
        yield
    except StartOver as again:
        flags = [part for name, value in again.flags.items() for part in ([name, value] if value else [name])]
        command = [sys.executable, "-m", f"recipes.{recipe.name}", *without(given, again.flags), *flags]
        say(f"again: {shlex.join(command[1:])}")
        os.execve(command[0], command, {**os.environ, _AGAIN: "1"})


def without(given: Sequence[str], flags: Iterable[str]) -> list[str]:
    """The arguments without these flags, --source among them, and without their values."""
    taken = {flag.replace("_", "-") for flag in flags} | {"--source"}
    kept, skip = [], False
    for part in given:
        name, sign, _ = part.partition("=")
        if part.startswith("--"):
            skip = name.replace("_", "-") in taken
            if not skip:
                kept.append(part)
            skip = skip and not sign
        elif skip:
            skip = False
        else:
            kept.append(part)
    return kept
