"""Ways of doing the same thing, taking turns: functions in one process, or processes of which one runs at a time."""

import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping

CHANNEL = "BENCH_TURNS"
"""Names the socket on which a process is told that it is its turn."""


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


class Turns:
    """Of a process that bench.launch.in_turns has started beside others; in any other, nobody waits. To be made once,
    as it begins."""

    def __init__(self) -> None:
        # Not for the processes that this one starts.
        told = os.environ.pop(CHANNEL, None)
        self._channel = socket.socket(fileno=int(told)) if told else None
        if self._channel:
            self._channel.set_inheritable(False)
            if sys.platform == "linux":
                # Stopped, it would outlive a parent that was killed, and keep its memory. PR_SET_PDEATHSIG looks at
                # the thread that started it: in_turns is for a main thread.
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)

    @property
    def alone(self) -> bool:
        return self._channel is None

    def wait(self) -> None:
        """This turn is over; come back when the next one begins."""
        if self._channel:
            try:
                self._channel.sendall(b".")
                told = self._channel.recv(1)
            except OSError:
                told = b""
            if not told:
                sys.exit("whoever measures this is gone")
