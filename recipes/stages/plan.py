"""What a full-size training needs: parameters, steps, memory and time, before a byte is downloaded."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from fallback import cards
from fallback.cards import CARDS as CARDS
from fallback.cards import GIB
from fallback.choose import BACKENDS, BackendName, Choice, choose
from fallback.gpu import Gpu
from recipes.stages.base_model import architecture
from recipes.stages.recipe import Recipe, Settings, UserError
from recipes.stages.train import optimizer_steps

# What the allocator wastes, and the CUDA context with its libraries.
SLACK, _CONTEXT = 0.06, round(0.75 * GIB)
_TIGHT = 0.95
REFERENCE = "RTX 4090"
"""Memory is told for a card of this kind: bfloat16 in hardware, Triton. Verdicts are calculated for each card's own."""


@dataclass(frozen=True)
class Planned:
    """A training, calculated."""

    total_parameters: int
    trainable_parameters: int
    adapter_bytes: int
    optimizer_steps: int
    flops_per_token: float
    """Of a training step at full length, all of it carrying loss; attention's own products are not counted."""
    flops_per_step: int
    memory_bytes: dict[str, dict[str, int]]
    """Backend -> term -> bytes."""

    def allocated(self, backend: str) -> int:
        """What torch.cuda.max_memory_allocated would say."""
        return sum(size for name, size in self.memory_bytes[backend].items() if name not in ("slack", "context"))


def plan(recipe: Recipe, settings: Settings, rows: int) -> Planned:
    """By the real model code on the meta device; every example as long as max_length allows, all of it carrying loss:
    the worst batch that the settings admit."""
    gpu = card(REFERENCE)
    network = _network(recipe, _size(settings), choice_for(recipe, settings, gpu).dtype)
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    total = sum(p.numel() for p in network.parameters()) - trainable
    tokens = settings.batch_size * settings.accumulation * settings.max_length
    flops = training_flops(network, settings)
    backends = [name for name in reversed(BACKENDS) if runs_on(name, recipe, gpu)]
    memory: dict[str, dict[str, int]] = {name: memory_on(recipe, settings, gpu, name) for name in backends}
    return Planned(
        total, trainable, adapter_bytes(network), optimizer_steps(rows, settings), flops / tokens, flops, memory
    )


def choice_for(recipe: Recipe, settings: Settings, gpu: Gpu, backend: BackendName = "peft") -> Choice:
    """What train would decide there. Whether Unsloth imports is not tried."""
    attention = "auto" if settings.attention == "flash_attention_2" else settings.attention
    kind = architecture(recipe)["model_type"]
    chosen = choose(kind, "peft", settings.quantization, settings.optimizer, gpu, attention)
    return replace(chosen, backend=backend)


def runs_on(backend: BackendName, recipe: Recipe, gpu: Gpu) -> bool:
    from fallback.components import liger_types

    triton = gpu.capability >= (7, 0)
    if backend == "peft+liger":
        return triton and architecture(recipe)["model_type"] in liger_types()
    return backend == "peft" or triton


def conditions(recipe: Recipe, choice: Choice, settings: Settings) -> Any:
    """What a step is computed with, for footprint."""
    from recipes.stages.footprint import Conditions

    cuda = choice.device == "cuda"
    if choice.backend == "unsloth":
        # On a CPU it has a function of its own for some families' loss, where nobody asks for probabilities.
        summed = architecture(recipe)["model_type"] == "llama" and not recipe.closed
        loss = "unsloth" if cuda else "unsloth on a CPU" + ", summed" * summed
    else:
        loss = "fused" if choice.triton else "chunked"
    return Conditions(
        choice.backend, cuda, choice.dtype, choice.attention, choice.quantization, settings.checkpointing,
        loss,  # type: ignore[arg-type]
    )  # fmt: skip


def memory_on(recipe: Recipe, settings: Settings, gpu: Gpu, backend: BackendName = "peft") -> dict[str, int]:
    """The terms on this card: without bfloat16 in hardware some models have to be computed in float32."""
    choice = choice_for(recipe, settings, gpu, backend)
    on = conditions(recipe, choice, settings)
    without, whole = (_peak(recipe, settings, other) for other in (replace(on, loss="none"), on))
    loss_head = max(0, whole - without)
    found = {**_held(recipe, settings, choice), "activations": without, "loss_head": loss_head}
    return {**found, "slack": round(SLACK * sum(found.values())), "context": _CONTEXT}


def need(recipe: Recipe, settings: Settings, gpu: Gpu, backend: BackendName = "peft") -> int:
    """Bytes that must be free on the card."""
    choice = choice_for(recipe, settings, gpu, backend)
    on = conditions(recipe, choice, settings)
    held = sum(_held(recipe, settings, choice).values())
    return round((1 + SLACK) * (held + _peak(recipe, settings, on))) + _CONTEXT


def hopeless(recipe: Recipe, settings: Settings, gpu: Gpu) -> bool:
    """What is held before any step is too much already: no batch has to be tried."""
    return sum(_held(recipe, settings, choice_for(recipe, settings, gpu)).values()) > gpu.memory_bytes


def _held(recipe: Recipe, settings: Settings, choice: Choice) -> dict[str, int]:
    """Whatever the batch and the kernels are."""
    return _held_bytes(recipe, _size(settings), choice.dtype, choice.optimizer)


def _size(settings: Settings) -> tuple[int, tuple[str, ...], Any]:
    """What the network's parameters follow from."""
    return settings.lora_rank, settings.lora_targets, settings.quantization


# Many cards share one calculation, and one card asks for the same more than once.
@cache
def _held_bytes(recipe: Recipe, size: tuple[int, tuple[str, ...], Any], dtype: Any, optimizer: str) -> dict[str, int]:
    from recipes.stages import footprint

    on = footprint.Conditions(dtype=dtype, quantization=size[2])
    return footprint.held_bytes(_network(recipe, size, dtype), on, optimizer)


@cache
def _network(recipe: Recipe, size: tuple[int, tuple[str, ...], Any], dtype: Any) -> Any:
    from recipes.stages import footprint

    rank, targets, quantization = size
    on = footprint.Conditions(dtype=dtype, quantization=quantization)
    return footprint.meta_network(architecture(recipe), Settings(lora_rank=rank, lora_targets=targets), on)


@cache
def _peak(recipe: Recipe, settings: Settings, on: Any) -> int:
    from recipes.stages import footprint

    return footprint.peak_bytes(architecture(recipe), settings, on, full_batches(settings))


def full_batches(settings: Settings) -> list[Any]:
    """Where a step has several parts, the last: the gradients of the others are there."""
    from recipes.stages.footprint import Batch

    step, length = settings.batch_size * settings.accumulation, settings.max_length
    shapes = [(settings.batch_size, length)]
    if settings.batch_tokens:
        # As many of the longest as there is room for, or one more, if they are a little shorter.
        rows = min(step, max(1, settings.batch_tokens // length))
        shapes = [(rows, length)]
        if rows < step and settings.batch_tokens > rows * length:
            shapes.append((rows + 1, settings.batch_tokens // (rows + 1)))
    return [Batch(rows, length, rows * (length - 1), first=shapes == [(step, length)]) for rows, length in shapes]


def verdict(bytes_needed: int, gpu: Gpu) -> str:
    if bytes_needed <= _TIGHT * gpu.memory_bytes:
        return "fits"
    return "tight" if bytes_needed <= gpu.memory_bytes else "does not fit"


def largest_batch(recipe: Recipe, settings: Settings, gpu: Gpu) -> int:
    """At the settings' length; 0 where not even one example fits. Every example adds the same."""
    if hopeless(recipe, settings, gpu):
        return 0
    at = settings.batch_size
    one, two = (need(recipe, replace(settings, batch_size=n, batch_tokens=None), gpu) for n in (at, 2 * at))
    return max(0, int(at + (_TIGHT * gpu.memory_bytes - one) / ((two - one) / at)))


def largest_length(recipe: Recipe, settings: Settings, gpu: Gpu) -> int:
    """At the settings' batch size, in steps of 64: through three lengths, since masks (and eager attention) grow with
    its square."""
    if hopeless(recipe, settings, gpu):
        return 0
    at = settings.max_length
    lengths = at, 2 * at, 4 * at
    a, b, c = (need(recipe, replace(settings, max_length=n, batch_tokens=None), gpu) for n in lengths)
    room = _TIGHT * gpu.memory_bytes
    first, second = (b - a) / at, (c - b) / (2 * at)
    bend = (second - first) / (lengths[2] - lengths[0])
    slope = first - bend * (lengths[0] + lengths[1])
    start = a - slope * at - bend * at * at
    if start >= room:
        return 0
    if bend <= 0:
        longest = (room - start) / slope
    else:
        longest = (-slope + (slope * slope + 4 * bend * (room - start)) ** 0.5) / (2 * bend)
    return min(int(longest) // 64 * 64, architecture(recipe)["max_position_embeddings"])


def otherwise(recipe: Recipe, settings: Settings) -> dict[str, dict[str, int]]:
    """What activations and the loss head take under plain PEFT if they are computed in other ways."""
    on = conditions(recipe, choice_for(recipe, settings, card(REFERENCE)), settings)
    # Gemma 2 caps its attention scores, which the fused kernel cannot.
    kinds = ("eager",) if on.attention == "eager" else ("sdpa", "eager")
    without = _peak(recipe, settings, replace(on, loss="none"))
    heads: tuple[Any, ...] = ("full logits", "chunked", "fused")
    return {
        "activations": {
            f"{attention}{', checkpointing' * kept}": _peak(
                recipe, settings, replace(on, attention=attention, checkpointing=kept, loss="none")
            )
            for attention in kinds
            for kept in (True, False)
        },
        "loss_head": {head: max(0, _peak(recipe, settings, replace(on, loss=head)) - without) for head in heads},
    }


def remedies(settings: Settings) -> Iterator[tuple[str, Settings]]:
    """What to change, the harmless first, each on top of those before."""
    flags: list[str] = []
    steps: list[tuple[str, dict[str, Any]]] = [
        ("--checkpointing", {"checkpointing": True}),
        ("--quantization 4bit", {"quantization": "4bit"}),
        ("--optimizer paged_adamw_8bit", {"optimizer": "paged_adamw_8bit"}),
    ]
    tokens = settings.batch_tokens or 0
    while tokens > settings.max_length:
        tokens = max(settings.max_length, tokens // 2)
        steps.append((f"--batch-tokens {tokens}", {"batch_tokens": tokens}))
    rows = 1 if settings.batch_tokens else settings.batch_size
    while rows > 1:
        rows //= 2
        parts = settings.batch_size * settings.accumulation // rows
        steps.append((f"--batch-size {rows} --accumulation {parts}", {"batch_size": rows, "accumulation": parts}))
    for shorter in (settings.max_length // 2, settings.max_length // 4):
        flag, change = f"--max-length {shorter}", {"max_length": shorter}
        if settings.batch_tokens:
            fewer = min(settings.batch_tokens, shorter)
            flag, change = f"--batch-tokens {fewer} {flag}", {**change, "batch_tokens": fewer}
        steps.append((flag, change))
    for flag, changes in steps:
        changed = replace(settings, **changes)
        if changed == settings:
            continue
        flags = [other for other in flags if other.split()[0] != flag.split()[0]] + [flag]
        settings = changed
        yield " ".join(flags), settings


def remedy(recipe: Recipe, settings: Settings, gpu: Gpu) -> str | None:
    """The least that has to be changed for this card; None where nothing of it is enough."""
    for flags, changed in remedies(settings):
        if not hopeless(recipe, changed, gpu) and verdict(need(recipe, changed, gpu), gpu) == "fits":
            return flags
    return None


def presets(recipe: Recipe, settings: Settings, gpu: Gpu) -> dict[str, str]:
    """Preset -> verdict, in the recipe's order of quality."""
    return {
        name: verdict(need(recipe, replace(settings, **recipe.presets[name]), gpu), gpu)
        for name in recipe.presets_by_quality
    }


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
