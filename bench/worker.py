"""One case in an interpreter of its own: python -m bench.worker CASE.json OUT.json FOLDER.

It trains and answers through the functions that the recipes' own commands call. Nothing is imported here that a
backend would have to precede: bench.launch starts this file, and looks at what it leaves.
"""

import importlib
import itertools
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.case import Case
from bench.turns import Turns
from fallback import leave_out
from recipes.stages import cli
from recipes.stages.fine_tune import fine_tune
from recipes.stages.recipe import Recipe, Settings
from recipes.stages.run import Run, read_json, read_jsonl, write_json

# Payments scored at once, and how often.
_SCORED = 64
_TIMES = 3


def make_ready(name: str, size: str, weights: str) -> None:
    """Make a random model's files, so that no case has to."""
    from recipes.stages.base_model import ensure_files, settle

    recipe = importlib.import_module(f"recipes.{name}").RECIPE
    ensure_files(recipe, settle(recipe, size, weights))  # type: ignore[arg-type]


def main(case_file: str, out: str, folder: str) -> None:
    turns = Turns()
    case = Case.of(read_json(Path(case_file)))
    recipe = importlib.import_module(f"recipes.{case.recipe}").RECIPE
    write_json(Path(out), measure(case, recipe, Path(folder), turns))


def measure(case: Case, recipe: Recipe, folder: Path, turns: Turns) -> dict[str, Any]:
    from bench.meters import TrainingMeter
    from recipes.stages.pace import matmul_flops_per_second

    meter = TrainingMeter(case.arm, turns)
    args = cli.parse_train(recipe, "train", [*case.flags, "--run", str(folder)])
    run, chosen, choice, settings = fine_tune(recipe, args, meter)
    trained = read_json(run.metrics)["train"]
    found: dict[str, Any] = {
        "model": chosen.name,
        "size": chosen.size,
        "weights": chosen.weights,
        "notice": chosen.description,
        "choice": choice.as_json(),
        "settings": read_json(run.config)["settings"],
        "proof": proof(choice.backend, trained["patched"]),
        "trainable_parameters": trained["trainable_parameters"],
    }
    # What a folded batch spared was not computed.
    found["train"] = training(case, meter, run, trained["computed_tokens"] / trained["padded_tokens"])
    found["train"]["load_seconds"] = trained["load_seconds"]
    if settings.compile:
        found["compiled"] = trained["compiled"]
    peak = matmul_flops_per_second(choice.dtype, choice.device)
    found["train"]["matmul_flops_per_second"] = peak
    found["train"]["mfu"] = found["train"]["flops_per_step"] / found["train"]["step_seconds_median"] / peak
    if "generate" in case.phases:
        found["generate"] = answering(case, recipe, run, chosen, choice, settings, turns)
    return found


def proof(backend: str, patched: dict[str, int]) -> dict[str, Any]:
    """That the arm is what it says. Without Unsloth, neither it nor anything it replaced may be in the process."""
    from fallback.patched import loaded_patchers

    inside = [name for name in loaded_patchers() if name.startswith("unsloth")]
    if backend != "unsloth" and (inside or any("unsloth" in name for name in patched)):
        there = ", ".join(inside) or "what it patched"
        raise RuntimeError(f"this is the arm without Unsloth, and in its process there is {there}")
    if backend == "unsloth" and not inside:
        raise RuntimeError("this is the arm with Unsloth, and it was never imported")
    return {"in_the_process": inside, "patched": patched}


def training(case: Case, meter: Any, run: Run, computed: float) -> dict[str, Any]:
    """What the meter saw, step by step and in short."""
    import numpy as np

    steps = list(read_jsonl(run.path / "steps.jsonl"))
    ends = list(itertools.accumulate(meter.parts[: len(steps)]))
    batches = [meter.batches[end - parts : end] for parts, end in zip(meter.parts, ends, strict=False)]
    counted = slice(1 + case.warmup, None)
    seconds = np.array(meter.seconds[counted])
    if not len(seconds):
        raise RuntimeError(
            f"{len(steps)} steps, of which {1 + case.warmup} are not counted: nothing is left to measure"
        )
    sums = {name: [sum(b[name] for b in step) for step in batches] for name in ("rows", "tokens", "padded_tokens")}
    supervised = [step["supervised_tokens"] for step in steps]
    flops = [
        meter.flops(computed * tokens, answered)
        for tokens, answered in zip(sums["padded_tokens"][counted], supervised[counted], strict=True)
    ]
    joules = meter.joules[counted]
    found: dict[str, Any] = {
        "training_seconds": sum(meter.seconds),
        "first_step_seconds": meter.seconds[0],
        "step_seconds_median": float(np.median(seconds)),
        "step_seconds_p90": float(np.quantile(seconds, 0.9)),
        "tokens_per_second": sum(sums["tokens"][counted]) / seconds.sum(),
        "padded_tokens_per_second": sum(sums["padded_tokens"][counted]) / seconds.sum(),
        "supervised_tokens_per_second": sum(supervised[counted]) / seconds.sum(),
        "samples_per_second": sum(sums["rows"][counted]) / seconds.sum(),
        "energy_joules_per_step": float(np.mean(joules)) if None not in joules else None,
        **meter.used,
        "tensor_bytes": meter.tensor_bytes,
        "throttled": any(meter.throttled[counted]) if meter.throttled[0] is not None else None,
        "flops_per_step": float(np.mean(flops)),
        "steps": [
            {
                "seconds": second,
                "ended": ended,
                "tokens": tokens,
                "loss": step["loss"],
                "grad_norm": step["grad_norm"],
                "batch": "".join(b["hash"] for b in batch),
            }
            for second, ended, tokens, step, batch in zip(
                meter.seconds, meter.ended, sums["tokens"], steps, batches, strict=True
            )
        ],
    }
    return found


def answering(
    case: Case, recipe: Recipe, run: Run, chosen: Any, choice: Any, settings: Settings, turns: Turns
) -> dict[str, Any]:
    """How fast the trained model answers, loaded as evaluate and predict load it."""
    import numpy as np
    import torch

    from recipes.stages import generation, loading, train
    from recipes.stages.classifier import Classifier
    from recipes.stages.console import held_back

    if choice.device == "cuda":
        torch.cuda.empty_cache()
    with held_back(run.logs / "libraries.log"):
        began = time.perf_counter()
        model = loading.load_to_answer(recipe, run, chosen, choice, settings.max_length)
        found: dict[str, Any] = {"load_seconds": time.perf_counter() - began}
        if choice.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        examples = train.examples(recipe, run, "test")
        if recipe.closed:
            classifier = Classifier(recipe).use(model, run, settings.max_length)
            prompts = [example.prompt for example in examples[:_SCORED]]
            classifier.log_probabilities(prompts[:8])
            rates = []
            for _ in range(_TIMES):
                turns.wait()
                began = time.perf_counter()
                classifier.log_probabilities(prompts)
                rates.append(len(prompts) / (time.perf_counter() - began))
            found["answers_per_second"] = rates
        else:
            how = replace(recipe.sampling, temperature=0.0, max_new_tokens=case.new_tokens)
            speeds = []
            for example in (examples * case.questions)[: case.questions]:
                turns.wait()
                speeds.append(generation.speed(model, example.prompt, how, settings.max_length))
            found["prefill_tokens_per_second"] = [s.prompt_tokens / s.prefill_seconds for s in speeds]
            found["decode_tokens_per_second"] = [s.new_tokens / s.decode_seconds for s in speeds]
            found["answering_seconds"] = sum(s.prefill_seconds + s.decode_seconds for s in speeds)
            found["time_to_first_token_seconds"] = [s.prefill_seconds for s in speeds]
    if choice.device == "cuda":
        found["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
        found["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
    short = {f"{name}_median": float(np.median(values)) for name, values in found.items() if isinstance(values, list)}
    return {**found, **short}


if __name__ == "__main__":
    # As in the commands that users give.
    leave_out.the_process_is_ours()
    if sys.argv[1] == "--ready":
        make_ready(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
