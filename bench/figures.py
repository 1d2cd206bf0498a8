"""The tables and the picture in README, made from the files under results/: python -m bench figures.

A table stands between <!-- figures: NAME --> and <!-- end -->; what is between them is never written by hand.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import tyro

from bench import report, soak, train
from bench.prepare import WRITERS
from bench.recipes import table
from bench.statistics import RATIO_LEVEL
from recipes.stages.console import say
from recipes.stages.recipe import UserError
from recipes.stages.run import read_json, replacing, write_whole

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
FILES = (ROOT / "README.md", ROOT / "docs" / "reliability.md")
REFERENCE = RESULTS / "cpu-2core"
PICTURE = REFERENCE / "compare.png"


@dataclass(frozen=True)
class Figures:
    """Write README's and docs' tables and picture again."""

    check: bool = False
    """Only say whether they are what results/ says; exit with an error if they are not."""


def main(arguments: list[str]) -> None:
    args = tyro.cli(Figures, prog="python -m bench figures", args=arguments)
    for file in FILES:
        now = file.read_text(encoding="utf-8")
        filled = fill(now)
        if args.check and filled != now:
            raise UserError(f"{file.name} is not what results/ says; write it with python -m bench figures")
        if filled != now:
            write_whole(file, filled)
    if args.check:
        return
    if REFERENCE.is_dir():
        picture(read_json(REFERENCE / "summary.json"), PICTURE)
    say(f"{' and '.join(file.name for file in FILES)}: {', '.join(TABLES)}")


def fill(text: str) -> str:
    """The text with every table in place."""

    def one(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in TABLES:
            raise UserError(f"there is no table {name!r}; there are {', '.join(TABLES)}")
        return f"<!-- figures: {name} -->\n{TABLES[name]()}\n<!-- end -->"

    return re.sub(r"<!-- figures: (\w+) -->\n.*?<!-- end -->", one, text, flags=re.S)


def balance() -> str:
    def cell(of: dict[str, float]) -> str:
        return f"{of['mean']:.3f} [{of['low']:.3f}, {of['high']:.3f}]"

    ways = read_json(RESULTS / "balance" / "summary.json")["ways"]
    lines = []
    for way in sorted(ways, key=lambda way: -way["f1_macro"]["mean"]):
        name = way["way"] + " (default)" * (way["way"] == "sqrt sampler")
        lines.append([name, *(cell(way[score]) for score in ("f1_macro", "accuracy", "rare_recall"))])
    return report.markdown(["way", "macro F1", "accuracy", "recall of the rarer half"], lines)


def by_precision(name: str) -> dict[str, Any]:
    return {"bfloat16": read_json(RESULTS / f"{name}_bfloat16.json"), "float32": read_json(RESULTS / f"{name}.json")}


def made_by(found: dict[str, Any]) -> str:
    env = found["environment"]
    return f"{found['dtype']}, {env['processor']}, {env['cores']} cores: `{found['command']}`"


def classify() -> str:
    found = by_precision("classify")
    named = {
        "one_at_a_time": "one at a time with generate() and a regular expression",
        "batched": "batched generate()",
        "tree": "over the tree of codes, with every probability",
        "least": "the payments, the end of each prompt and the likeliest code, read once",
        "bound": "the bound: one forward pass over the payments' own tokens",
    }
    lines = [
        [
            what,
            *(f"{one['payments_per_second'][way]:.1f}" for one in found.values()),
            ", ".join(sorted({f"{one['valid'][way]:.0%}" for one in found.values() if way in one["valid"]})),
        ]
        for way, what in named.items()
    ]
    told = [
        f"In {name} the tree is {one['ratio_to_one_at_a_time']:.1f} times as fast as one at a time, "
        f"{one['ratio_to_batched']:.2f} times batched generation, {one['ratio_to_least']:.2f} of what has to be read "
        f"and {one['ratio_to_bound']:.2f} of the bound (medians of the rounds' ratios); it looked into "
        f"{one['expansions']:.1f} branches per payment."
        for name, one in found.items()
    ]
    header = ["way", *(f"{name}, payments/s" for name in found), "valid codes"]
    return "\n\n".join([report.markdown(header, lines), *told, *map(made_by, found.values())])


def answers() -> str:
    found = by_precision("answers")
    named = {"loop": "generate() in a loop", "ours": "evaluate and predict"}
    lines = [
        [what, *(f"{one['answers_per_second'][way]:.2f}" for one in found.values())] for way, what in named.items()
    ]
    told = [
        f"In {name}, {one['questions']} questions, {one['questions_in_loop']} of them in the loop: "
        f"{report.said(one['ratio_to_loop'])}; {one['same']:.0%} of the answers are the same."
        for name, one in found.items()
    ]
    header = ["way", *(f"{name}, answers/s" for name in found)]
    return "\n\n".join([report.markdown(header, lines), *told, *map(made_by, found.values())])


def prepare() -> str:
    found = read_json(RESULTS / "prepare.json")
    lines = [["prepare", f"{found['prepare_seconds']:.2f} s", ""]]
    for kind, what in WRITERS.items():
        lines.append([what, f"{found[f'{kind}_seconds']:.2f} s", f"{found[f'ratio_to_{kind}']:.2f}"])
    told = (
        f"{found['rows']:,} rows, {found['output_bytes'] / 1e6:.0f} MB written, at most "
        f"{found['prepare_peak_resident_bytes'] / 1e6:.0f} MB of memory. From there a first training has "
        f"its tokens after {found['tokens_seconds']:.1f} s, a later one on the same rows after "
        f"{found['tokens_again_seconds']:.1f} s."
    )
    return report.markdown(["", "time", "prepare takes so many times as long"], lines) + "\n\n" + told


def recipes() -> str:
    return table(read_json(RESULTS / "recipes_tiny.json")["recipes"])


def compare() -> str:
    summary = read_json(REFERENCE / "summary.json")
    lines = []
    for recipe in summary["recipes"]:
        arms = {arm["arm"]: arm for arm in recipe["arms"]}
        for comparison in recipe["comparisons"]:
            rates = [
                f"{arms[arm]['train']['tokens_per_second']:,.0f}" for arm in (comparison["arm"], comparison["baseline"])
            ]
            used = report.memory(comparison)
            pace, memory = report.said(report.speed(comparison)), report.said(used[1] if used else None)
            lines.append(
                [f"{recipe['recipe']}, {recipe['size']}", *rates, pace, memory, report.equivalence(comparison)]
            )
    header = ["recipe, size", "unsloth, tokens/s", "peft, tokens/s", "speed", "peak memory", "training"]
    env = summary["environment"]
    return (
        report.markdown(header, lines) + f"\n\n{env['processor']}, {env['cores']} cores, no GPU: `{summary['command']}`"
    )


def trust() -> str:
    """At the level it was measured with, and at the one that is used now: Student's interval of n pairs is as much
    wider as the quantiles are."""
    from scipy.stats import t

    found = read_json(RESULTS / "trust.json")
    levels = sorted({found["level"], RATIO_LEVEL})
    lines = []
    for level in levels:
        counts = []
        for kind in ("equal", "planted"):
            differ = 0
            for ratio in found["comparisons"][kind]:
                low, middle, high = (math.log(ratio[end]) for end in ("low", "value", "high"))
                wider = t.ppf((1 + level) / 2, ratio["pairs"] - 1) / t.ppf((1 + found["level"]) / 2, ratio["pairs"] - 1)
                differ += abs(middle) > (high - low) / 2 * wider
            counts.append(f"{differ} of {found['runs']}")
        lines.append([f"{level:.0%}" + " (in use)" * (level == RATIO_LEVEL), *counts])
    header = ["interval", "equal arms told apart", f"slow-downs by {found['planted']:.0%} found"]
    env = found["environment"]
    made = f"{found['repeats']} pairs each, {env['processor']}, {env['cores']} cores: `{found['command']}`"
    return report.markdown(header, lines) + f"\n\n{made}"


def soaked() -> str:
    found = read_json(RESULTS / "soak.json")
    cycles, counts, env = found["cycles"], found["total"], found["environment"]
    told = (
        f"{counts['sound']} of {counts['cycles']} cycles ended as they have to, after {counts['stops']} stops, "
        f"{counts['killed']} of them SIGKILL; {sum(done['new_interpreters'] for done in cycles)} cycles started every "
        f"process anew. {env['processor']}, {env['cores']} cores: `{found['command']}`"
    )
    return soak.table(cycles) + f"\n\n{told}"


def trained(*files: str) -> str:
    """How many times as fast ours is as each of the others, a row for each recipe, and how they were measured."""
    found = [read_json(RESULTS / file) for file in files]
    measured = [(name, of["arms"]) for one in found for name, of in one["recipes"].items()]
    others = list(dict.fromkeys(arm for _, arms in measured for arm in arms if arm not in (train.OURS, train.COMPILED)))
    lines = []
    for name, arms in measured:
        ours, trl = arms[train.OURS], arms["trl"]
        lines.append(
            [name, f"{ours['tokens_per_second']:,.0f}", *(_faster(arms.get(arm)) for arm in others),
             f"{ours['peak_resident_bytes'] / 2**20:,.0f} MiB", f"x {trl['memory_of_ours_to_this']['value']:.2f}"]
        )  # fmt: skip
    header = ["recipe", "ours, tokens/s", *(f"to {arm}" for arm in others), "ours, peak memory", "to trl's"]
    made = [report.markdown(header, lines)]
    for one in found:
        env, settings = one["environment"], one["settings"]
        (dtype,) = {of["dtype"] for of in one["recipes"].values()}
        how = f"{settings['repeats']} rounds, size {settings['size']}, {dtype}"
        how += f", {env['processor']}, {env['cores']} cores"
        made.append(f"{how}: `{one['command']}`")
    return "\n\n".join(made)


def compiled() -> str:
    """How many times as fast ours is with its layers compiled, and what that takes."""
    found = read_json(RESULTS / "train_bfloat16.json")["recipes"]
    arms = {name: arm for name, of in found.items() if "this_to" in (arm := of["arms"].get(train.COMPILED, {}))}
    others = list(dict.fromkeys(other for arm in arms.values() for other in arm["this_to"]))
    lines = []
    for name, arm in arms.items():
        once, *again = (told["seconds"] for told in arm["compiled"])
        ratios = [report.short(arm["this_to"][other]) if other in arm["this_to"] else "" for other in others]
        memory = f"x {1 / arm['memory_of_ours_to_this']['value']:.2f}" if "memory_of_ours_to_this" in arm else ""
        lines.append([name, *ratios, memory, f"{once:.0f} s", f"{median(again):.0f} s" if again else ""])
    header = ["recipe", *(f"to {arm}" for arm in others), "memory, to ours", "compiled in", "later in"]
    return report.markdown(header, lines)


def _faster(arm: dict[str, Any] | None) -> str:
    if arm is None:
        return ""
    if arm["status"] != "measured":
        return f"{arm['status']}: {arm['reason']}"
    return f"{report.short(arm['ours_to_this'])}{', other losses' * (arm['same_training'] is False)}"


def on_a_gpu() -> str:
    """Ours under both backends beside TRL: two measurements on one card, which share the arm that is not ours."""
    found = {backend: read_json(RESULTS / "h200" / f"train_{backend}.json") for backend in ("peft", "unsloth")}
    ((name, of),) = found["peft"]["recipes"].items()
    trl = of["arms"]["trl"]
    arms = {f"ours, {backend}": one["recipes"][name]["arms"][train.OURS] for backend, one in found.items()}
    lines = [
        [arm, f"{told['samples_per_second']:.1f}", f"x {told['samples_per_second'] / trl['samples_per_second']:.2f}",
         f"{told['first_step_seconds']:.1f} s", f"{told['peak_allocated_bytes'] / 2**20:,.0f} MiB",
         f"{train.losses_apart(told['losses'], trl['losses']):.2%}"]
        for arm, told in {**arms, "trl": trl}.items()
    ]  # fmt: skip
    env, settings = found["peft"]["environment"], found["peft"]["settings"]
    commands = " and ".join(f"`{one['command']}`" for one in found.values())
    made = f"One round, {name}, size {settings['size']}, {of['dtype']}, {env['gpu']['name']}, torch "
    made += f"{env['versions']['torch']}: {commands}"
    return (
        report.markdown(["arm", "rows/s", "to TRL", "first step", "peak allocated", "losses apart"], lines)
        + f"\n\n{made}. {found['peft']['note']}."
    )


TABLES: dict[str, Callable[[], str]] = {
    "balance": balance, "classify": classify, "answers": answers, "prepare": prepare, "recipes": recipes,
    "compare": compare, "trust": trust, "soak": soaked,
    "gpu": on_a_gpu, "train": partial(trained, "train_bfloat16.json"),
    "compiled": compiled, "float32": partial(trained, "train.json", "train_civil.json", "train_chat.json"),
    "dropout": partial(trained, "train_dropout.json"),
}  # fmt: skip


def picture(summary: dict[str, Any], file: Path) -> None:
    """How many times as fast and as large the arm is as its baseline, with intervals; 1 is no difference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [(r["recipe"], c) for r in reversed(summary["recipes"]) for c in r["comparisons"]]
    panes = (("training speed", report.speed), ("peak memory", lambda c: (report.memory(c) or ("", None))[1]))
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 0.5 * len(found) + 1.3), sharey=True, layout="constrained")
    for axis, (title, ratio_of) in zip(axes, panes, strict=True):
        axis.axvline(1, color="0.6", linewidth=1)
        for row, (_, comparison) in enumerate(found):
            ratio = ratio_of(comparison)
            if ratio and ratio["low"] is not None:
                reach = [[ratio["value"] - ratio["low"]], [ratio["high"] - ratio["value"]]]
                axis.errorbar(ratio["value"], row, xerr=reach, fmt="o", capsize=4, color="#0b6bcb")
        axis.set_title(f"{title}, Unsloth / PEFT", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(found)), [name for name, _ in found])
    with replacing(file) as beside:
        figure.savefig(beside, dpi=110, format="png")
    pyplot.close(figure)
