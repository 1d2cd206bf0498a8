"""How fast payments are classified, taking turns in one process over the same texts.

(a) one at a time with generate() and a regular expression, as most scripts do it; (b) the same in batches;
(c) the probability of every code, over the tree of codes: what predict does; (d) the bound: one forward over the
texts' own tokens and nothing else; (e) the least: the same with the end of each prompt, and the tokens of its code but
the last, which nobody can do without who wants to know how probable the likeliest code is.
"""

import csv
import re
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import tyro

from bench.report import deliver
from bench.turns import seconds_each
from fallback import leave_out
from fallback.choose import Backend, Dtype, choose
from recipes.gemma3_12b_opercode import RECIPE
from recipes.samples.payments import payments
from recipes.stages import loading, prepare, train
from recipes.stages.base_model import Chosen, Size, model_type, settle
from recipes.stages.classifier import Known
from recipes.stages.console import held_back, say
from recipes.stages.fine_tune import in_bfloat16
from recipes.stages.recipe import Balance
from recipes.stages.run import Run, environment


@dataclass(frozen=True)
class Classify:
    """Measure payments per second."""

    run: Path | None = None
    """A trained run to answer with; without it a model of --size is trained for --steps steps first."""
    size: Size = "small"
    """Size of the model to train."""
    steps: int = 300
    """Steps to train it for: an untrained model does not end its answers, and its probabilities lie everywhere."""
    backend: Backend = "peft"
    """Backend of training and answering."""
    dtype: Dtype = "auto"
    """What both are computed in; a trained run says so itself."""
    classes: int = 86
    """Codes of the training file."""
    texts: int = 256
    """Payments answered in batches; one at a time an eighth of them."""
    repeats: int = 5
    """Rounds; every round measures every way once."""
    batch_tokens: int | None = None
    """As for predict."""
    out: Path | None = None
    """Also write the figures to this JSON file."""
    json: bool = False
    """Print the figures as JSON."""


def main(arguments: list[str]) -> None:
    args = tyro.cli(Classify, prog="python -m bench classify", args=arguments)
    with tempfile.TemporaryDirectory(prefix="bench-classify-") as folder:
        run = Run(args.run) if args.run else trained(args, Path(folder))
        opened, chosen, choice, max_length = loading.open_run(RECIPE, run.path, args.backend)
        with held_back(Path(folder) / "libraries.log"):
            model = loading.load_to_answer(RECIPE, opened, chosen, choice, max_length)
            found = measure(args, model, opened, max_length)
    medians = {name: median(rates) for name, rates in found["payments_per_second"].items()}
    rounds = list(zip(*found["payments_per_second"].values(), strict=True))
    summary: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "bench", "classify", *arguments]),
        "environment": environment(),
        "model": chosen.description,
        "backend": choice.backend,
        "dtype": choice.dtype,
        "payments_per_second": medians,
        "ratio_to_one_at_a_time": median(r[2] / r[0] for r in rounds),
        "ratio_to_batched": median(r[2] / r[1] for r in rounds),
        "ratio_to_bound": median(r[2] / r[3] for r in rounds),
        "ratio_to_least": median(r[2] / r[4] for r in rounds),
        **{name: value for name, value in found.items() if name != "payments_per_second"},
        "rounds": found["payments_per_second"],
    }
    if deliver(summary, args.out, args.json):
        return
    told = f"{chosen.description}, {choice.dtype}"
    say(f"{told}; {args.texts} payments, {summary['own_tokens']:.0f} own tokens each")
    labels = (
        "a  one at a time, generate()", "b  batched generate()", "c  over the tree of codes", "d  the bound",
        "e  the least",
    )  # fmt: skip
    for label, (name, rate) in zip(labels, medians.items(), strict=True):
        valid = summary["valid"].get(name)
        say(f"  {label:<30} {rate:8.1f} payments/s" + (f"   {valid:.0%} valid codes" if valid is not None else ""))
    say(
        f"c is {summary['ratio_to_one_at_a_time']:.1f} x a, {summary['ratio_to_batched']:.2f} x b, "
        f"{summary['ratio_to_bound']:.2f} x d, {summary['ratio_to_least']:.2f} x e; {summary['expansions']:.1f} "
        "branches looked into per payment"
    )
    say(f"medians of {args.repeats} rounds; ratios are medians of the rounds' ratios")


def known_payments(args: Classify) -> list[tuple[str, str]]:
    return list(payments(max(args.texts, 3 * args.classes), args.classes, seed=1))


def trained(args: Classify, folder: Path) -> Run:
    """A model that knows the payments by heart, and so is as sure of them as a good one is of new ones: how much of
    the tree has to be walked depends on that, and nothing else about speed does. Every payment stands in the file
    three times, so that the validation split knows it too."""
    with (folder / "payments.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["PaymentComment", "OperCode"])
        table.writerows(known_payments(args) * 3)
    chosen: Chosen = settle(RECIPE, args.size, "random")
    settings = replace(RECIPE.settings, **{**RECIPE.miniature, "max_steps": args.steps, "dtype": args.dtype})
    choice = choose(
        model_type(RECIPE, chosen), args.backend, settings.quantization, settings.optimizer, dtype=settings.dtype,
        large=in_bfloat16(chosen, None),
    )  # fmt: skip
    options = replace(RECIPE.options, min_samples_per_class=1, allow_leak=True)
    run = prepare.prepare(RECIPE, folder / "payments.csv", options, 0, folder / "run", quiet=True)
    train.record(run, train.decisions(run, settings, chosen, RECIPE.balance), choice)
    assert isinstance(RECIPE.balance, Balance)
    with held_back(run.logs / "libraries.log"):
        train.train(RECIPE, run, settings, chosen, choice, replace(RECIPE.balance, eval_rows=100))
    leave_out.let_go()
    return run


def measure(args: Classify, model: loading.Model, run: Run, max_length: int) -> dict[str, Any]:
    import torch

    from recipes.stages.contexts import Context, beginning
    from recipes.stages.generation import batches, by_library
    from recipes.stages.scoring import Codes, affordable_tokens, score

    codes = Codes(model.renderer, Known.of(run).train_rows)
    texts = [text for text, _ in known_payments(args)[: args.texts]]
    prompts = [RECIPE.ask(text) for text in texts]
    names = set(codes.names)
    own = sorted(
        (model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts), key=len, reverse=True
    )
    encoded = model.renderer.prompts(prompts, max_length)
    valid: dict[str, float] = {}
    expansions: list[int] = []
    likeliest: list[int] = []

    def generated(some: Sequence[Any]) -> list[str]:
        encoded = model.renderer.prompts(some, max_length)
        answers = [""] * len(some)
        for batch in batches(encoded, RECIPE.sampling, affordable_tokens(model.network)):
            made = by_library(model, [encoded[i] for i in batch], RECIPE.sampling, RECIPE.stop)
            for i, tokens in zip(batch, made, strict=True):
                answers[i] = model.tokenizer.decode(tokens, skip_special_tokens=True)
        return answers

    def share_valid(answers: Sequence[str]) -> float:
        found = [re.search(r"\d{4,6}", answer) for answer in answers]
        return sum(code is not None and code.group() in names for code in found) / len(found)

    def one_at_a_time() -> int:
        some = prompts[:: max(1, len(prompts) // max(1, args.texts // 8))]
        valid["one_at_a_time"] = share_valid([generated([prompt])[0] for prompt in some])
        return len(some)

    def batched() -> int:
        valid["batched"] = share_valid(generated(prompts))
        return len(prompts)

    def tree() -> int:
        scores = score(model, codes, prompts, max_length, batch_tokens=args.batch_tokens)
        expansions.append(scores.expansions)
        likeliest[:] = scores.log_p.argmax(1).tolist()
        valid["tree"] = sum(codes.names[i] in names for i in likeliest) / len(prompts)
        return len(prompts)

    def bound() -> int:
        with torch.inference_mode():
            Context(model.network, len(own), len(own[0])).read_texts(own)
        wait()
        return len(own)

    def least() -> int:
        with torch.inference_mode():
            shared = beginning(model.network, encoded)
            start = shared.positions.shape[1]
            pairs = zip(encoded, likeliest, strict=True)
            texts = sorted((text[start:] + codes.answers[code][:-1] for text, code in pairs), key=len, reverse=True)
            context = Context(model.network, len(texts), start + len(texts[0]))
            context.begin_with(shared)
            context.read_texts(texts)
        wait()
        return len(texts)

    def wait() -> None:
        if model.network.device.type == "cuda":
            torch.cuda.synchronize()

    ways: dict[str, Callable[[], int]] = {
        "one_at_a_time": one_at_a_time, "batched": batched, "tree": tree, "bound": bound,
        "least": least,
    }  # fmt: skip
    seconds = seconds_each(ways, args.repeats)
    return {
        "payments_per_second": {name: [1 / each for each in rounds] for name, rounds in seconds.items()},
        "valid": valid,
        "own_tokens": sum(map(len, own)) / len(own),
        "prompt_tokens": _mean([len(model.renderer.prompt(prompt)) for prompt in prompts]),
        "expansions": expansions[-1] / len(texts),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
