"""Sweeps that are there already: show one again, compare two, list them."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from bench import report
from bench.launch import finished
from bench.statistics import RATIO_LEVEL
from bench.summary import GENERATE, TRAIN, summarise
from recipes.stages.console import say
from recipes.stages.recipe import UserError
from recipes.stages.run import read_json

ROOT = Path("runs/bench")
WATCHED = (
    ("train", "step_seconds_median"), ("train", "peak_allocated_bytes"), ("train", "peak_resident_bytes"),
    ("generate", "decode_tokens_per_second_median"), ("generate", "answers_per_second_median"),
)  # fmt: skip
"""What a regression is looked for in."""


@dataclass(frozen=True)
class Report:
    """Write summary.json, report.md and report.html of a sweep again."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the sweep."""
    json: bool = False
    """Print the summary as JSON."""


@dataclass(frozen=True)
class Diff:
    """Compare two sweeps; exit with 1 where something became worse."""

    before: Annotated[Path, tyro.conf.Positional]
    """Folder of the older sweep."""
    after: Annotated[Path, tyro.conf.Positional]
    """Folder of the newer one."""
    tolerance: float = 0.05
    """Worse by more than this share, and by more than chance, is a regression."""
    json: bool = False
    """Print the differences as JSON."""


@dataclass(frozen=True)
class List:
    """The sweeps under a folder, newest first."""

    folder: Annotated[Path, tyro.conf.Positional] = ROOT
    """Where to look."""


def opened(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The summary of a sweep, made anew from its rows, and the rows."""
    try:
        plan, environment = read_json(folder / "plan.json"), read_json(folder / "environment.json")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not a folder that bench compare has written ({error})") from None
    rows = list(finished(folder).values())
    if not rows:
        raise UserError(f"{folder}: nothing was measured yet; finish it with bench compare --resume {folder}")
    return summarise(rows, plan, environment), rows


def report_command(arguments: list[str]) -> None:
    args = tyro.cli(Report, prog="python -m bench report", args=arguments)
    summary, rows = opened(args.folder)
    report.write(args.folder, summary, rows)
    if args.json:
        print(json.dumps(summary, ensure_ascii=False))
    else:
        report.show(summary)
        say(f"written again: {args.folder / 'report.html'}")


def list_command(arguments: list[str]) -> None:
    args = tyro.cli(List, prog="python -m bench list", args=arguments)
    plans = sorted(args.folder.glob("*/plan.json"), key=lambda file: -file.stat().st_mtime)
    if not plans:
        say(f"no sweeps in {args.folder}; begin one: python -m bench compare")
    for file in plans:
        rows = list(finished(file.parent).values())
        measured = sum(row["status"] == "measured" for row in rows)
        say(f"{file.parent}  {measured} measured, {len(rows) - measured} not  {read_json(file)['command']}")


def diff_command(arguments: list[str]) -> None:
    args = tyro.cli(Diff, prog="python -m bench diff", args=arguments)
    (before, old_rows), (after, new_rows) = opened(args.before), opened(args.after)
    changed = changes(before["environment"], after["environment"])
    lines = differences(old_rows, new_rows, args.tolerance)
    if not lines:
        raise UserError(f"{args.before} and {args.after} measured no recipe and arm with the same flags")
    regressions = [line for line in lines if line["regression"]]
    if args.json:
        print(json.dumps({"changed": changed, "differences": lines}, ensure_ascii=False))
    else:
        for what, parts in changed.items():
            say(f"{what}: {'; '.join(parts) or 'the same'}")
        if changed["machine"]:
            say("these were different machines: what follows says nothing about the code")
        header = ["", "before", "after", "after / before"]
        say(report.markdown(header, [_cells(line) for line in lines]))
        say(f"{len(regressions)} regressions beyond {args.tolerance:.0%}")
    if regressions:
        sys.exit(1)


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, list[str]]:
    """What is not the same, sorted by what it means for the figures."""
    machine = [
        f"{name} {before[name]} -> {after[name]}"
        for name in ("processor", "cores", "memory_bytes")
        if before[name] != after[name]
    ]
    cards = [env["gpu"]["name"] if env["gpu"] else "none" for env in (before, after)]
    if cards[0] != cards[1]:
        machine.append(f"GPU {cards[0]} -> {cards[1]}")
    names = sorted(before["versions"].keys() | after["versions"].keys())
    pairs = [(name, before["versions"].get(name), after["versions"].get(name)) for name in names]
    pairs.append(("Python", before["python"], after["python"]))
    commits = [env["git_commit"] for env in (before, after)]
    dirty = max(before["git_changed_files"], after["git_changed_files"])
    code = [f"{commits[0]} -> {commits[1]}"] if commits[0] != commits[1] else []
    if dirty:
        code.append(f"up to {dirty} files not committed")
    return {
        "machine": machine,
        "versions": [f"{name} {old} -> {new}" for name, old, new in pairs if old != new],
        "code": code,
    }


def differences(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], tolerance: float
) -> list[dict[str, Any]]:
    def values(rows: Sequence[dict[str, Any]], recipe: str, arm: str, phase: str, name: str) -> list[float]:
        mine = [row for row in rows if (row["recipe"], row["arm"], row["status"]) == (recipe, arm, "measured")]
        return [row[phase][name] for row in mine if row.get(phase, {}).get(name)]

    found = []

    def flags(rows: Sequence[dict[str, Any]], recipe: str, arm: str) -> set[tuple[str, ...]]:
        return {tuple(row.get("flags", ())) for row in rows if (row["recipe"], row["arm"]) == (recipe, arm)}

    for recipe, arm in sorted({(row["recipe"], row["arm"]) for row in before}):
        # Another size or batch is another measurement.
        if flags(before, recipe, arm) != flags(after, recipe, arm):
            continue
        for phase, name in WATCHED:
            old, new = (values(rows, recipe, arm, phase, name) for rows in (before, after))
            if old and new:
                worse = 1 if (TRAIN if phase == "train" else GENERATE)[name] == "better" else -1
                low, value, high = unpaired(old, new)
                beyond = low > 1 if worse > 0 else high < 1
                found.append(
                    {
                        "recipe": recipe, "arm": arm, "phase": phase, "name": name, "before": float(np.median(old)),
                        "after": float(np.median(new)), "ratio": value, "low": low, "high": high,
                        "regression": bool(beyond and (value - 1) * worse > tolerance),
                    }
                )  # fmt: skip
    return found


def unpaired(before: Sequence[float], after: Sequence[float], level: float = RATIO_LEVEL) -> tuple[float, float, float]:
    """Welch's interval of the ratio after / before, on logarithms. One value alone has no spread to speak of; then the
    tolerance decides."""
    from scipy.stats import t

    old, new = np.log(before), np.log(after)
    middle = float(new.mean() - old.mean())
    if min(len(old), len(new)) < 2:
        return (float(np.exp(middle)),) * 3
    parts = [float(x.var(ddof=1)) / len(x) for x in (old, new)]
    total = sum(parts)
    if not total:
        return (float(np.exp(middle)),) * 3
    freedom = total**2 / sum(part**2 / (len(x) - 1) for part, x in zip(parts, (old, new), strict=True))
    reach = float(t.ppf((1 + level) / 2, freedom)) * total**0.5
    low, value, high = np.exp([middle - reach, middle, middle + reach]).tolist()
    return low, value, high


def _cells(line: dict[str, Any]) -> list[str]:
    kind = next(kind for phase, name, _, kind in report.LINES if (phase, name) == (line["phase"], line["name"]))
    title = f"{line['recipe']}, {line['arm']}: {line['name']}"
    ratio = f"x {line['ratio']:.2f} [{line['low']:.2f}, {line['high']:.2f}]"
    return [
        title, report.amount(line["before"], kind), report.amount(line["after"], kind),
        ratio + (" REGRESSION" if line["regression"] else ""),
    ]  # fmt: skip
