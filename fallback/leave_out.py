"""Libraries that others import if they are there, and that are better not there."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast


@contextmanager
def without_sklearn() -> Iterator[None]:
    """transformers imports scikit-learn, where it is installed, for a way of generating that nobody asks for: 1.1 of
    the 5 s that its model classes take to import. What is imported meanwhile finds it not installed."""
    if "sklearn" in sys.modules:
        yield
        return
    sys.modules["sklearn"] = cast(Any, None)
    try:
        yield
    finally:
        del sys.modules["sklearn"]


def a_broken_triton() -> None:
    """One that raises anything but ImportError would take torch's, bitsandbytes' and TRL's own imports with it, though
    none of them needs it where Triton cannot run."""
    try:
        import triton  # noqa: F401
    except ImportError:
        pass
    except Exception:
        sys.modules["triton"] = cast(Any, None)
