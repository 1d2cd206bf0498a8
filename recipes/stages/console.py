"""What the user sees, and what is held back from them.

The libraries announce themselves, warn and count on the same two streams that errors come from. Their output
goes to a file in the run's logs/; ours goes to the terminal through a descriptor of its own.
"""

import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from recipes.stages import processes

_own_stdout: Any = None
_own_stderr: Any = None


def _stdout() -> Any:
    """Where we write: the standard output this process began with, even while it is redirected. Of several processes
    the first speaks for all."""
    return _silence() if processes.rank() else _own_stdout or sys.stdout


@cache
def _silence() -> Any:
    return open(os.devnull, "w", encoding="utf-8")


def console() -> Console:
    return Console(file=_stdout(), highlight=False, soft_wrap=True)


def write(text: str) -> None:
    """To the user, as it is: file names and data may hold brackets that a markup would eat. Only no terminal is told
    what to do by what a file or a model says."""
    file = _stdout()
    file.write(text.replace("\x1b", "\u241b"))
    file.flush()


def say(text: str = "") -> None:
    write(text + "\n")


def note(text: str) -> None:
    """Beside what was asked for: to the standard error this process began with."""
    if not processes.rank():
        print(text, file=_own_stderr or sys.stderr, flush=True)


def typed() -> Any:
    """Standard input, whatever bytes come: one that is not text becomes a replacement character."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    return sys.stdin


def private(text: str) -> str:
    """Without what names this user: the home folder, and access tokens."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN", "WANDB_API_KEY"):
        if token := os.environ.get(name):
            text = text.replace(token, f"<{name}>")
    home = os.path.expanduser("~").rstrip("/")
    return re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text) if home else text


@contextmanager
def first_alone() -> Iterator[None]:
    """What the processes would all say alike, such as a command's help, is said by the first."""
    if not processes.rank():
        yield
        return
    with redirect_stdout(_silence()), redirect_stderr(_silence()):
        yield


@contextmanager
def held_back(log: Path) -> Iterator[None]:
    """Send whatever anybody but us prints to a log file, on the level of file descriptors: some of it is C++."""
    global _own_stdout, _own_stderr
    if _own_stdout is not None:
        yield
        return
    if processes.rank():
        log = Path(os.devnull)
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    _own_stdout, _own_stderr = (os.fdopen(os.dup(k), "w", encoding="utf-8", errors="replace") for k in kept)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for own in (_own_stdout, _own_stderr):
            own.close()
        _own_stdout = _own_stderr = None
        for descriptor, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)
        # Warnings name the files that they are about, and libraries lie in somebody's home.
        text = log.read_text(encoding="utf-8", errors="replace")
        if (told := private(text)) != text:
            log.write_text(told, encoding="utf-8")
        logging.lastResort = logging.StreamHandler(sys.stderr)


def duration(seconds: float) -> str:
    """For people: 48 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


def progress(what: str, unit: str = "") -> Progress:
    """A bar with the time left; nothing where the output is no terminal."""
    own = console()
    return Progress(
        TextColumn(f"{what}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=own,
        transient=True,
        disable=not own.is_terminal,
    )
