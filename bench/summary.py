"""Rows -> what they say: medians, ratios with their intervals, and whether the arms did the same training."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from bench.case import arms
from bench.statistics import TOLERANCES, paired_ratio, same_training

# Measured values of the phases: name -> what a smaller value means.
TRAIN = {
    "step_seconds_median": "better",
    "step_seconds_p90": "better",
    "training_seconds": "better",
    "first_step_seconds": "better",
    "load_seconds": "better",
    "tokens_per_second": "worse",
    "padded_tokens_per_second": "worse",
    "supervised_tokens_per_second": "worse",
    "samples_per_second": "worse",
    "peak_allocated_bytes": "better",
    "peak_reserved_bytes": "better",
    "device_process_bytes": "better",
    "device_bytes": "better",
    "peak_resident_bytes": "better",
    "energy_joules_per_step": "better",
    "mfu": "worse",
}
GENERATE = {
    "load_seconds": "better",
    "prefill_tokens_per_second_median": "worse",
    "decode_tokens_per_second_median": "worse",
    "time_to_first_token_seconds_median": "better",
    "answers_per_second_median": "worse",
    "answering_seconds": "better",
    "peak_allocated_bytes": "better",
    "peak_reserved_bytes": "better",
}
# What both arms should have in common, where the run writes it down.
ALIKE = ("dtype", "attention", "quantization", "optimizer", "triton")


def summarise(rows: Sequence[dict[str, Any]], plan: dict[str, Any], environment: dict[str, Any]) -> dict[str, Any]:
    """`plan` is what plan.json holds: the command, the seed of the order, the settings."""
    settings = plan["settings"]
    order = list(arms([part.strip() for part in settings["backends"].split(",")]))
    by_recipe: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in sorted(rows, key=lambda row: (row["recipe"], row["repeat"])):
        by_recipe.setdefault(row["recipe"], {}).setdefault(row["arm"], []).append(row)
    return {
        "command": plan["command"],
        "seed": plan["seed"],
        "environment": environment,
        "native": settings["native"],
        "by_step": plan.get("by_step", False),
        "case": settings["case"],
        "tolerances": TOLERANCES,
        "recipes": [_recipe(name, by_arm, order) for name, by_arm in sorted(by_recipe.items())],
    }


def _recipe(name: str, by_arm: dict[str, list[dict[str, Any]]], order: Sequence[str]) -> dict[str, Any]:
    by_arm = {arm: by_arm[arm] for arm in order if arm in by_arm}
    measured = {arm: [row for row in rows if row["status"] == "measured"] for arm, rows in by_arm.items()}
    baseline = next((arm for arm in reversed(order) if measured.get(arm)), None)
    some = next((rows[0] for rows in measured.values() if rows), {})
    return {
        "recipe": name,
        "model": some.get("model"),
        "size": some.get("size"),
        "notice": some.get("notice"),
        "baseline": baseline,
        "arms": [_arm(arm, rows, measured[arm]) for arm, rows in by_arm.items()],
        "comparisons": [
            _comparison(arm, rows, measured[baseline], baseline)
            for arm, rows in measured.items()
            if baseline and rows and arm != baseline
        ],
    }


def _arm(arm: str, rows: list[dict[str, Any]], measured: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "arm": arm,
        "backend": rows[0]["backend"],
        "measured": len(measured),
        "not_measured": [
            {"repeat": row["repeat"], "status": row["status"], "reason": row["reason"]}
            for row in rows
            if row["status"] != "measured"
        ],
    }
    if measured:
        found["choice"] = {key: value for key, value in measured[0]["choice"].items() if key != "reasons"}
        found["patched"] = measured[0]["proof"]["patched"]
        for phase, names in (("train", TRAIN), ("generate", GENERATE)):
            found[phase] = {
                name: float(np.median(values))
                for name in names
                if (values := [r[phase][name] for r in measured if r.get(phase, {}).get(name) is not None])
            }
        throttled = [row["train"]["throttled"] for row in measured]
        found["throttled"] = any(throttled) if throttled[0] is not None else None
    return found


def _comparison(arm: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]], baseline: str) -> dict[str, Any]:
    """Pairs are the repeats that both arms finished."""
    other = {row["repeat"]: row for row in theirs}
    pairs = [(row, other[row["repeat"]]) for row in ours if row["repeat"] in other]
    found: dict[str, Any] = {"arm": arm, "baseline": baseline, "pairs": len(pairs), "train": {}, "generate": {}}
    if not pairs:
        return found
    for phase, names in (("train", TRAIN), ("generate", GENERATE)):
        for name in names:
            both = [(a.get(phase, {}).get(name), b.get(phase, {}).get(name)) for a, b in pairs]
            if all(a and b for a, b in both):
                ratio = paired_ratio([a for a, _ in both], [b for _, b in both])
                found[phase][name] = asdict(ratio)
    found["unlike"] = [
        f"{name}: {a['choice'][name]} / {b['choice'][name]}"
        for a, b in pairs[:1]
        for name in ALIKE
        if a["choice"][name] != b["choice"][name]
    ] + [
        f"{name}: {a['settings'][name]} / {b['settings'][name]}"
        for a, b in pairs[:1]
        for name in a["settings"]
        if a["settings"][name] != b["settings"][name]
    ]
    found["same_training"] = _same(pairs)
    return found


def _same(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """The verdict over all pairs: the first step at which any of them parts."""
    worst: dict[str, Any] = {"same": True, "batches_identical": True, "from_step": None, "largest_difference": 0.0}
    for a, b in pairs:
        ours, theirs = a["train"]["steps"], b["train"]["steps"]
        if [s["batch"] for s in ours] != [s["batch"] for s in theirs]:
            worst["batches_identical"] = worst["same"] = False
        one, other = ([(s["loss"], s["grad_norm"]) for s in steps] for steps in (ours, theirs))
        same, first, largest = same_training(one, other, _coarser(a, b))
        worst["largest_difference"] = max(worst["largest_difference"], largest)
        if not same:
            worst["same"] = False
            worst["from_step"] = min(first or 1, worst["from_step"] or first or 1)
    return worst


def _coarser(*rows: dict[str, Any]) -> str:
    return max((row["choice"]["dtype"] for row in rows), key=lambda dtype: TOLERANCES[dtype])
