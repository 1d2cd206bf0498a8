"""What a backend replaced in a loaded model: looked up in the live objects, not taken from anybody's word."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PATCHERS = ("unsloth", "unsloth_zoo", "unsloth_compiled_cache", "liger_kernel")
# Ours, under plain PEFT.
_OWN = ("fallback.passes", "fallback.attention")
ATTEND = "attend_by"
"""What a module calls the attention that fallback.attention taught it."""
LAYERS_COMPILED = "layers_are_compiled"
"""Says of a network that they are: to look at all of them takes longer than a pass over one token should."""


def patched(network: Any, trainer: Any = None) -> dict[str, int]:
    """What runs instead of the original -> how many modules, or methods of the trainer, run it. Empty: the original
    code runs."""
    found: Counter[str] = Counter()
    for module in network.modules():
        if module._compiled_call_impl is not None:
            found[f"{type(module).__name__}: torch.compile"] += 1
        forward = getattr(module.forward, "__func__", module.forward)
        for owner in (forward, type(module)):
            if _foreign(owner):
                found[f"{type(module).__name__}: {_name(owner)}"] += 1
                break
        if attend := vars(module).get(ATTEND):
            found[f"{type(module).__name__}: {_name(attend)}"] += 1
        if hasattr(module, "neftune_noise_alpha") and module._forward_hooks:
            found[f"{type(module).__name__}: NEFTune noise, alpha {module.neftune_noise_alpha:g}"] += 1
    base = network.get_base_model() if hasattr(network, "get_base_model") else network
    for module_name in {type(module).__module__ for module in base.modules() if _is_model_code(type(module))}:
        for name, value in vars(sys.modules[module_name]).items():
            # Ours asks each module, which is told of above.
            if (
                callable(value)
                and not isinstance(value, type)
                and _foreign(value)
                and not hasattr(value, "asks_module")
            ):
                found[f"{module_name.rpartition('.')[2]}.{name}: {_name(value)}"] += 1
    for kind in type(trainer).__mro__ if trainer is not None else ():
        replaced = [value for value in vars(kind).values() if callable(value) and _foreign(value)]
        if replaced:
            libraries = sorted({str(value.__module__).partition(".")[0] for value in replaced})
            found[f"{kind.__name__}: methods of {', '.join(libraries)}"] = len(replaced)
    return dict(sorted(found.items()))


def loaded_patchers() -> list[str]:
    """Patching libraries that are in this process."""
    return [name for name in PATCHERS if name in sys.modules]


@contextmanager
def uncompiled(network: Any) -> Iterator[None]:
    """For passes without gradients. Unsloth compiles layers and parts of them, on a GPU unasked, and `compiled` does
    where it is asked to; anew for what differs from before: a cache, a mask of another kind, one row more. In training
    that settles after a few steps. Answers differ from each other in all of it, and an evaluation that takes seconds
    waited for the compiler for more than a minute."""
    if "unsloth" not in loaded_patchers() and not getattr(network, LAYERS_COMPILED, False):
        # Nothing is compiled, and asking would load the compiler.
        yield
        return
    import torch

    stances: list[Any] = []

    def before(*_: Any) -> None:
        stances.append(torch.compiler.set_stance("force_eager"))

    def after(*_: Any) -> None:
        stances.pop().__exit__(None, None, None)

    # At each pass, not once around all: Unsloth's generate() goes back to compiling as it begins.
    inner = (network.get_base_model() if hasattr(network, "get_base_model") else network).base_model
    hooks = inner.register_forward_pre_hook(before), inner.register_forward_hook(after, always_call=True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _foreign(value: Any) -> bool:
    module = str(getattr(value, "__module__", ""))
    library = module.partition(".")[0]
    # What Unsloth compiles on a GPU stands in modules that it writes itself, unsloth_compiled_module_….
    return module in _OWN or library in PATCHERS or library.startswith(("unsloth_compiled_module", "unsloth_cache_"))


def _name(value: Any) -> str:
    return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__name__)}"


def _is_model_code(kind: type) -> bool:
    return kind.__module__.startswith("transformers.models.")
