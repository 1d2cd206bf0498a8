"""How many answers a second a chat recipe gives: generate() in a loop, as most scripts do it, and what evaluate and
predict do, taking turns in one process; the loop answers every fourth question only. Both take the likeliest token, so
that the answers are the same, but where two are as likely as each other to the precision that is computed in.
"""

import importlib
import shlex
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import tyro

from bench.recipes import NAMES
from bench.report import deliver, said
from bench.statistics import paired_ratio
from bench.turns import seconds_each
from fallback.choose import Backend, Dtype
from recipes.stages import cli, fine_tune, loading, train
from recipes.stages.base_model import Size
from recipes.stages.console import held_back, say
from recipes.stages.recipe import Recipe, UserError
from recipes.stages.run import environment

_ONE_IN = 4


@dataclass(frozen=True)
class Answers:
    """Measure answers per second."""

    recipe: str = "llama_1b_civil"
    """A recipe that answers in its own words."""
    run: Path | None = None
    """A trained run to answer with; without it a model of --size is trained for --steps steps first."""
    size: Size = "small"
    """Size of the model to train."""
    steps: int = 150
    """Steps to train it for: an untrained model does not end its answers."""
    backend: Backend = "peft"
    """Backend of training and answering."""
    dtype: Dtype = "auto"
    """What both are computed in; a trained run says so itself."""
    questions: int = 60
    """Questions that are answered together, as far as the sample has them; a quarter of them one at a time, too."""
    repeats: int = 6
    """Rounds; every round measures both ways once."""
    out: Path | None = None
    """Also write the figures to this JSON file."""
    json: bool = False
    """Print the figures as JSON."""


def main(arguments: list[str]) -> None:
    args = tyro.cli(Answers, prog="python -m bench answers", args=arguments)
    if args.recipe not in NAMES:
        raise UserError(f"--recipe {args.recipe}: not known; there are {', '.join(NAMES)}")
    recipe = importlib.import_module(f"recipes.{args.recipe}").RECIPE
    if args.questions < 1 or args.repeats < 1:
        raise UserError("--questions and --repeats: one at least of each")
    if recipe.closed:
        raise UserError(f"--recipe {args.recipe}: it generates nothing; see python -m bench classify")
    with tempfile.TemporaryDirectory(prefix="bench-answers-") as folder:
        run = args.run or trained(args, recipe, Path(folder) / "run")
        opened, chosen, choice, max_length = loading.open_run(recipe, run, args.backend)
        with held_back(Path(folder) / "libraries.log"):
            model = loading.load_to_answer(recipe, opened, chosen, choice, max_length)
            found = measure(args, recipe, model, opened, max_length)
    ratio = paired_ratio(found["seconds_each"]["loop"], found["seconds_each"]["ours"])
    summary: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "bench", "answers", *arguments]),
        "environment": environment(),
        "recipe": recipe.name,
        "model": chosen.description,
        "backend": choice.backend,
        "dtype": choice.dtype,
        "answers_per_second": {way: 1 / median(seconds) for way, seconds in found["seconds_each"].items()},
        "ratio_to_loop": asdict(ratio),
        **found,
    }
    if deliver(summary, args.out, args.json):
        return
    asked = f"{found['questions']} questions, {found['questions_in_loop']} of them in the loop"
    say(f"{chosen.description}, {choice.dtype}; {asked}, {found['tokens']:.0f} tokens in an answer, greedy")
    for way, what in (("loop", "generate() in a loop"), ("ours", f"at most {recipe.sampling.batch_size} at a time")):
        say(f"  {what:<24} {summary['answers_per_second'][way]:8.2f} answers/s")
    say(
        f"{said(summary['ratio_to_loop'])}; {found['same']:.0%} of the answers are the same, {found['stopped']:.0%} "
        "ended by themselves"
    )


def trained(args: Answers, recipe: Recipe, folder: Path) -> Path:
    flags = ["--size", args.size, "--weights", "random", "--backend", args.backend, "--max-steps", str(args.steps)]
    flags += ["--dtype", args.dtype, "--early-stopping", "off", "--run", str(folder)]
    fine_tune.fine_tune(recipe, cli.parse_train(recipe, "train", flags))
    return folder


def measure(args: Answers, recipe: Recipe, model: loading.Model, run: Any, max_length: int) -> dict[str, Any]:
    import torch

    from recipes.stages.generation import before_stop, configuration, generate

    sampling = replace(recipe.sampling, temperature=0.0)
    examples = [e for split in ("test", "val", "train") for e in train.examples(recipe, run, split)][: args.questions]
    prompts = [example.prompt for example in examples]
    some = slice(0, None, _ONE_IN)
    looped: list[str] = []

    def loop() -> int:
        looped.clear()
        how = configuration(model, sampling)
        how.stop_strings = list(recipe.stop) or None
        for prompt in prompts[some]:
            ids = torch.tensor([model.renderer.prompt(prompt, max_length)], device=model.network.device)
            with torch.inference_mode():
                made = model.network.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how, tokenizer=model.tokenizer
                )
            text = model.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
            looped.append(before_stop(text, recipe.stop)[0].strip())
        return len(looped)

    answered: list[Any] = []

    def ours() -> int:
        answered[:] = generate(model, prompts, sampling, recipe.stop, max_length)
        return len(prompts)

    seconds = seconds_each({"loop": loop, "ours": ours}, args.repeats)
    return {
        "questions": len(prompts),
        "questions_in_loop": len(looped),
        "tokens": mean(answer.tokens for answer in answered),
        "stopped": mean(answer.stopped for answer in answered),
        "same": mean(a == b for a, b in zip(looped, [answer.text for answer in answered[some]], strict=True)),
        "seconds_each": seconds,
    }
