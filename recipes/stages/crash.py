"""What a process leaves behind that dies of native code, of which no exception tells: Python's own last words."""

import faulthandler
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recipes.stages.run import Run


def _record(run: Run) -> Path:
    return run.logs / "crash.txt"


@contextmanager
def recorded(run: Run) -> Iterator[None]:
    """SIGSEGV, SIGILL and their like write down where they came from; SIGKILL, which somebody sent, does not."""
    before = faulthandler.is_enabled()
    with _record(run).open("w", encoding="utf-8") as file:
        faulthandler.enable(file, all_threads=False)
        try:
            yield
        finally:
            faulthandler.enable(sys.__stderr__) if before and sys.__stderr__ else faulthandler.disable()
            _record(run).unlink(missing_ok=True)


def before_first_step(run: Run) -> str | None:
    """The fault that ended the last training here before it had done a step."""
    record = _record(run)
    if (run.path / "steps.jsonl").is_file() and (run.path / "steps.jsonl").stat().st_size:
        return None
    said = record.read_text(encoding="utf-8", errors="replace").splitlines() if record.is_file() else []
    return said[0].removeprefix("Fatal Python error: ")[:80] if said else None
