"""Libraries that others import if they are there, and that are better not there."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest import mock

BY_TRANSFORMERS = ("sklearn", "scipy", "torchao")
"""transformers imports them, where they are installed, for a way of generating, a loss of detecting objects and a way
of quantising that nobody here asks for: 1.1, 0.5 and 0.3 of the 5 s that its model classes take to import."""


_process = {"ours": False}


def the_process_is_ours() -> None:
    """Said by commands, where nobody else's objects are about."""
    _process["ours"] = True


def let_go() -> None:
    """Free all that nobody can reach. A function that was running when the collector was told to pass over what there
    was (`without`) had its variables among it: through them a trained model would stay for good, beside the one that
    answers."""
    if _process["ours"]:
        gc.unfreeze()
    gc.collect()


@contextmanager
def without(*names: str) -> Iterator[None]:
    """What is imported meanwhile finds these libraries not installed, unless they have been imported before. Python's
    collector rests, and in a process of ours later passes over what is there now: it would look through all that
    imports make, again and again, and find nothing (1 of 15 s of a `predict`, 2 of a `plan`)."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update({name: cast(Any, None) for name in hidden})
    collecting, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
        if len(sys.modules) > known and _process["ours"]:
            gc.freeze()
        for name in hidden:
            if sys.modules.get(name, name) is None:
                del sys.modules[name]


def the_compiler() -> None:
    """bitsandbytes hands four functions to torch.compile as it is imported, for devices that have no kernels of its
    own, and torch loads its compiler for that: 0.8 s of every command. They stay as they are written."""
    import torch

    try:
        with mock.patch.object(torch, "compile", lambda function=None, **_: function or (lambda made: made)):
            import bitsandbytes  # noqa: F401
    except Exception:
        # Broken or absent: who needs it will say so.
        pass


def a_broken_triton() -> None:
    """One that raises anything but ImportError would take torch's, bitsandbytes' and TRL's own imports with it, though
    none of them needs it where Triton cannot run."""
    try:
        import triton  # noqa: F401
    except ImportError:
        pass
    except Exception:
        sys.modules["triton"] = cast(Any, None)
