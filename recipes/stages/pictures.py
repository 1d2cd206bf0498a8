"""Pictures of an evaluation."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from recipes.stages.run import replacing

_BLUE, _GREY = "#2b6cb0", "#8a94a0"


def save(figure: Figure, path: Path) -> None:
    with replacing(path) as beside:
        figure.savefig(beside, dpi=120, bbox_inches="tight", format="png")


def _plain(name: str) -> str:
    """A class's name as a label: whoever wrote the file may have called it anything."""
    name = "".join(letter if letter.isprintable() else "?" for letter in name[:25])
    return name if len(name) < 25 else name[:24] + "…"


def confusion(path: Path, true: Sequence[str], predicted: Sequence[str], most: int = 20) -> None:
    """The classes with the most mistakes between them: rows are the truth, columns what they were taken for."""
    mistakes: Counter[str] = Counter()
    for t, p in zip(true, predicted, strict=True):
        if t != p:
            mistakes.update((t, p))
    worst = sorted(name for name, _ in mistakes.most_common(most))
    if not worst:
        worst = [name for name, _ in Counter(true).most_common(most)]
    index = {name: i for i, name in enumerate(worst)}
    table = np.zeros((len(worst), len(worst)))
    for t, p in zip(true, predicted, strict=True):
        if t in index and p in index:
            table[index[t], index[p]] += 1
    size = 2.2 + 0.36 * len(worst)
    figure = Figure(figsize=(size, size))
    axes = figure.add_subplot()
    shares = table / np.maximum(1, table.sum(axis=1, keepdims=True))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, j in zip(*np.nonzero(table), strict=True):
        axes.text(
            j, i, f"{table[i, j]:.0f}", ha="center", va="center", fontsize=7,
            color="white" if shares[i, j] > 0.6 else "black",
        )  # fmt: skip
    names = [_plain(name) for name in worst]
    axes.set_xticks(range(len(worst)), names, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(len(worst)), names, fontsize=8, parse_math=False)
    axes.set_xlabel("answered")
    axes.set_ylabel("true code")
    axes.set_title("The most confused codes (test rows)", fontsize=10)
    save(figure, path)


def by_size(path: Path, classes: Sequence[dict[str, Any]], named: int = 8) -> None:
    """F1 of every class against its training rows: where rarity hurts."""
    figure = Figure(figsize=(7, 4.2))
    axes = figure.add_subplot()
    rows = [max(1, line["train_rows"]) for line in classes]
    axes.scatter(rows, [line["f1"] for line in classes], s=28, color=_BLUE, alpha=0.75, edgecolors="white", zorder=3)
    for line in [line for line in classes if line["f1"] < 0.5][:named]:
        axes.annotate(
            _plain(line["class"]), (max(1, line["train_rows"]), line["f1"]), xytext=(5, 3), textcoords="offset points",
            fontsize=7, parse_math=False,
        )  # fmt: skip
    axes.axhline(0.5, color=_GREY, linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set_ylim(-0.04, 1.04)
    axes.set_xlabel("rows of the class in the training split")
    axes.set_ylabel("F1 on the test split")
    axes.set_title("F1 of each code against its size", fontsize=10)
    axes.grid(alpha=0.25)
    save(figure, path)


def coverage(path: Path, curve: Sequence[dict[str, Any]]) -> None:
    """Accuracy where only the surest answers are given."""
    figure = Figure(figsize=(6, 3.8))
    axes = figure.add_subplot()
    axes.plot([p["coverage"] for p in curve], [p["accuracy"] for p in curve], marker="o", markersize=3, color=_BLUE)
    for point in curve[:: max(1, len(curve) // 5)]:
        axes.annotate(
            f"{point['min_confidence']:.2f}", (point["coverage"], point["accuracy"]), xytext=(0, 6),
            textcoords="offset points", fontsize=7, ha="center",
        )  # fmt: skip
    axes.set_xlabel("share of the payments answered")
    axes.set_ylabel("accuracy among them")
    axes.set_title("Answering only above a confidence (the figures at the points)", fontsize=10)
    axes.grid(alpha=0.25)
    save(figure, path)
