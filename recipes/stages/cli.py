"""main(RECIPE): stages become subcommands. Loads no torch, so that --help answers at once."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NoReturn, TypeVar

import tyro

from fallback.choose import Backend, CannotRun, Choice, choose
from recipes.stages import chat, evaluate, predict, prepare, train
from recipes.stages.base_model import Chosen, model_type, published_config, settle
from recipes.stages.classifier import Scoring
from recipes.stages.console import held_back, say
from recipes.stages.recipe import Recipe, Sampling, Settings, UserError
from recipes.stages.run import Run, environment, read_json, write_json

Options = TypeVar("Options")
Balancing = TypeVar("Balancing")
Answering = TypeVar("Answering", Sampling, Scoring)
Flat = tyro.conf.OmitArgPrefixes


@dataclass(frozen=True)
class Prepare(Generic[Options]):
    """Clean and split a source file into a new run's data/."""

    options: Options
    source: Path | None = None
    """Your data; without it the recipe's own sample."""
    run: Path | None = None
    """Folder of the run; a new one under runs/ if not given."""
    seed: int = 42
    """Seeds the split."""
    show: int = 0
    """Print this many examples as the model will see them, and which of their tokens carry loss."""
    size: Literal["auto", "tiny", "small", "full"] = "auto"
    """Whose tokenizer --show uses."""
    weights: Literal["pretrained", "random"] | None = None
    """As for train."""
    model: str | None = None
    """As for train."""


@dataclass(frozen=True)
class Train(Generic[Options, Balancing]):
    """Fine-tune. Prepares the data first, unless --run names a prepared run."""

    options: Options
    balance: Balancing
    settings: Settings
    source: Path | None = None
    """Your data; without it the recipe's own sample."""
    run: Path | None = None
    """Folder of the run; a new one under runs/ if not given."""
    preset: str | None = None
    """A named set of settings; flags given beside it override it."""
    size: Literal["auto", "tiny", "small", "full"] = "auto"
    """full is the real model; tiny and small are the same architecture, shrunk, with random weights; auto takes full
    where there is a CUDA GPU and the weights are at hand, else tiny."""
    weights: Literal["pretrained", "random"] | None = None
    """pretrained loads the published weights (only at full size), random makes new ones."""
    model: str | None = None
    """Another base model, by hub id or folder."""
    backend: Backend = "auto"
    """auto takes Unsloth where it runs and steps down to plain PEFT where not, and says why."""


@dataclass(frozen=True)
class Trained:
    """Which run answers, and with what."""

    run: Path | None = None
    """Folder of the run; the newest trained one if not given."""
    backend: Backend = "auto"
    """auto takes the backend that trained the run, where it can run."""


@dataclass(frozen=True)
class Evaluate(Generic[Answering]):
    """Answer the test split and score the answers."""

    answering: Answering
    trained: Trained = Trained()


@dataclass(frozen=True)
class Predict(Generic[Answering]):
    """Answer one text, every row of a file, or every line of standard input."""

    answering: Answering
    text: Annotated[str | None, tyro.conf.Positional] = None
    """The text to answer; without it they are read from standard input."""
    file: Path | None = None
    """CSV file whose rows are to be answered."""
    out: Path | None = None
    """Where they go, with the answers; the same command again continues after an interruption."""
    text_column: str = ""
    """Column of the file that holds the text."""
    trained: Trained = Trained()


@dataclass(frozen=True)
class Chat:
    """Talk to the model."""

    sampling: Sampling
    trained: Trained = Trained()


def main(recipe: Recipe, arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of every recipe."""
    as_command(lambda given: run_command(recipe, given), sys.argv[1:] if arguments is None else arguments)


def as_command(do: Callable[[list[str]], None], arguments: Sequence[str]) -> NoReturn:
    """Ends the process; what the user can mend is one line on standard error."""
    try:
        do(list(arguments))
    except (UserError, CannotRun) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; what was finished before is kept", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    sys.exit(0)


def run_command(recipe: Recipe, given: list[str]) -> None:
    stages: dict[str, Callable[[Recipe, list[str]], None]] = {
        "prepare": prepare_command,
        "train": train_command,
        "evaluate": evaluate_command,
        "predict": predict_command,
        "chat": chat_command,
    }
    if given and given[0] in ("-h", "--help"):
        print_help(recipe)
    elif not given or given[0].startswith("-"):
        everything(recipe, given)
    elif given[0] in stages:
        stages[given[0]](recipe, given[1:])
    else:
        raise UserError(f"no stage {given[0]!r}; the stages are {', '.join(stages)}")


def print_help(recipe: Recipe) -> None:
    command = f"python -m recipes.{recipe.name}"
    stages = {"prepare": Prepare, "train": Train, "evaluate": Evaluate, "predict": Predict, "chat": Chat}
    print(f"{command}: {recipe.title}, base model {recipe.base.hub_id}\n")
    print(f"  {command} [flags of train]\n      All of it: prepare, train, evaluate, and a few answers to look at.")
    for name, stage in stages.items():
        print(f"  {command} {name} [--help]\n      {(stage.__doc__ or '').strip()}")
    print(f"\npresets: {', '.join(recipe.presets) or 'none'}")


def parse(recipe: Recipe, stage: str, kind: Any, given: list[str], default: Any) -> Any:
    return tyro.cli(
        kind,
        prog=f"python -m recipes.{recipe.name} {stage}".strip(),
        args=given,
        default=default,
        config=(Flat, tyro.conf.FlagConversionOff),
    )


def settings_in_force(recipe: Recipe, given: list[str]) -> Settings:
    """The recipe's settings under the preset and size that the command line names: these are the defaults that
    --help shows and that single flags override."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset")
    early.add_argument("--size", default="auto")
    early.add_argument("--weights")
    early.add_argument("--model")
    known, _ = early.parse_known_args(given)
    changes: dict[str, Any] = {}
    if known.preset is not None:
        if known.preset not in recipe.presets:
            raise UserError(
                f"--preset {known.preset}: unknown; {recipe.name} has {', '.join(recipe.presets) or 'no presets'}"
            )
        changes.update(recipe.presets[known.preset])
    # A value that tyro will refuse in a moment is none of our business here.
    sound = known.size in ("tiny", "small", "full", "auto") and known.weights in (None, "random", "pretrained")
    if sound and settle(recipe, known.size, known.weights, known.model).size != "full":
        changes.update(recipe.miniature)
    return replace(recipe.settings, **changes)


def prepare_command(recipe: Recipe, given: list[str]) -> None:
    args = parse(
        recipe,
        "prepare",
        Prepare[type(recipe.options)],  # type: ignore[misc]
        given,
        Prepare(options=recipe.options, seed=recipe.settings.seed),
    )
    chosen = settle(recipe, args.size, args.weights, args.model)
    run = prepare.prepare(recipe, args.source, args.options, args.seed, args.run)
    if args.show:
        with held_back(run.logs / "libraries.log"):
            train.show(recipe, run, chosen, args.show)


def train_command(recipe: Recipe, given: list[str]) -> None:
    fine_tune(recipe, parse_train(recipe, "train", given))


def everything(recipe: Recipe, given: list[str]) -> None:
    """prepare, train, evaluate, and a few answers."""
    run, chosen, choice, settings = fine_tune(recipe, parse_train(recipe, "", given))
    with held_back(run.logs / "libraries.log"):
        model = train.load_trained(recipe, run, chosen, choice, settings.max_length)
        results = evaluate.evaluate(recipe, run, model, answering(recipe), settings.max_length)
        say(f"test split, {chosen.description}:")
        evaluate.tell(results)
        say("a few answers:")
        for example in train.examples(recipe, run, "test")[:3]:
            evaluate.show_answer(recipe, run, model, example, settings.max_length)
    say(f'everything is in {run.path}; next: python -m recipes.{recipe.name} chat, or predict "…"')


def parse_train(recipe: Recipe, stage: str, given: list[str]) -> Any:
    settings = settings_in_force(recipe, given)
    kind: Any = Train[type(recipe.options), type(recipe.balance)]  # type: ignore[misc]
    return parse(recipe, stage, kind, given, Train(recipe.options, recipe.balance, settings))


def fine_tune(recipe: Recipe, args: Any) -> tuple[Run, Chosen, Choice, Settings]:
    """Every decision first, then the data, then the training; nothing is written before the decisions stand."""
    chosen = settle(recipe, args.size, args.weights, args.model)
    settings: Settings = args.settings
    say(f"{recipe.name}, size {chosen.size}: {chosen.description}")
    if chosen.weights == "pretrained":
        published_config(chosen)
    choice = choose(model_type(recipe, chosen), args.backend, settings.quantization, settings.optimizer)
    say(f"backend {choice.backend}: {choice.reasons['backend']}")
    if args.run is not None and Run(args.run).prepared and args.source is None:
        run = Run(args.run)
        prepare.tell(run, read_json(run.data / "metadata.json"))
    else:
        run = prepare.prepare(recipe, args.source, args.options, settings.seed, args.run)
    write_json(run.path / "environment.json", environment())
    train.record_choice(run, settings, chosen, choice, args.balance)
    with held_back(run.logs / "libraries.log"):
        metrics = train.train(recipe, run, settings, chosen, choice, args.balance)
        run.add_metrics(base_model=asdict(chosen), train=metrics)
        say(
            f"loss {metrics['first_loss']:.3f} -> {metrics['final_loss']:.3f} in {metrics['train_seconds']:.0f} s; "
            f"adapter in {run.adapter}"
        )
    return run, chosen, choice, settings


def answering(recipe: Recipe) -> Any:
    """How answers are made: scored over a closed set, or generated."""
    return Scoring() if recipe.closed else recipe.sampling


def evaluate_command(recipe: Recipe, given: list[str]) -> None:
    default = answering(recipe)
    args = parse(recipe, "evaluate", Evaluate[type(default)], given, Evaluate(default))  # type: ignore[misc]
    run, chosen, choice, max_length = train.open_run(recipe, args.trained.run, args.trained.backend)
    with held_back(run.logs / "libraries.log"):
        model = train.load_trained(recipe, run, chosen, choice, max_length)
        evaluate.tell(evaluate.evaluate(recipe, run, model, args.answering, max_length))
    say(f"every answer: {run.path / 'predictions.csv'}")


def predict_command(recipe: Recipe, given: list[str]) -> None:
    default = answering(recipe)
    kind: Any = Predict[type(default)]  # type: ignore[misc]
    args = parse(recipe, "predict", kind, given, Predict(default, text_column=recipe.text_column))
    if (args.file is None) != (args.out is None):
        raise UserError("predict: --file and --out go together: the rows to answer, and where the answers go")
    if args.file is not None and args.text is not None:
        raise UserError("predict: give a text or --file, not both")
    questions = predict.texts(args.text) if args.file is None else ()
    run, chosen, choice, max_length = train.open_run(recipe, args.trained.run, args.trained.backend)
    with held_back(run.logs / "libraries.log"):
        model = train.load_trained(recipe, run, chosen, choice, max_length)
        names, answer = predict.answerer(recipe, run, model, args.answering, max_length)
        if args.file is None:
            predict.to_terminal(recipe, answer, questions, recipe.sampling.batch_size)
        else:
            order = predict.made_with(run, args.answering)
            rows = predict.to_file(args.file, args.out, args.text_column, names, answer, order)
            say(f"{rows:,} rows -> {args.out}")


def chat_command(recipe: Recipe, given: list[str]) -> None:
    args = parse(recipe, "chat", Chat, given, Chat(sampling=recipe.sampling))
    run, chosen, choice, max_length = train.open_run(recipe, args.trained.run, args.trained.backend)
    with held_back(run.logs / "libraries.log"):
        model = train.load_trained(recipe, run, chosen, choice, max_length)
        chat.chat(recipe, model, args.sampling, max_length)
