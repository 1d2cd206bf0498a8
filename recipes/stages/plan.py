"""What a full-size training needs: parameters, steps, memory, before a byte is downloaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fallback import cards
from fallback.cards import CARDS as CARDS
from fallback.cards import GIB
from fallback.choose import choose
from fallback.gpu import Gpu
from recipes.stages.base_model import architecture
from recipes.stages.console import say
from recipes.stages.recipe import Recipe, Settings, UserError
from recipes.stages.train import optimizer_steps

# What the allocator wastes, and the CUDA context with its libraries.
_SLACK, _CONTEXT = 1.06, round(0.75 * GIB)
_TIGHT = 0.95


@dataclass(frozen=True)
class Planned:
    """A training, calculated."""

    total_parameters: int
    trainable_parameters: int
    adapter_bytes: int
    optimizer_steps: int
    flops_per_step: int
    memory_bytes: dict[str, int]
    """Term -> bytes, under plain PEFT with the fused loss."""
    per_token_bytes: float
    """What another token in a batch adds to the peak."""

    model_type: str

    def on(self, gpu: Gpu) -> dict[str, int]:
        """The terms on this card: without bfloat16 in hardware some models have to be computed in float32."""
        choice = choose(self.model_type, "peft", gpu=gpu)
        wide = ("unquantized_weights", "activations", "loss_head") if choice.dtype == "float32" else ()
        return {name: size * (2 if name in wide else 1) for name, size in self.memory_bytes.items()}


def device_need(allocated: float) -> int:
    return round(allocated * _SLACK) + _CONTEXT


def plan(recipe: Recipe, settings: Settings, rows: int) -> Planned:
    """By the real model code on the meta device; every example as long as max_length allows, all of it carrying loss:
    the worst batch that the settings admit."""
    from recipes.stages import footprint

    kind = architecture(recipe)["model_type"]
    attention = choose(kind, "peft", gpu=card("RTX 4090"), attention=settings.attention).attention
    network = footprint.meta_network(recipe, settings, settings.quantization, attention)
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    total = sum(p.numel() for p in network.parameters()) - trainable
    weights = footprint.weight_bytes(network, settings.quantization)
    flops = training_flops(network, settings)
    at, length = settings.batch_size, settings.max_length
    step, larger = (footprint.step_bytes(network, n, length, n * length, settings.checkpointing) for n in (at, 2 * at))
    memory = {
        "quantized_weights": weights["quantized"],
        "unquantized_weights": weights["unquantized"],
        "lora_weights": 4 * trainable,
        "gradients": 4 * trainable,
        "optimizer": (2 if "8bit" in settings.optimizer else 8) * trainable,
        "activations": step.activations,
        "loss_head": step.loss_head,
    }
    more = larger.activations + larger.loss_head - step.activations - step.loss_head
    return Planned(
        total,
        trainable,
        adapter_bytes(network),
        optimizer_steps(rows, settings),
        flops,
        memory,
        more / (at * length),
        kind,
    )


def training_flops(network: Any, settings: Settings) -> int:
    """Of one optimiser step's matrix products at full length; with checkpointing the forward pass is done twice."""
    tokens = settings.batch_size * settings.accumulation * settings.max_length
    head = network.get_output_embeddings()
    linear = [m for m in network.modules() if hasattr(m, "in_features") and not hasattr(m, "base_layer")]
    frozen = sum(m.in_features * m.out_features for m in linear if not m.weight.requires_grad and m is not head)
    lora = sum(m.in_features * m.out_features for m in linear if m.weight.requires_grad)
    passes = 6 if settings.checkpointing else 4
    return tokens * (passes * frozen + (passes + 2) * lora + 4 * head.in_features * head.out_features)


def adapter_bytes(network: Any) -> int:
    """Of adapter_model.safetensors: the float32 matrices, and a header that names them."""
    import json

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, parameter in sorted((n.replace(".default", ""), p) for n, p in network.named_parameters()):
        if parameter.requires_grad:
            size = 4 * parameter.numel()
            span = [offset, offset + size]
            header[name] = {"dtype": "F32", "shape": list(parameter.shape), "data_offsets": span}
            offset += size
    told = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-told // 8) * 8 + offset


def card(name: str) -> Gpu:
    """A card by its name, its memory as in 12GB, or name:capability:GiB."""
    try:
        return cards.card(name)
    except ValueError as error:
        raise UserError(f"--gpu {error}") from None


def verdict(planned: Planned, gpu: Gpu) -> str:
    need = device_need(sum(planned.on(gpu).values()))
    if need <= _TIGHT * gpu.memory_bytes:
        return "fits"
    return "tight" if need <= gpu.memory_bytes else "does not fit"


def most_tokens(planned: Planned, settings: Settings, gpu: Gpu) -> int:
    """How many tokens a batch may hold on this card; 0 where not even the weights fit."""
    memory = planned.on(gpu)
    wider = memory["activations"] / max(1, planned.memory_bytes["activations"])
    spare = (gpu.memory_bytes * _TIGHT - _CONTEXT) / _SLACK - sum(memory.values())
    return max(0, int(settings.batch_size * settings.max_length + spare / (planned.per_token_bytes * wider)))


def as_json(planned: Planned, settings: Settings, gpus: Sequence[Gpu]) -> dict[str, Any]:
    return {
        "total_parameters": planned.total_parameters,
        "trainable_parameters": planned.trainable_parameters,
        "adapter_bytes": planned.adapter_bytes,
        "optimizer_steps": planned.optimizer_steps,
        "flops_per_step": planned.flops_per_step,
        "memory_bytes": {"peft": planned.memory_bytes},
        "peak_bytes": {"peft": sum(planned.memory_bytes.values())},
        "fits": {gpu.name: verdict(planned, gpu) for gpu in gpus},
        "most_tokens_per_batch": {gpu.name: most_tokens(planned, settings, gpu) for gpu in gpus},
        "error_last_measured": None,
    }


def tell(recipe: Recipe, settings: Settings, rows: int, planned: Planned, gpus: Sequence[Gpu], remedy: str) -> None:
    say(
        f"{recipe.base.hub_id} at full size, weights {settings.quantization}, batch {settings.batch_size} x "
        f"{settings.accumulation}, {settings.max_length} tokens each, checkpointing "
        + ("on" if settings.checkpointing else "off")
    )
    say(f"  parameters            {planned.total_parameters:>16,}")
    say(f"  of LoRA, trained      {planned.trainable_parameters:>16,}")
    say(f"  adapter on disk       {planned.adapter_bytes:>16,} bytes")
    say(f"  optimiser steps       {planned.optimizer_steps:>16,} for {rows:,} examples")
    say(f"  a step                {planned.flops_per_step / 1e12:>16,.1f} TFLOP at full length")
    say("memory at the peak, plain PEFT with the fused loss, all examples at full length:")
    for name, size in planned.memory_bytes.items():
        say(f"  {name.replace('_', ' '):<21} {size / GIB:>8.2f} GiB")
    allocated = sum(planned.memory_bytes.values())
    on_card = device_need(allocated) / GIB
    say(f"  allocated             {allocated / GIB:>8.2f} GiB; the card needs {on_card:.2f} GiB")
    say("calculated from the model's own code on the meta device; not yet checked against a GPU by this repository")
    for gpu in gpus:
        tokens = most_tokens(planned, settings, gpu)
        room = f"up to batch {tokens // settings.max_length} at {settings.max_length} tokens"
        if tokens < settings.max_length:
            room = f"one example of {tokens} tokens at the most" if tokens else "not even the weights"
        say(f"  {gpu.name:<18} {gpu.memory_bytes / GIB:>5.0f} GiB  {verdict(planned, gpu):<13} {room}")
    if any(verdict(planned, gpu) == "does not fit" for gpu in gpus):
        say(f"where it does not fit: {remedy}")
