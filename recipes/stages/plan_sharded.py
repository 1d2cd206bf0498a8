"""What each of several GPUs holds, by the engine that shares the work between them, and which engine to take.

Nothing here was held against GPUs: it is the single card's calculation, with what is divided divided, and what is put
together for a moment added.
"""

from functools import cache
from typing import Any

from fallback.gpu import Gpu
from recipes.stages import plan
from recipes.stages.base_model import architecture
from recipes.stages.console import say
from recipes.stages.plan import GIB
from recipes.stages.recipe import Recipe, Settings, UserError
from recipes.stages.train import optimizer_steps

ENGINES = ("ddp", "fsdp2", "zero3")
"""Names of recipes/accelerate/*.yaml, in the order in which to try them: each has the cards talk more than the last."""
# Parameters that ZeRO-3 keeps put together at most, by DeepSpeed's default.
_LIVE = 10**9


def as_json(recipe: Recipe, settings: Settings, rows: int, gpus: list[Gpu], count: int, one: Any) -> dict[str, Any]:
    """`one`: device -> seconds for one of them."""
    if count < 1:
        raise UserError(f"--gpus {count}: name one or more")
    effective = settings.batch_size * settings.accumulation
    return {
        "gpus": count,
        "examples_per_step": effective * count,
        "optimizer_steps": optimizer_steps(rows, settings, count),
        "same_steps": None if effective % count else same_steps(settings, count),
        "seconds": {name: seconds / count if seconds else None for name, seconds in one.items()},
        "cards": {gpu.name: on_cards(recipe, settings, gpu, count) for gpu in gpus},
    }


def same_steps(settings: Settings, count: int) -> dict[str, int]:
    """What keeps a step's examples what they are with one GPU."""
    each = settings.batch_size * settings.accumulation // count
    batch = max(size for size in range(1, settings.batch_size + 1) if each % size == 0)
    return {"batch_size": batch, "accumulation": each // batch}


def on_cards(recipe: Recipe, settings: Settings, gpu: Gpu, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {"engines": {}}
    for engine in ENGINES:
        if obstacle := why_not(engine, settings):
            found["engines"][engine] = {"verdict": "cannot", "reason": obstacle}
            continue
        terms = held(recipe, settings, gpu, count, engine)
        needed = sum(terms.values())
        # 4-bit weights are made on the card, and divided when they are all there.
        whole = engine == "fsdp2" and plan.choice_for(recipe, settings, gpu).quantization != "none"
        loaded = sum(_weights(recipe, settings, gpu)) + terms["context"] if whole else 0
        found["engines"][engine] = {
            "memory_bytes": terms,
            "needed_bytes": max(needed, loaded),
            "verdict": plan.verdict(max(needed, loaded), gpu),
        }
    fitting = [name for name, told in found["engines"].items() if told["verdict"] == "fits"]
    return {**found, "take": fitting[0] if fitting else None}


def why_not(engine: str, settings: Settings) -> str | None:
    if engine == "fsdp2" and settings.quantization == "8bit":
        return "8-bit weights cannot be divided; take --quantization 4bit or none"
    if engine == "zero3" and settings.quantization != "none":
        return "DeepSpeed divides 16-bit weights; take --quantization none"
    return None


def held(recipe: Recipe, settings: Settings, gpu: Gpu, count: int, engine: str) -> dict[str, int]:
    """Term -> bytes on each GPU."""
    terms = plan.memory_on(recipe, settings, gpu)
    trained = {name: terms[name] for name in ("lora_weights", "gradients", "optimizer")}
    base = {name: terms[name] for name in ("quantized_weights", "unquantized_weights", "embedding")}
    rest = {name: terms[name] for name in ("activations", "loss_head")}
    if count == 1:
        return terms
    if engine == "ddp":
        # Gradients are averaged in buckets of their own.
        found = {**base, **trained, **rest, "put_together": terms["gradients"]}
    else:
        divisible, whole = _weights(recipe, settings, gpu)
        found = {
            "base_weights": -(-divisible // count) + whole,
            **{name: -(-size // count) for name, size in trained.items()},
            **rest,
            "put_together": _put_together(recipe, settings, gpu, engine, divisible),
        }
    slack = round(plan.SLACK * sum(found.values()))
    return {**found, "slack": slack, "context": terms["context"]}


def _weights(recipe: Recipe, settings: Settings, gpu: Gpu) -> tuple[int, int]:
    """Bytes of the base model that FSDP divides, and of what stays whole everywhere: 4-bit weights' scales."""
    sizes = _sizes(recipe, *_key(recipe, settings, gpu))
    return sizes["divisible"], sizes["scales"]


def _put_together(recipe: Recipe, settings: Settings, gpu: Gpu, engine: str, divisible: int) -> int:
    """The layer that is computed and the next, which is fetched meanwhile; and the head, which is kept from the end of
    the forward pass to the beginning of the backward pass."""
    dtype, quantization = _key(recipe, settings, gpu)
    sizes = _sizes(recipe, dtype, quantization)
    if engine == "zero3":
        return min(divisible, _LIVE * sizes["width"])
    return 2 * sizes["layer"] + sizes["head"]


def _key(recipe: Recipe, settings: Settings, gpu: Gpu) -> tuple[str, str]:
    choice = plan.choice_for(recipe, settings, gpu)
    return choice.dtype, choice.quantization


@cache
def _sizes(recipe: Recipe, dtype: str, quantization: str) -> dict[str, int]:
    from recipes.stages import footprint

    on = footprint.Conditions(dtype=dtype, quantization=quantization)  # type: ignore[arg-type]
    config = architecture(recipe)

    def of(layers: int) -> tuple[int, int]:
        network = footprint.meta_network(footprint.with_layers(config, layers), recipe.settings, on)
        found = footprint.weight_bytes(network, on)
        head = network.get_output_embeddings()
        linear = [m.weight.numel() for m in network.modules() if footprint.is_linear(m) and m is not head]
        frozen = sum(linear) - sum(p.numel() for p in network.parameters() if p.requires_grad)
        scales = found["quantized_weights"] - frozen // 2 if quantization == "4bit" else 0
        return sum(found.values()) - scales, scales

    layers = config["num_hidden_layers"]
    (few, few_scales), (more, more_scales) = of(2), of(3)
    layer, scales = more - few, more_scales - few_scales
    return {
        "width": on.width,
        "divisible": few + (layers - 2) * layer,
        "scales": few_scales + (layers - 2) * scales,
        "layer": layer,
        "head": on.width * config["vocab_size"] * config["hidden_size"],
    }


_SAID = {
    "ddp": "everything on each",
    "fsdp2": "weights divided",
    "zero3": "weights divided, by DeepSpeed",
}


def tell(found: dict[str, Any], settings: Settings) -> None:
    count = found["gpus"]
    say(
        f"on {count} GPUs a step has {found['examples_per_step']} examples, in all {found['optimizer_steps']:,} "
        "steps; "
        + (
            "--batch-size {batch_size} --accumulation {accumulation} keeps the steps of one GPU".format(
                **found["same_steps"]
            )
            if found["same_steps"]
            else f"the {settings.batch_size} x {settings.accumulation} of one cannot be shared evenly"
        )
    )
    for name, card in found["cards"].items():
        for engine, told in card["engines"].items():
            if told["verdict"] == "cannot":
                say(f"  {count} x {name:<16} {engine:<6} {told['reason']}")
                continue
            say(
                f"  {count} x {name:<16} {engine:<6} {told['verdict']:<13} "
                f"{told['needed_bytes'] / GIB:>6.2f} GiB each: {_SAID[engine]}"
            )
        say(
            f"      take {how(card['take'], count)}" if card["take"] else "      none of them fits; see the single card"
        )
    say("several GPUs are calculated from one, times divided by their number: neither was measured on GPUs")


def how(engine: str, count: int) -> str:
    if engine == "ddp":
        return f"ddp: torchrun --nproc_per_node {count} -m"
    return f"{engine}: accelerate launch --config_file recipes/accelerate/{engine}.yaml --num_processes {count} -m"
