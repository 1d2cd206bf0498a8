"""Questions that only an import can answer, asked in a process of their own: here nothing may be imported before a
backend is chosen. Success is remembered by versions, in .cache/probes."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

CACHE = Path(__file__).parents[1] / ".cache" / "probes"
_SECONDS = 300


class Failed(Exception):
    """The import's own last line."""


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def probe(name: str, code: str, packages: tuple[str, ...], also: Any = None, hide_gpu: bool = False) -> str:
    """The last line that `code` prints. Remembered for as long as these packages' versions, and `also`, stay as they
    are; what fails is asked again the next time, since it may be mended without any version changing."""
    versions = {package: version(package) for package in packages}
    key = json.dumps([sys.executable, platform.python_version(), code, versions, also, hide_gpu])
    known = CACHE / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if known.is_file():
        return json.loads(known.read_text(encoding="utf-8"))
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True, text=True, timeout=_SECONDS, stdin=subprocess.DEVNULL,
            env={**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if hide_gpu else {})},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Failed("it did not import within five minutes") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise Failed(f"it does not import: {lines[-1] if lines else 'it was killed'}")
    said = (done.stdout.splitlines() or [""])[-1]
    known.parent.mkdir(parents=True, exist_ok=True)
    beside = known.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(said), encoding="utf-8")
    beside.replace(known)
    return said
