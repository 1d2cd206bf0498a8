"""All runs of a recipe, side by side."""

from pathlib import Path
from typing import Any

from recipes.stages import run as runs
from recipes.stages.recipe import Recipe
from recipes.stages.run import Run, read_json

_SCORES = ("f1_macro", "accuracy", "chrf", "rouge_l", "stopped_by_itself")


def lines_of(recipe: Recipe) -> list[dict[str, Any]]:
    """A line per run, the newest first; a run that did not finish says so."""
    folders = sorted((runs.ROOT / recipe.name).glob("*"), reverse=True)
    return [_line_or_broken(Run(folder)) for folder in folders if folder.is_dir()]


def _line_or_broken(run: Run) -> dict[str, Any]:
    try:
        return _line(run)
    except (KeyError, TypeError, AttributeError):
        return {"run": run.path.name, "state": "broken"}


def _line(run: Run) -> dict[str, Any]:
    config = _read(run.config)
    metrics = _read(run.metrics)
    settings, base, train = (
        config.get("settings", {}), config.get("base_model", {}), metrics.get("train", {}),
    )  # fmt: skip
    if not config:
        state = "prepared" if run.prepared else "empty"
    else:
        state = "trained" if train else "unfinished"
    return {
        "run": run.path.name,
        "state": state,
        "size": base.get("size"),
        "backend": _read(run.path / "choice.json").get("backend"),
        "epochs": settings.get("epochs"),
        "learning_rate": settings.get("learning_rate"),
        "batch": f"{settings['batch_size']}x{settings['accumulation']}" if settings else None,
        "steps": train.get("optimizer_steps"),
        "loss": train.get("final_loss"),
        "seconds": train.get("train_seconds"),
        **{name: metrics["test"][name] for name in _SCORES if name in metrics.get("test", {})},
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def table(lines: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for line in lines for name in line))
    cells = [columns, *([_cell(line.get(name)) for name in columns] for line in lines)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
