"""What the processor can multiply, and what it takes to do so. Asks the system, not torch: the answer must not cost an
import."""

from contextlib import suppress
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
_BFLOAT16 = ("amx_bf16", "avx512_bf16")


@cache
def bfloat16() -> str | None:
    """The instructions with which it multiplies bfloat16; None where torch would do so in plain loops, and where nobody
    measured it: not x86, not Linux."""
    has = instructions()
    return next((name for name in _BFLOAT16 if name in has), None)


def instructions() -> list[str]:
    """By Linux's names; nothing where it is not Linux."""
    with suppress(OSError):
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("flags"):
                return line.split()[2:]
    return []


def rounded(rows: int) -> int:
    """As many or a few more: a number that comes up again. oneDNN, which multiplies bfloat16, writes code for each new
    shape and keeps a thousand of them: a millisecond and half a MiB for each of the thirty products of a step, and a
    step of a small model takes 200. At most a thirtieth is added, or fifteen."""
    each = max(16, 1 << max(0, rows.bit_length() - 6))
    return -(-rows // each) * each
