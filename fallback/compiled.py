"""Decoder layers through torch.compile, for plain PEFT on CPUs.

What a layer does beside its matrix products becomes a few loops over memory, and one call instead of hundreds. The last
layer is left out, whose parts are told anew in every step which tokens they are for. What is compiled is PEFT's own
LoRA and transformers' own norms (`passes` steps aside): the compiler sees through them, and took three times as long
for ours.
"""

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

from fallback import components, cpu
from fallback.choose import Choice
from fallback.patched import LAYERS_COMPILED

CACHE = Path(__file__).parents[1] / ".cache" / "compiled"
"""The compiler's own, which it would keep where a restart of the machine clears up."""

_LONG = 1800.0
"""Seconds from which a training is told of it: small models got through a step in 0.91 to 0.96 of the time, for half a
minute to a minute (results/train_bfloat16.json)."""


def obstacle(choice: Choice) -> str | None:
    if choice.device == "cuda":
        return "on a GPU nobody has tried it; Unsloth compiles layers there by itself"
    if choice.backend != "peft":
        return f"it is for plain PEFT, and this is {choice.backend}; take --backend peft"
    return components.torch_compile(None).obstacle


def get_ready() -> None:
    """Before torch is imported, which looks this up early. It finds what it kept by everything but the processor, for
    whose vectors it was written: a folder that several machines share, or one that moved, has a part for each."""
    made_for = " ".join([platform.machine(), *cpu.instructions(), os.environ.get("ATEN_CPU_CAPABILITY", "")])
    part = hashlib.sha256(made_for.encode()).hexdigest()[:12]
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE / part))
    # By itself it would look for g++ alone.
    os.environ.setdefault("CXX", components.cxx() or "g++")


def advice(choice: Choice, seconds: float) -> str:
    """For a training of so many seconds that does without."""
    if seconds < _LONG or obstacle(choice):
        return ""
    return "; --compile makes steps shorter, for a minute or less at the beginning, and says by how much"


def decoder_layers(network: Any) -> list[Any]:
    """Of a language model; what a vision tower sees is not text."""
    import torch

    lists = (m for name, m in network.named_modules() if isinstance(m, torch.nn.ModuleList) and "vision" not in name)
    return list(next(lists, ()))


def teach(network: Any) -> None:
    """A network with LoRA, in place: its layers are compiled as they are first used, for any length, once for each kind
    of them, once more where there is nothing below to hand gradients to, and where a window is longer than a batch."""
    import torch

    # Beyond the limit, eight by itself, layers would run as they are written, without a word.
    torch._dynamo.config.recompile_limit = max(16, torch._dynamo.config.recompile_limit)
    setattr(network, LAYERS_COMPILED, True)
    for layer in decoder_layers(network)[:-1]:
        layer.compile(dynamic=True)
