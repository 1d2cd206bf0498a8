"""What plan calculated, as JSON and in words."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fallback.gpu import Gpu
from recipes.stages import plan
from recipes.stages.console import duration, say
from recipes.stages.pace import UTILISATION, flops_per_second
from recipes.stages.plan import GIB, Planned
from recipes.stages.plan_data import Counted
from recipes.stages.recipe import Recipe, Settings
from recipes.stages.run import read_json

_RESULTS = Path(__file__).parents[2] / "results"
CHECKED = _RESULTS / "plan_check_gpu.json", _RESULTS / "plan_check.json"
"""What `python -m bench plan --check` found last, on a GPU and without one: what a GPU said counts more."""


def errors(recipe: Recipe, checked: Sequence[Path] = CHECKED) -> dict[str, tuple[float | None, str]]:
    """Backend -> the largest error of a term that was measured for this recipe, and where; None if none was."""
    files = [read_json(file) for file in checked if file.is_file()]
    found: dict[str, tuple[float | None, str]] = {}
    for backend in ("peft", "peft+liger", "unsloth"):
        found[backend] = (None, "never measured")
        for file in files:
            ours = [
                case
                for case in file["cases"]
                if (case["recipe"], case["backend"]) == (recipe.name, backend) and "terms" in case
            ]
            terms = [abs(t["error"]) for case in ours for t in case["terms"].values() if t["error"] is not None]
            if terms:
                where = ", ".join(sorted({f"size {case['size']}" for case in ours}))
                found[backend] = max(terms), f"{where} on {file['device']}"
                break
    return found


def training_seconds(planned: Planned, settings: Settings, counted: Counted, per_second: float) -> float:
    """By its matrix products: all tokens as often as there are epochs, at an assumed share of the device's speed."""
    steps_of_all = planned.optimizer_steps * settings.batch_size * settings.accumulation
    tokens = counted.tokens_per_epoch / max(1, counted.rows) * min(steps_of_all, counted.rows * settings.epochs)
    return tokens * planned.flops_per_token / (per_second * UTILISATION)


def seconds_by_device(
    recipe: Recipe, settings: Settings, planned: Planned, counted: Counted, gpus: Sequence[Gpu], here: dict[str, float]
) -> dict[str, float | None]:
    """`here`: devices of this machine -> what they reached in a large matrix product."""
    found: dict[str, float | None] = {}
    for gpu in gpus:
        speed = here.get(gpu.name) or flops_per_second(gpu, plan.choice_for(recipe, settings, gpu).dtype)
        found[gpu.name] = training_seconds(planned, settings, counted, speed) if speed else None
    for name in here.keys() - found.keys():
        found[name] = training_seconds(planned, settings, counted, here[name])
    return found


def on_card(recipe: Recipe, settings: Settings, gpu: Gpu) -> dict[str, Any]:
    bytes_needed = plan.need(recipe, settings, gpu)
    fits = plan.verdict(bytes_needed, gpu)
    return {
        "memory_bytes": gpu.memory_bytes,
        "needed_bytes": bytes_needed,
        "verdict": fits,
        "largest_batch": plan.largest_batch(recipe, settings, gpu),
        "largest_length": plan.largest_length(recipe, settings, gpu),
        "change_first": plan.remedy(recipe, settings, gpu) if fits != "fits" else None,
    }


def as_json(
    recipe: Recipe, settings: Settings, planned: Planned, counted: Counted, gpus: Sequence[Gpu], here: dict[str, float]
) -> dict[str, Any]:
    cards = {gpu.name: on_card(recipe, settings, gpu) for gpu in gpus}
    measured = errors(recipe)
    return {
        "recipe": recipe.name,
        "model": recipe.base.hub_id,
        "total_parameters": planned.total_parameters,
        "trainable_parameters": planned.trainable_parameters,
        "adapter_bytes": planned.adapter_bytes,
        "rows": counted.rows,
        "optimizer_steps": planned.optimizer_steps,
        "tokens_per_epoch": counted.tokens_per_epoch,
        "tokens_counted": counted.how,
        "flops_per_step": planned.flops_per_step,
        "seconds": seconds_by_device(recipe, settings, planned, counted, gpus, here),
        "utilisation_assumed": UTILISATION,
        "memory_bytes": planned.memory_bytes,
        "peak_bytes": {name: sum(terms.values()) for name, terms in planned.memory_bytes.items()},
        "otherwise_bytes": plan.otherwise(recipe, settings),
        "fits": {name: card["verdict"] for name, card in cards.items()},
        "cards": cards,
        "error_last_measured": {name: error for name, (error, _) in measured.items()},
        "error_measured_where": {name: where for name, (_, where) in measured.items()},
    }


_SAID = {
    "quantized_weights": "weights in 4 or 8 bits",
    "unquantized_weights": "weights that stay wide",
    "embedding": "embedding (and head)",
    "lora_weights": "LoRA weights, float32",
    "gradients": "their gradients",
    "optimizer": "optimiser's state",
    "activations": "activations",
    "loss_head": "loss head, on top",
    "slack": "allocator's slack",
    "context": "CUDA context",
}


def tell(found: dict[str, Any], settings: Settings) -> None:
    """The JSON in words."""
    s = settings
    at_once = f", {s.batch_tokens} at once" if s.batch_tokens else ""
    say(
        f"{found['model']} at full size, weights {s.quantization}, batch {s.batch_size} x {s.accumulation}, "
        f"{s.max_length} tokens each{at_once}, checkpointing {'on' if s.checkpointing else 'off'}"
    )
    say(f"  parameters            {found['total_parameters']:>16,}")
    say(f"  of LoRA, trained      {found['trainable_parameters']:>16,}")
    say(f"  adapter on disk       {found['adapter_bytes']:>16,} bytes")
    say(f"  optimiser steps       {found['optimizer_steps']:>16,} for {found['rows']:,} examples")
    say(f"  tokens an epoch       {found['tokens_per_epoch']:>16,} ({found['tokens_counted']})")
    say(f"  a step                {found['flops_per_step'] / 1e12:>16,.1f} TFLOP at full length")
    backends = list(found["memory_bytes"])
    say("memory at the peak, GiB, all examples at full length:")
    say(f"  {'':<24}" + "".join(f"{name:>12}" for name in backends))
    for term, said in _SAID.items():
        say(f"  {said:<24}" + "".join(f"{found['memory_bytes'][name][term] / GIB:>12.2f}" for name in backends))
    say(f"  {'in all':<24}" + "".join(f"{found['peak_bytes'][name] / GIB:>12.2f}" for name in backends))
    other = found["otherwise_bytes"]
    for what, title in (("activations", "activations otherwise"), ("loss_head", "loss head otherwise")):
        say(f"{title}, GiB: " + ", ".join(f"{name} {size / GIB:.2f}" for name, size in other[what].items()))
    for name in backends:
        error, where = found["error_last_measured"][name], found["error_measured_where"][name]
        told = f"a term of the memory was last off by {error:.1%} at most ({where})" if error is not None else where
        say(f"{name}: {told}" + "; never held against a GPU" * ("CPU" in where or error is None))
    if "unsloth" in backends:
        say("what unsloth takes depends on how much is free: verdicts are for peft, and with the allocator's slack:")
    for name, card in found["cards"].items():
        _tell_card(name, card, s, found["seconds"].get(name))
    for name in found["seconds"].keys() - found["cards"].keys():
        say(f"  {name}: about {duration(found['seconds'][name])}")
    say(f"times take {found['utilisation_assumed']:.0%} of a card's dense peak for granted, which is an assumption")


def _tell_card(name: str, card: dict[str, Any], settings: Settings, seconds: float | None) -> None:
    room = (
        f"up to batch {card['largest_batch']} at {settings.max_length} tokens, "
        f"up to {card['largest_length']:,} tokens at batch {settings.batch_size}"
        if card["largest_batch"] or card["largest_length"]
        else "not even one example"
    )
    took = f"about {duration(seconds)}; " if seconds is not None and card["verdict"] != "does not fit" else ""
    say(f"  {name:<18} {card['memory_bytes'] / GIB:>5.0f} GiB  {card['verdict']:<13} {took}{room}")
    if card["verdict"] != "fits":
        say(f"      change first: take {card['change_first'] or 'a smaller model: nothing of this one fits'}")
