"""plan against what trainings really hold: every recipe under every backend, term by term.

On a CPU at size tiny, and one at size small; on a GPU at full size with random weights. The prediction is calculated
for just that case: its size, precision, kernels and batches.
"""

import importlib
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.case import Case
from bench.held import PARTS, UNMEASURED
from bench.launch import make_ready, one
from bench.report import markdown
from fallback.choose import BackendName, Choice, why_not
from fallback.gpu import read_gpu
from recipes.stages.base_model import architecture
from recipes.stages.recipe import Recipe, Settings
from recipes.stages.run import environment

LIMIT_SECONDS = 900
SMALL = "gemma3_1b_counsel"
"""Without a GPU, this one is looked at in size small too: its layers are more than those that plan steps through."""
# Batches are measured of these rows and of twice as many, of this length and of half of it.
_SHAPE = ("--batch-size", "2", "--max-length", "128")


def check(recipes: Sequence[Recipe], backends: Sequence[BackendName], arguments: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench-plan-") as folder:
        cases = [line for case in cases_of(recipes, backends) for line in measured(case, Path(folder))]
    return {
        "command": shlex.join(["python", "-m", "bench", "plan", *arguments]),
        "environment": environment(),
        "device": gpu.name if (gpu := read_gpu()) else "CPU",
        "cases": cases,
    }


def cases_of(recipes: Sequence[Recipe], backends: Sequence[BackendName]) -> Iterator[Case]:
    """Each with and without checkpointing; as its recipe has it, and at its own batch size and length, on a GPU."""
    gpu = read_gpu()
    sizes = [(recipe, "full" if gpu else "tiny") for recipe in recipes]
    if not gpu:
        sizes += [(recipe, "small") for recipe in recipes if recipe.name == SMALL]
    for recipe, size in sizes:
        for backend in backends:
            if why := why_not(backend, gpu, architecture(recipe)["model_type"]):
                print(f"{recipe.name}, {backend}: not measured, {why}", file=sys.stderr, flush=True)
                continue
            for checkpointing in (True,) if gpu else (True, False):
                settings = recipe.settings
                shape = ("--batch-size", str(max(1, settings.batch_size // 2))) if gpu else _SHAPE
                steps = str(UNMEASURED + 4)
                flags = [
                    "--size", size, "--weights", "random", "--backend", backend, *shape, "--accumulation",
                    str(PARTS), "--max-steps", steps, "--epochs", "1000", "--early-stopping", "off",
                    "--checkpointing" if checkpointing else "--no-checkpointing",
                    # What plan calculates is the worst batch: prompts that have nothing in common.
                    "--no-fold",
                    # The sample's texts are made longer only when they are together.
                    "--batch-tokens", "0",
                    # On CPUs torch's autocast has other rules than on the cards that plan is for.
                    "--dtype", "auto" if gpu else "float32",
                ]  # fmt: skip
                if recipe.closed:
                    # The validation at the end is not measured.
                    flags += ["--eval-rows", "12"]
                yield Case(recipe.name, f"{size} {backend} {checkpointing}", backend, 0, tuple(flags), ("train",))


def measured(case: Case, folder: Path) -> list[dict[str, Any]]:
    """A line for each shape of batch, or one with the reason why there is none."""
    size = case.flags[1]
    about = {"recipe": case.recipe, "backend": case.backend, "size": size}
    print(f"{case.recipe}, {case.arm} …", file=sys.stderr, flush=True)
    make_ready(case.recipe, size, "random")
    row = one(case, folder, LIMIT_SECONDS, "bench.held")
    if row["status"] != "measured":
        return [{**about, **{name: row[name] for name in ("status", "reason", "tail")}}]
    return [{**about, **line} for line in compared(row)]


def compared(row: dict[str, Any]) -> list[dict[str, Any]]:
    from recipes.stages import footprint
    from recipes.stages.plan import conditions

    stored = row["settings"]
    settings = Settings(**{**stored, "lora_targets": tuple(stored["lora_targets"])})
    config = json.loads((Path(row["model"]) / "config.json").read_text(encoding="utf-8"))
    choice = Choice(**row["choice"])
    recipe = importlib.import_module(f"recipes.{row['recipe']}").RECIPE
    on = conditions(recipe, choice, settings)
    held = footprint.held_bytes(footprint.meta_network(config, settings, on), on, choice.optimizer)
    lines = []
    for shape in row["shapes"]:
        batches = [
            footprint.Batch(shape["rows"], shape["length"], **batch, first=not number)
            for number, batch in enumerate(shape["batches"])
        ]
        predicted = {**held, "activations_and_loss": footprint.peak_bytes(config, settings, on, batches)}
        terms = {name: _against(predicted[name], shape["terms"][name]) for name in predicted}
        whole = shape.get("most_held", sum(shape["terms"].values()))
        terms["all"] = _against(sum(predicted.values()), whole)
        lines.append(
            {
                "checkpointing": settings.checkpointing,
                **{name: getattr(choice, name) for name in ("quantization", "dtype", "attention", "optimizer")},
                **{name: shape[name] for name in ("rows", "length", "batches")},
                "terms": terms,
            }
        )
    return lines


def _against(predicted: int, found: int) -> dict[str, Any]:
    error = predicted / found - 1 if found else 0.0 if predicted == found else None
    return {"predicted": predicted, "measured": found, "error": error}


def table(summary: dict[str, Any]) -> str:
    """A row for each term of each recipe and backend, at the shape where it was furthest off."""
    worst: dict[tuple[str, ...], tuple[dict[str, Any], dict[str, Any]]] = {}
    failed = []
    for case in summary["cases"]:
        if "terms" not in case:
            failed.append(f"{case['recipe']}, {case['size']}, {case['backend']}: {case['status']}: {case['reason']}")
            continue
        for name, term in case["terms"].items():
            key = case["recipe"], case["size"], case["backend"], name
            if term["measured"] and (key not in worst or abs(term["error"]) > abs(worst[key][1]["error"])):
                worst[key] = case, term
    rows = []
    for (recipe, size, backend, name), (case, term) in worst.items():
        shape = f"{case['rows']} x {case['length']}{', checkpointing' if case['checkpointing'] else ''}"
        amounts = [f"{term[which] / 2**20:,.3f}" for which in ("predicted", "measured")]
        rows.append([f"{recipe}, {size}", backend, name.replace("_", " "), shape, *amounts, f"{term['error']:+.2%}"])
    header = ["recipe, size", "backend", "term", "furthest off at", "predicted, MiB", "measured, MiB", "error"]
    return "\n".join([markdown(header, rows), *failed])
