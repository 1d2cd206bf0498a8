"""Run: one directory with everything that made it, and how files get into it."""

import ctypes
import errno
import fcntl
import json
import os
import platform
import re
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from recipes.stages import processes
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


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A folder to fill beside the real one, whose place it takes in one instant when all is there."""
    beside = path.with_name(f".{path.name}.making")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    if path.is_dir():
        _exchange(beside, path)
        shutil.rmtree(beside, ignore_errors=True)
    else:
        beside.replace(path)


def _exchange(one: Path, other: Path) -> None:
    """Folders cannot be renamed over each other; Linux can swap them, so that neither name is ever without one."""
    here, exchange = -100, 2
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if swap is None or swap(here, os.fsencode(one), here, os.fsencode(other), exchange) != 0:
        old = other.with_name(f".{other.name}.old")
        other.replace(old)
        one.replace(other)
        old.replace(one)


_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EROFS: "choose another folder with --run or --out",
    errno.EACCES: "choose another folder with --run or --out, or change its permissions",
    errno.EPERM: "choose another folder with --run or --out, or change its permissions",
    errno.ENOENT: "did somebody delete it?",
}


def explained(error: OSError) -> str:
    """What the system refused, in one line with its remedy."""
    where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{where}{error.strerror or ' '.join(str(error).split())}" + (f"; {remedy}" if remedy else "")


def as_system_error(error: Exception) -> OSError | None:
    """An OSError with a number, or what a library made of one: safetensors hides it in a text. Without a number it is
    the loader's, who found no library of a backend, and no matter of disks."""
    if isinstance(error, OSError):
        return error if error.errno else None
    hidden = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(hidden.group(1)), os.strerror(int(hidden.group(1)))) if hidden else None


def write_whole(path: Path, text: str) -> None:
    with writing(path) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


NOT_OURS = "not what was written there; make it anew with the command that made it"


class BrokenFile(UserError, ValueError):
    """A file of a run that does not hold what we wrote."""


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BrokenFile(f"{path}: {NOT_OURS} ({error})") from None


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                value = json.loads(line.decode("utf-8"))
                if not isinstance(value, dict):
                    raise TypeError(f"a JSON object is wanted, not {str(value)[:40]!r}")
            except (ValueError, TypeError, RecursionError) as error:
                raise BrokenFile(f"{path}, line {number}: {NOT_OURS} ({' '.join(str(error).split())})") from None
            yield value


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
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

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

    @property
    def unfinished(self) -> bool:
        """A training was begun here, and has not come to its end."""
        return self.config.is_file() and "train" not in self.known_metrics()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else trains in this folder meanwhile. The lock is the system's: it dies with its owner. Of several
        processes that train together, the first holds it."""
        if processes.rank():
            yield
            return
        with (self.path / ".lock").open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                raise UserError(
                    f"--run {self.path}: process {file.read().strip() or '?'} is training there; wait for it or stop it"
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def forget_training(self) -> None:
        """A training begins here: what is left of an earlier one would be taken for its own."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        for name in ("steps.jsonl", "validation.jsonl"):
            (self.path / name).unlink(missing_ok=True)
        if self.metrics.is_file():
            write_json(self.metrics, {k: v for k, v in self.known_metrics().items() if k != "train"})

    def add_metrics(self, **values: Any) -> None:
        """Stages add their part to metrics.json; what other stages wrote stays."""
        write_json(self.metrics, {**self.known_metrics(), **values})

    def known_metrics(self) -> dict[str, Any]:
        known = read_json(self.metrics) if self.metrics.is_file() else {}
        if not isinstance(known, dict):
            raise BrokenFile(f"{self.metrics}: {NOT_OURS} (or delete it)")
        return known


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
