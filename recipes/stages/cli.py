"""main(RECIPE): stages become subcommands. Loads no torch, so that --help answers at once."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import tyro

from fallback import cpu, leave_out
from fallback.cards import USUAL
from fallback.choose import CannotRun
from fallback.gpu import Gpu, read_gpu
from fallback.torch_build import usable_gpu
from recipes.stages import (
    chat,
    console,
    evaluate,
    export,
    gguf_file,
    history,
    hub,
    loading,
    modelfile,
    pace,
    plan,
    plan_data,
    plan_report,
    plan_sharded,
    predict,
    prepare,
    processes,
    resume,
    stats,
    train,
)
from recipes.stages.base_model import (
    ensure_files,
    load_tokenizer,
    settle,
    tokenizer_file,
)
from recipes.stages.classifier import Scoring
from recipes.stages.console import held_back, say
from recipes.stages.fine_tune import fine_tune, starting_over
from recipes.stages.flags import (
    Chat,
    Evaluate,
    Export,
    ExportGguf,
    ExportHub,
    ExportMerged,
    ExportOllama,
    Plan,
    Predict,
    Prepare,
    Remember,
    Runs,
    Sample,
    Stats,
    Train,
)
from recipes.stages.memory import Memory, Recall
from recipes.stages.recipe import Interrupted, Recipe, Sampling, Settings, UserError
from recipes.stages.run import explained

Flat = tyro.conf.OmitArgPrefixes


def main(recipe: Recipe, arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of every recipe."""
    as_command(lambda given: run_command(recipe, given), sys.argv[1:] if arguments is None else arguments)


def as_command(do: Callable[[list[str]], None], arguments: Sequence[str]) -> NoReturn:
    """Ends the process; what the user can mend is one line on standard error."""
    leave_out.the_process_is_ours()
    try:
        do(list(arguments))
        processes.leave()
        sys.stdout.flush()
    except (UserError, CannotRun) as error:
        if processes.speaks():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except processes.Elsewhere:
        sys.exit(2)
    except RuntimeError as error:
        if not processes.lost(error):
            raise
        if processes.speaks():
            print("error: another process was lost, so that all stop; give the same command again", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # Whoever read this has gone, as in `| head`. Python would complain of it again when it closes its output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except OSError as error:
        # A full disk, a folder that is read-only or went away: the system's matter, and not a bug of ours.
        if processes.speaks():
            print(f"error: {explained(error)}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stopped:
        if processes.speaks():
            print(stopped, file=sys.stderr)
        sys.exit(stopped.code)
    except KeyboardInterrupt:
        print("\nstopped; what was finished before is kept", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def stages_of(recipe: Recipe) -> dict[str, tuple[Any, Callable[[Recipe, list[str]], None]]]:
    """The subcommands that make sense for this recipe: what they take, and what they do."""
    stages: dict[str, tuple[Any, Callable[[Recipe, list[str]], None]]] = {
        "prepare": (Prepare, prepare_command),
        "train": (Train, train_command),
        "evaluate": (Evaluate, evaluate_command),
        "predict": (Predict, predict_command),
        "plan": (Plan, plan_command),
        "runs": (Runs, runs_command),
        "stats": (Stats, stats_command),
        "export": (Export, export_command),
    }
    if not isinstance(recipe.sample, str):
        stages = {"sample": (Sample, sample_command), **stages}
    if isinstance(recipe.recall, Recall):
        stages["memory"] = (Remember, memory_command)
    if not recipe.closed:
        stages["chat"] = (Chat, chat_command)
    return stages


# Stages whose work several processes share; all others are the first one's.
_SHARED = {"train", "evaluate", "predict"}


def run_command(recipe: Recipe, given: list[str]) -> None:
    stages = stages_of(recipe)
    if processes.rank() and given and (given[0] in ("-h", "--help") or given[0] in stages.keys() - _SHARED):
        return
    if given and given[0] in ("-h", "--help"):
        print_help(recipe)
    elif not given or given[0].startswith("-"):
        everything(recipe, given)
    elif given[0] in stages:
        stages[given[0]][1](recipe, given[1:])
    else:
        raise UserError(f"{recipe.name} has no stage {given[0]!r}; its stages are {', '.join(stages)}")


def print_help(recipe: Recipe) -> None:
    command = f"python -m recipes.{recipe.name}"
    print(f"{command}: {recipe.title}, base model {recipe.base.hub_id}\n")
    print(f"  {command} [flags of train]\n      All of it: prepare, train, evaluate, and a few answers to look at.")
    for name, (kind, _) in stages_of(recipe).items():
        print(f"  {command} {name} [--help]\n      {(kind.__doc__ or '').strip()}")
    print(f"\npresets: {', '.join(recipe.presets) or 'none'}")


def parse(recipe: Recipe, stage: str, kind: Any, given: list[str], default: Any) -> Any:
    with console.first_alone():
        return tyro.cli(
            kind,
            prog=f"python -m recipes.{recipe.name} {stage}".strip(),
            args=given,
            default=default,
            config=(Flat,),
        )


def preset_for(recipe: Recipe, gpu: Gpu | None) -> str | None:
    """Of the presets named after an amount of GPU memory, the largest that fits this GPU."""
    by_memory = {int(name[:-2]): name for name in recipe.presets if name.endswith("gb") and name[:-2].isdigit()}
    if gpu is None or not by_memory:
        return None
    # A card sold as 12 GB reports a little less than 12 GiB.
    there = round(gpu.memory_bytes / 2**30 + 0.3)
    return by_memory[max((size for size in by_memory if size <= there), default=min(by_memory))]


def settings_in_force(recipe: Recipe, given: list[str]) -> tuple[Settings, str | None]:
    """The recipe's settings under the preset and size that the command line names, or the GPU suggests: these are
    the defaults that --help shows and that single flags override."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset")
    early.add_argument("--auto-preset", action="store_true")
    early.add_argument("--size", default="auto")
    early.add_argument("--weights")
    early.add_argument("--model")
    known, _ = early.parse_known_args(given)
    # A value that tyro will refuse in a moment is none of our business here.
    sound = known.size in ("tiny", "small", "full", "auto") and known.weights in (None, "random", "pretrained")
    full = sound and settle(recipe, known.size, known.weights, known.model).size == "full"
    preset = known.preset
    if preset is None and full:
        preset = planned_preset(recipe) if known.auto_preset else preset_for(recipe, usable_gpu())
    if preset is not None and preset not in recipe.presets:
        raise UserError(f"--preset {preset}: unknown; {recipe.name} has {', '.join(recipe.presets) or 'no presets'}")
    changes = dict(recipe.presets[preset]) if preset is not None else {}
    if sound and not full:
        changes.update(recipe.miniature)
    return replace(recipe.settings, **changes), preset


def sample_command(recipe: Recipe, given: list[str]) -> None:
    args = parse(recipe, "sample", Sample, given, Sample(out=Path(f"{recipe.name}-sample.csv")))
    assert not isinstance(recipe.sample, str)
    try:
        recipe.sample(args.out, rows=args.rows, classes=args.classes, seed=args.seed)
    except (ValueError, OSError) as error:
        raise UserError(f"sample: {error}") from None
    say(f"{args.rows:,} rows in {args.classes} classes -> {args.out}")


def prepare_command(recipe: Recipe, given: list[str]) -> None:
    args = parse(
        recipe,
        "prepare",
        Prepare[type(recipe.options)],  # type: ignore[misc]
        given,
        Prepare(options=recipe.options, seed=recipe.settings.seed),
    )
    chosen = settle(recipe, args.size, args.weights, args.model)
    settings, _ = settings_in_force(recipe, given)
    run = prepare.prepare(
        recipe, args.source, args.options, args.seed, args.run, settings.max_length, tokenizer_file(chosen)
    )
    if args.show:
        with held_back(run.logs / "libraries.log"):
            train.show(recipe, run, chosen, args.show)


def train_command(recipe: Recipe, given: list[str]) -> None:
    with starting_over(recipe, ["train", *given]):
        fine_tune(recipe, parse_train(recipe, "train", given))


def everything(recipe: Recipe, given: list[str]) -> None:
    """prepare, train, evaluate, and a few answers."""
    with starting_over(recipe, given):
        run, chosen, choice, settings = fine_tune(recipe, parse_train(recipe, "", given))
    with held_back(run.logs / "libraries.log"):
        model = loading.load_to_answer(recipe, run, chosen, choice, settings.max_length)
        results = evaluate.evaluate(recipe, run, model, answering(recipe), settings.max_length)
        say(f"test split, {chosen.description}:")
        evaluate.tell(results)
        say("a few answers:")
        for example in train.examples(recipe, run, "test")[:3]:
            evaluate.show_answer(recipe, run, model, example, settings.max_length)
    further = 'predict "…"' if recipe.closed else 'chat, or predict "…"'
    say(f"everything is in {run.path}; next: python -m recipes.{recipe.name} {further}")


def parse_train(recipe: Recipe, stage: str, given: list[str]) -> Any:
    kind: Any = Train[type(recipe.options), type(recipe.balance)]  # type: ignore[misc]
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--resume", action="store_true")
    early.add_argument("--run", type=Path)
    early.add_argument("--preset")
    known, _ = early.parse_known_args(given)
    if not known.resume or {"-h", "--help"} & set(given):
        settings, preset = settings_in_force(recipe, given)
        return parse(recipe, stage, kind, given, Train(recipe.options, recipe.balance, settings, preset=preset))
    # Whatever is not said again is as it was.
    begun = resume.begun(recipe, known.run)
    chosen, settings = begun.chosen, begun.settings
    if known.preset and known.preset != begun.config.get("preset"):
        settings = replace(settings, **recipe.presets.get(known.preset, {}))
    settings = resume.dealt_out(settings, begun.processes, processes.world())
    default = Train(
        recipe.options,
        begun.balance or recipe.balance,
        settings,
        run=begun.run.path,
        preset=begun.config.get("preset"),
        size=chosen.size,
        weights=None if chosen.name != recipe.base.hub_id else chosen.weights,
        model=None if chosen.name == recipe.base.hub_id else chosen.name,
        backend=begun.backend,
    )
    return parse(recipe, stage, kind, given, default)


def answering(recipe: Recipe) -> Any:
    """How answers are made: scored over a closed set, or generated."""
    return Scoring() if recipe.closed else recipe.sampling


def evaluate_command(recipe: Recipe, given: list[str]) -> None:
    default = answering(recipe)
    args = parse(recipe, "evaluate", Evaluate[type(default)], given, Evaluate(default))  # type: ignore[misc]
    if args.cases and not recipe.cases:
        raise UserError(f"evaluate: {recipe.name} has no fixed questions; leave --cases away")
    run, chosen, choice, max_length = loading.open_run(recipe, args.trained.run, args.trained.backend)
    with held_back(run.logs / "libraries.log"):
        model = loading.load_to_answer(recipe, run, chosen, choice, max_length)
        if args.cases:
            evaluate.cases(recipe, run, model, args.answering, max_length)
            return
        evaluate.tell(evaluate.evaluate(recipe, run, model, args.answering, max_length))
    say(f"every answer: {run.path / 'predictions.csv'}")


def predict_command(recipe: Recipe, given: list[str]) -> None:
    default = answering(recipe)
    kind: Any = Predict[type(default), type(recipe.recall)]  # type: ignore[misc]
    args = parse(recipe, "predict", kind, given, Predict(default, recipe.recall, text_column=recipe.text_column))
    if (args.file is None) != (args.out is None):
        raise UserError("predict: --file and --out go together: the rows to answer, and where the answers go")
    if args.file is None and processes.launched():
        raise UserError(
            "predict: several processes share the rows of a --file; a text is answered by one, with python -m"
        )
    if args.speed and recipe.closed:
        raise UserError(f"predict --speed: {recipe.name} generates nothing; see python -m bench classify")
    if args.file is not None and args.text is not None:
        raise UserError("predict: give a text or --file, not both")
    questions = predict.texts(args.text) if args.file is None and not args.speed else ()
    run, chosen, choice, max_length = loading.open_run(recipe, args.trained.run, args.trained.backend)
    with held_back(run.logs / "libraries.log"):
        model = loading.load_to_answer(recipe, run, chosen, choice, max_length)
        if args.speed:
            asked = [args.text] if args.text else [example.text for example in prepare.sample_examples(recipe)[:5]]
            predict.tell_speed(recipe, model, asked, args.answering, max_length)
            return
        names, answer = predict.answerer(recipe, run, model, args.answering, max_length, args.recall)
        if args.file is None:
            sampling = args.answering if isinstance(args.answering, Sampling) else recipe.sampling
            predict.to_terminal(recipe, answer, questions, sampling.batch_size)
        else:
            order = predict.made_with(run, args.answering, choice.dtype)
            rows = predict.to_file(args.file, args.out, args.text_column, names, answer, order)
            say(f"{rows:,} rows -> {args.out}")


def stats_command(recipe: Recipe, given: list[str]) -> None:
    kind: Any = Stats[type(recipe.options)]  # type: ignore[misc]
    args = parse(recipe, "stats", kind, given, Stats(recipe.options))
    chosen = settle(recipe, args.size, args.weights, args.model)
    settings, _ = settings_in_force(recipe, given)
    with tempfile.TemporaryDirectory() as folder, held_back(Path(folder) / "libraries.log"):
        ensure_files(recipe, chosen)
        stats.stats(recipe, args.source, args.options, load_tokenizer(recipe, chosen.source), settings.max_length)


def memory_command(recipe: Recipe, given: list[str]) -> None:
    args = parse(recipe, "memory", Remember, given, Remember(recipe.recall))
    if args.recall.memory is None:
        raise UserError(
            "memory: name the file with --memory FILE, a line per item, as in [오늘 일정: 친구랑 카페 방문]"
        )
    memory = Memory.of(args.recall)
    for question in args.test or [example.text for example in prepare.sample_examples(recipe)[:10]]:
        say(question)
        for place, (score, item) in enumerate(memory.ranked(question)[:5]):
            used = "  <- put before the question" if not place and score >= args.recall.memory_threshold else ""
            say(f"  {score:.2f}  {item}{used}")


def plan_command(recipe: Recipe, given: list[str]) -> None:
    settings, preset = settings_in_force(recipe, [*given, "--size", "full"])
    kind: Any = Plan[type(recipe.options)]  # type: ignore[misc]
    args = parse(recipe, "plan", kind, given, Plan(recipe.options, settings, preset=preset))
    here = read_gpu()
    gpus = [plan.card(name) for name in args.gpu] or ([here] if here else [plan.card(name) for name in USUAL])
    with tempfile.TemporaryDirectory() as folder, held_back(Path(folder) / "libraries.log"):
        if args.presets:
            tell_presets(recipe, args.settings, gpus, args.json)
            return
        data = plan_data.count(recipe, args.options, args.source, args.run, args.rows, args.settings.max_length)
        planned = plan.plan(recipe, args.settings, data.rows)
        speeds = {} if args.gpu else speed_here(recipe, args.settings, here)
        found = plan_report.as_json(recipe, args.settings, planned, data, gpus, speeds)
        if args.gpus != 1:
            found["several"] = plan_sharded.as_json(recipe, args.settings, data.rows, gpus, args.gpus, found["seconds"])
        if args.json:
            say(json.dumps(found, ensure_ascii=False))
        else:
            plan_report.tell(found, args.settings)
            if args.gpus != 1:
                plan_sharded.tell(found["several"], args.settings)


def speed_here(recipe: Recipe, settings: Settings, gpu: Gpu | None) -> dict[str, float]:
    """What this machine reaches in a large matrix product."""
    if gpu is None:
        narrow = settings.dtype in ("auto", "bfloat16") and cpu.bfloat16() is not None
        return {"this CPU": pace.matmul_flops_per_second("bfloat16" if narrow else "float32", "cpu")}
    return {gpu.name: pace.matmul_flops_per_second(plan.choice_for(recipe, settings, gpu).dtype, "cuda")}


def tell_presets(recipe: Recipe, settings: Settings, gpus: Sequence[Gpu], as_json: bool) -> None:
    fits = {gpu.name: plan.presets(recipe, settings, gpu) for gpu in gpus}
    if as_json:
        say(json.dumps(fits))
        return
    for card, verdicts in fits.items():
        say(f"{card}: " + (", ".join(f"{name} {told}" for name, told in verdicts.items()) or "there are no presets"))


def planned_preset(recipe: Recipe) -> str:
    """Of the recipe's presets the best that fits this GPU. Asked for in a process of its own: plan loads libraries that
    a backend has to precede."""
    if read_gpu() is None or not recipe.presets:
        why = "there is no GPU here" if recipe.presets else f"{recipe.name} has no presets"
        raise UserError(f"--auto-preset: {why}; leave it away")
    command = [sys.executable, "-m", f"recipes.{recipe.name}", "plan", "--presets", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=processes.alone())
    if done.returncode:
        raise UserError(f"--auto-preset: plan failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    [verdicts] = json.loads(done.stdout).values()
    fitting = [name for name, told in verdicts.items() if told == "fits"]
    if not fitting:
        raise UserError(f"--auto-preset: no preset fits this GPU; see python -m recipes.{recipe.name} plan")
    return fitting[0]


def export_command(recipe: Recipe, given: list[str]) -> None:
    kinds: dict[str, tuple[Any, Callable[[Recipe, Any], None]]] = {
        "merged": (ExportMerged, export_merged),
        "ollama": (ExportOllama, export_ollama),
        "gguf": (ExportGguf, export_gguf),
        "hub": (ExportHub, export_hub),
    }
    command = f"python -m recipes.{recipe.name} export"
    if given and given[0] in ("-h", "--help"):
        for name, (kind, _) in kinds.items():
            say(f"  {command} {name} [--help]\n      {(kind.__doc__ or '').strip()}")
        return
    if not given or given[0] not in kinds:
        what = f"{given[0]!r} is not known" if given else "it wants to know what to write"
        raise UserError(f"export: {what}; name one of {', '.join(kinds)}, as in {command} merged")
    kind, do = kinds[given[0]]
    do(recipe, parse(recipe, f"export {given[0]}", kind, given[1:], None))


def export_merged(recipe: Recipe, args: ExportMerged) -> None:
    source = export.open_source(recipe, args.run)
    with held_back(source.run.logs / "libraries.log"):
        export.merged(source, args.out)


def export_ollama(recipe: Recipe, args: ExportOllama) -> None:
    source = export.open_source(recipe, args.run)
    with held_back(source.run.logs / "libraries.log"):
        folder = export.merged(source, args.out, "ollama", partial(modelfile.write, source))
    for shortcoming in modelfile.shortcomings(folder):
        say(shortcoming)
    missing = "" if shutil.which("ollama") else ", where ollama is installed, which it is not here"
    say(f"{folder / 'Modelfile'} is written; next{missing}:")
    for command in modelfile.next_commands(source, folder):
        say(f"  {command}")


def export_gguf(recipe: Recipe, args: ExportGguf) -> None:
    source = export.open_source(recipe, args.run)
    with held_back(source.run.logs / "libraries.log"):
        gguf_file.write(source, args.out, args.type, args.llama_cpp)


def export_hub(recipe: Recipe, args: ExportHub) -> None:
    source = export.open_source(recipe, args.run)
    with held_back(source.run.logs / "libraries.log"):
        hub.upload(source, args.to, args.public, args.merged, args.yes)


def runs_command(recipe: Recipe, given: list[str]) -> None:
    args = parse(recipe, "runs", Runs, given, Runs())
    lines = history.lines_of(recipe)
    if args.json:
        say(json.dumps(lines, ensure_ascii=False))
    else:
        say(history.table(lines) if lines else f"no runs of {recipe.name} yet")


def chat_command(recipe: Recipe, given: list[str]) -> None:
    kind: Any = Chat[type(recipe.recall)]  # type: ignore[misc]
    args = parse(recipe, "chat", kind, given, Chat(recipe.sampling, recipe.recall))
    run, chosen, choice, max_length = loading.open_run(recipe, args.trained.run, args.trained.backend)
    with held_back(run.logs / "libraries.log"):
        model = loading.load_to_answer(recipe, run, chosen, choice, max_length)
        chat.chat(recipe, run, model, args.sampling, max_length, args.recall)
