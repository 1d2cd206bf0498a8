"""Ways of doing the same thing, taking turns in one process."""

import time
from collections.abc import Callable, Mapping


def seconds_each(ways: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Way -> for every round how long one of the things took that it says it has done. A round before them warms up."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            count = way()
            if number:
                found[name].append((time.perf_counter() - began) / count)
    return found
