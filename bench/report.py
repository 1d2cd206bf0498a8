"""What a comparison found, for the terminal, as Markdown and as one HTML page that needs nothing else."""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import drawing
from bench.statistics import RATIO_LEVEL, Ratio
from recipes.stages.console import console
from recipes.stages.run import write_json, write_whole

MEMORY = ("peak_allocated_bytes", "device_process_bytes", "peak_resident_bytes")
"""Peak memory, the first of these that was measured."""
# Table rows: (phase, value, title, how it is written). Their ratios are as measured; a sentence about speed turns the
# step time's round.
LINES = (
    ("train", "step_seconds_median", "training step", "seconds"),
    ("train", "tokens_per_second", "training, real tokens/s", "count"),
    ("train", "supervised_tokens_per_second", "training, supervised tokens/s", "count"),
    ("train", "mfu", "share of the matmul peak", "share"),
    ("train", "first_step_seconds", "first step", "seconds"),
    ("train", "load_seconds", "loading", "seconds"),
    ("train", "peak_allocated_bytes", "training, peak allocated", "bytes"),
    ("train", "peak_reserved_bytes", "training, peak reserved", "bytes"),
    ("train", "device_process_bytes", "training, on the device", "bytes"),
    ("train", "peak_resident_bytes", "peak resident", "bytes"),
    ("train", "energy_joules_per_step", "energy per step", "joules"),
    ("generate", "prefill_tokens_per_second_median", "prefill tokens/s", "count"),
    ("generate", "decode_tokens_per_second_median", "decode tokens/s", "count"),
    ("generate", "time_to_first_token_seconds_median", "first token after", "seconds"),
    ("generate", "answers_per_second_median", "answers/s, scored", "count"),
    ("generate", "peak_allocated_bytes", "answering, peak allocated", "bytes"),
)


def amount(value: float | None, kind: str) -> str:
    if value is None:
        return ""
    if kind == "bytes":
        return f"{value / 2**20:,.0f} MiB"
    if kind == "seconds":
        return f"{value * 1000:,.1f} ms" if value < 1 else f"{value:,.2f} s"
    if kind == "share":
        return f"{value:.1%}"
    return f"{value:,.1f}" + (" J" if kind == "joules" else "")


def said(ratio: dict[str, Any] | None) -> str:
    """A ratio with its interval, and what that amounts to."""
    if ratio is None:
        return ""
    if ratio["pairs"] < 2:
        return f"x {ratio['value']:.2f}, one pair says nothing of chance"
    # Where an interval is as narrow as its distance from 1, two digits would hide both.
    digits = 3 if max(abs(ratio[end] - 1) for end in ("low", "high")) < 0.05 else 2
    interval = "x {value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]".format(**ratio, digits=digits)
    return interval if differs(ratio) else f"{interval}, no difference shown"


def short(ratio: dict[str, Any]) -> str:
    interval = "" if ratio["low"] is None else f" [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    return f"x {ratio['value']:.2f}{interval}"


def differs(ratio: dict[str, Any]) -> bool:
    return Ratio(*(ratio[name] for name in ("value", "low", "high", "pairs"))).differs


def speed(comparison: dict[str, Any]) -> dict[str, Any] | None:
    """How many times as fast the arm trains: the step time's ratio, turned round."""
    ratio = comparison["train"].get("step_seconds_median")
    if ratio is None:
        return None
    low, high = (1 / ratio[end] if ratio[end] is not None else None for end in ("high", "low"))
    turned = {"value": 1 / ratio["value"], "low": low, "high": high}
    return {**ratio, **turned}


def memory(comparison: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    return next(((name, comparison["train"][name]) for name in MEMORY if name in comparison["train"]), None)


def equivalence(comparison: dict[str, Any]) -> str:
    same = comparison.get("same_training")
    if same is None:
        return "not compared"
    if not same["batches_identical"]:
        return "differs: the batches are not the same"
    if same["same"]:
        return f"same training (losses within {same['largest_difference']:.2%})"
    return f"differs from step {same['from_step']} (losses by up to {same['largest_difference']:.2%})"


def suspicious(comparison: dict[str, Any]) -> bool:
    """A difference in speed that another training was paid for."""
    ratio = speed(comparison)
    same = comparison.get("same_training")
    return bool(ratio and differs(ratio) and same and not same["same"])


def verdicts(summary: dict[str, Any]) -> list[tuple[str, bool]]:
    """Sentences, and whether each is a warning."""
    found = []
    for recipe in summary["recipes"]:
        for arm in recipe["arms"]:
            for reason in sorted({f"{row['status']}: {row['reason']}" for row in arm["not_measured"]}):
                found.append((f"{recipe['recipe']}, {arm['arm']}: {reason}", True))
        for comparison in recipe["comparisons"]:
            pace, used = speed(comparison), memory(comparison)
            parts = [f"{comparison['arm']} trains {_pace(pace)}"] if pace else []
            if used:
                parts.append(f"peak memory {said(used[1])}")
            parts.append(equivalence(comparison))
            told = f"{recipe['recipe']}, against {comparison['baseline']}: {'; '.join(parts)}"
            found.append((told, suspicious(comparison)))
    return found


def _pace(ratio: dict[str, Any]) -> str:
    if ratio["pairs"] < 2:
        return f"x {ratio['value']:.2f} as fast, one pair says nothing of chance"
    return f"{said(ratio)} as fast" if differs(ratio) else said(ratio)


def brief(row: dict[str, Any]) -> str:
    """One line of a running sweep."""
    if row["status"] != "measured":
        return f"{row['status']}: {row['reason']}"
    train, generate = row["train"], row.get("generate", {})
    used = next(train[name] for name in MEMORY if train.get(name) is not None)
    parts = [f"step {amount(train['step_seconds_median'], 'seconds')}", f"{train['tokens_per_second']:,.0f} tokens/s"]
    parts.append(amount(used, "bytes"))
    if "decode_tokens_per_second_median" in generate:
        parts.append(f"decode {generate['decode_tokens_per_second_median']:,.0f} tokens/s")
    if "answers_per_second_median" in generate:
        parts.append(f"{generate['answers_per_second_median']:,.0f} answers/s")
    return ", ".join(parts)


def lines_of(recipe: dict[str, Any]) -> list[list[str]]:
    """The table of one recipe: what, each arm, each ratio to the baseline."""
    arms = [arm for arm in recipe["arms"] if arm["measured"]]
    found = []
    for phase, name, title, kind in LINES:
        values = [arm.get(phase, {}).get(name) for arm in arms]
        if any(value is not None for value in values):
            ratios = [said(comparison[phase].get(name)) for comparison in recipe["comparisons"]]
            found.append([title, *(amount(value, kind) for value in values), *ratios])
    return found


def header_of(recipe: dict[str, Any]) -> list[str]:
    arms = [arm["arm"] for arm in recipe["arms"] if arm["measured"]]
    return ["", *arms, *(f"{c['arm']} / {c['baseline']}" for c in recipe["comparisons"])]


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; its first column is text, the others are figures."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def deliver(summary: dict[str, Any], out: Path | None, as_json: bool) -> bool:
    """Into a file and onto standard output, as was asked; False where words should follow."""
    if out:
        write_json(out, summary)
    if as_json:
        print(json.dumps(summary, ensure_ascii=False))
    return as_json


def ohlora_table(summary: dict[str, Any]) -> list[list[str]]:
    """The table that Oh-LoRA was introduced with: memory and time of 25 answers and of a small training."""
    found = [["", "unsloth", "peft", "reduction"]]
    arms = {arm["arm"]: arm for recipe in summary["recipes"] for arm in recipe["arms"] if arm["measured"]}
    if {"unsloth", "peft"} - arms.keys():
        return []
    for title, phase, name, kind in (
        ("answering, memory (allocated)", "generate", "peak_allocated_bytes", "bytes"),
        ("answering, time", "generate", "answering_seconds", "seconds"),
        ("fine-tuning, memory (allocated)", "train", "peak_allocated_bytes", "bytes"),
        ("fine-tuning, memory (on the device)", "train", "device_process_bytes", "bytes"),
        ("fine-tuning, memory (resident)", "train", "peak_resident_bytes", "bytes"),
        ("fine-tuning, time", "train", "training_seconds", "seconds"),
    ):
        ours, theirs = (arms[arm].get(phase, {}).get(name) for arm in ("unsloth", "peft"))
        if ours and theirs:
            found.append([title, amount(ours, kind), amount(theirs, kind), f"{1 - ours / theirs:.1%}"])
    return found


def show(summary: dict[str, Any]) -> None:
    from rich.table import Table

    for recipe in summary["recipes"]:
        if any(arm["measured"] for arm in recipe["arms"]):
            table = Table(title=f"{recipe['recipe']}, size {recipe['size']}", title_justify="left")
            for number, name in enumerate(header_of(recipe)):
                table.add_column(name, justify="right" if number else "left")
            for line in lines_of(recipe):
                table.add_row(*line)
            console().print(table)
    if summary["case"] == "ohlora-table" and (lines := ohlora_table(summary)):
        console().print(markdown(lines[0], lines[1:]), markup=False, highlight=False)
    for sentence, warning in verdicts(summary):
        console().print(sentence, style="red" if warning else None, markup=False, highlight=False)


def write(folder: Path, summary: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    write_json(folder / "summary.json", summary)
    write_whole(folder / "report.md", as_markdown(summary))
    write_whole(folder / "report.html", as_html(summary, rows))


def _about(summary: dict[str, Any]) -> list[tuple[str, str]]:
    env = summary["environment"]
    gpu = env["gpu"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items() if version)
    return [
        ("command", summary["command"]),
        ("order of the cases", f"drawn with seed {summary['seed']}"),
        ("machine", f"{env['processor']}, {env['cores']} cores, {env['memory_bytes'] / 2**30:.0f} GiB"),
        ("GPU", f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, driver {gpu['driver']}" if gpu else "none"),
        ("versions", f"Python {env['python']}, {versions}"),
        ("commit", f"{env['git_commit']}, {env['git_changed_files']} files changed"),
        ("time", env["time"]),
    ]


def _notes(recipe: dict[str, Any]) -> list[str]:
    notes = [recipe["notice"] or ""]
    for arm in recipe["arms"]:
        if arm["measured"]:
            patched = "; ".join(f"{name} ({count})" for name, count in arm["patched"].items())
            notes.append(f"{arm['arm']} patched: {patched or 'nothing, the original code runs'}")
        if arm.get("throttled"):
            notes.append(
                f"{arm['arm']}: the GPU's clock was held down by heat or its supply; its times are not to be trusted"
            )
    for comparison in recipe["comparisons"]:
        unlike = "; ".join(comparison.get("unlike", []))
        notes.append(f"not alike in {comparison['arm']} / {comparison['baseline']}: {unlike or 'nothing'}")
    return [note for note in notes if note]


def _how(summary: dict[str, Any]) -> str:
    alike = (
        "Each backend at its own defaults: NOT like with like, see what is not alike."
        if summary["native"]
        else "Like with like: the same precision, quantisation, optimiser, batches and LoRA start."
    )
    turns = "took turns step by step" if summary["by_step"] else "were measured one after the other"
    return (
        f"{alike} The arms of a pair {turns}. Ratios are of pairs, with {RATIO_LEVEL:.0%} intervals; where one holds "
        "1, no difference is shown."
    )


def as_markdown(summary: dict[str, Any]) -> str:
    def plain(text: str) -> str:
        return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")

    parts = ["# With and without\n", _how(summary), ""]
    parts += [
        f"- {'**' if warning else ''}{plain(told)}{'**' if warning else ''}" for told, warning in verdicts(summary)
    ]
    if summary["case"] == "ohlora-table" and (lines := ohlora_table(summary)):
        parts += ["", markdown(lines[0], lines[1:])]
    for recipe in summary["recipes"]:
        parts += [f"\n## {plain(recipe['recipe'])}\n"]
        if any(arm["measured"] for arm in recipe["arms"]):
            parts += [markdown([plain(h) for h in header_of(recipe)], lines_of(recipe)), ""]
        parts += [f"- {plain(note)}" for note in _notes(recipe)]
    parts += ["\n## Made by\n", *(f"- {name}: {plain(value)}" for name, value in _about(summary))]
    return "\n".join(parts) + "\n"


def as_html(summary: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Nothing in it comes from elsewhere, and every text is escaped: names of models and files are other people's."""
    e = html.escape
    told = "".join(f"<li{' class=warn' if warning else ''}>{e(text)}</li>" for text, warning in verdicts(summary))
    sections = "".join(
        _section(recipe, [r for r in rows if r["recipe"] == recipe["recipe"]]) for recipe in summary["recipes"]
    )
    about = "".join(f"<tr><th>{e(name)}</th><td>{e(str(value))}</td></tr>" for name, value in _about(summary))
    return (
        "<!doctype html>\n<html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>With and without</title><style>{drawing.STYLE}</style>"
        f"<body><main><h1>With and without</h1><p>{e(_how(summary))}</p><ul class=verdicts>{told}</ul>"
        f"{sections}<h2>Made by</h2><div class=scroll><table class=about>{about}</table></div></main></body></html>\n"
    )


def _section(recipe: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    e = html.escape
    title = f"<h2>{e(recipe['recipe'])}</h2>"
    measured = [row for row in rows if row["status"] == "measured"]
    if not measured:
        return title + "<p class=warn>Nothing could be measured.</p>"
    head = "".join(f"<th>{e(name)}</th>" for name in header_of(recipe))
    body = "".join("<tr>" + "".join(f"<td>{e(cell)}</td>" for cell in line) + "</tr>" for line in lines_of(recipe))
    notes = "".join(f"<li>{e(note)}</li>" for note in _notes(recipe))
    by_arm = {arm["arm"]: [r for r in measured if r["arm"] == arm["arm"]] for arm in recipe["arms"] if arm["measured"]}
    figures = [
        drawing.spans(
            "Training, real tokens per second",
            {arm: [r["train"]["tokens_per_second"] for r in some] for arm, some in by_arm.items()},
            lambda v: f"{v:,.0f}",
        ),
        drawing.stacks(
            "Memory at the peak, MiB", {arm: _memory_parts(some) for arm, some in by_arm.items()}, lambda v: f"{v:,.0f}"
        ),
        drawing.curves(
            "Loss by step",
            {arm: [[s["loss"] for s in r["train"]["steps"]] for r in some] for arm, some in by_arm.items()},
        ),
        drawing.dots(
            "Seconds per step, each a dot",
            {arm: [s["seconds"] for r in some for s in r["train"]["steps"][1:]] for arm, some in by_arm.items()},
            lambda v: f"{v:.3g} s",
        ),
    ]
    table = f"<div class=scroll><table><tr>{head}</tr>{body}</table></div>"
    return f"{title}{table}<div class=figures>{''.join(figures)}</div><ul class=notes>{notes}</ul>"


def _memory_parts(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What is held all the time, by what it is for, and what a step puts on top. Without a GPU the peak is the
    process's, and the rest is the libraries for the most part."""
    row = max(rows, key=lambda r: next(r["train"][n] for n in MEMORY if r["train"].get(n) is not None))
    name = next(n for n in MEMORY if row["train"].get(n) is not None)
    held = row["train"].get("tensor_bytes", {})
    rest = "activations" if name == "peak_allocated_bytes" else "libraries, activations"
    parts = {**held, rest: max(0, row["train"][name] - sum(held.values()))}
    return {part: size / 2**20 for part, size in parts.items()}
