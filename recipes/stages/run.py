"""Run: one directory with everything that made it, and how files get into it."""

import json
import os
import platform
import secrets
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from recipes.stages.recipe import Recipe, UserError

ROOT = Path("runs")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to beside the real one, whose place it takes when all is written."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def writing(path: Path, newline: str | None = None) -> Iterator[IO[str]]:
    """A text file that appears under its name when it is finished, or not at all."""
    with replacing(path) as beside, beside.open("w", encoding="utf-8", newline=newline) as file:
        yield file


def write_whole(path: Path, text: str) -> None:
    with writing(path) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


class BrokenFile(UserError, ValueError):
    """A file of a run that does not hold what we wrote."""


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BrokenFile(f"{path}: not the JSON that was written there ({error})") from None


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


@dataclass(frozen=True)
class Run:
    """Files of one run. Stages ask for paths here and write through writing() alone."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "training_config.json"

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    @property
    def prepared(self) -> bool:
        return (self.data / "metadata.json").is_file()

    @property
    def trained(self) -> bool:
        return (self.adapter / "adapter_config.json").is_file()

    def add_metrics(self, **values: Any) -> None:
        """Stages add their part to metrics.json; what other stages wrote stays."""
        known = read_json(self.metrics) if self.metrics.is_file() else {}
        write_json(self.metrics, {**known, **values})


def new_run(recipe: Recipe, path: Path | None = None) -> Run:
    if path is None:
        path = ROOT / recipe.name / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    run = Run(path)
    run.logs.mkdir(parents=True, exist_ok=True)
    return run


def place_beside(path: Path | None) -> Path:
    """A folder that exists, on the file system where the run will be."""
    place = path or ROOT
    while not place.is_dir():
        place = place.parent
    return place


def find_run(recipe: Recipe, path: Path | None, wanted: Callable[[Run], bool], remedy: str) -> Run:
    """The run a later stage reads: the one named, else this recipe's newest that has what is wanted."""
    if path is not None:
        run = Run(path)
        if not path.is_dir():
            raise UserError(f"--run {path}: no such folder; {remedy}")
        if not wanted(run):
            raise UserError(f"--run {path}: not complete; {remedy}")
        return run
    folders = sorted((ROOT / recipe.name).glob("*"), reverse=True)
    for folder in folders:
        if wanted(Run(folder)):
            return Run(folder)
    raise UserError(f"no finished run of {recipe.name} in {ROOT / recipe.name}; {remedy}")


_RELEVANT = (
    "torch", "transformers", "trl", "peft", "unsloth", "unsloth_zoo", "bitsandbytes", "accelerate", "datasets",
    "liger-kernel", "xformers", "triton", "tokenizers", "safetensors",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """What made a run, as far as it can be told without importing any of it."""
    from dataclasses import asdict

    from fallback.gpu import read_gpu

    gpu = read_gpu()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "gpu": asdict(gpu) if gpu else None,
        "versions": {name: _version(name) for name in _RELEVANT},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed_files": len((_git("status", "--porcelain") or "").splitlines()),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    import psutil

    return psutil.virtual_memory().total


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
