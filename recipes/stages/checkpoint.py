"""What a training that was stopped goes on from: folders checkpoints/step-N, whole or absent, each with checksums.

Tensors go to a safetensors file and everything else to JSON, so nothing here is ever unpickled.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from recipes.stages.run import Run, read_json

KEPT = 2
"""Checkpoints that stay: the newest, and the one before in case the newest is damaged."""
_STATE, _TENSORS, _SUMS = "state.json", "tensors.safetensors", "checksums.json"


def save(run: Run, step: int, state: Any, trainer_state: str) -> None:
    """Put down a state: dicts, lists and tuples of tensors, numbers and texts. `trainer_state` is the Trainer's own
    record, under the name that it looks for."""
    folder = run.checkpoints
    folder.mkdir(exist_ok=True)
    making = folder / f".step-{step}"
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    try:
        _fill(making, state, trainer_state)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    place = folder / f"step-{step}"
    shutil.rmtree(place, ignore_errors=True)
    making.replace(place)
    _flush(folder)
    for old in _by_age(run)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


def _fill(folder: Path, state: Any, trainer_state: str) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {}
    (folder / _STATE).write_text(json.dumps(_pack(state, "", tensors)), encoding="utf-8")
    (folder / "trainer_state.json").write_text(trainer_state, encoding="utf-8")
    save_file(tensors, folder / _TENSORS)
    sums = {path.name: _digest(path) for path in sorted(folder.iterdir())}
    (folder / _SUMS).write_text(json.dumps(sums), encoding="utf-8")
    for path in [*folder.iterdir(), folder]:
        # A machine that loses its power keeps what has reached the disk, in whatever order that was.
        _flush(path)


def load(path: Path) -> Any:
    from safetensors.torch import load_file

    return _unpack(read_json(path / _STATE), load_file(path / _TENSORS))


def newest(run: Run) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is what it was when it was written; what was wrong with newer ones."""
    complaints: list[str] = []
    for path in _by_age(run):
        damage = _damage(path)
        if damage is None:
            return path, complaints
        complaints.append(f"{path}: {damage}")
    return None, complaints


def step_of(path: Path | None) -> int:
    """0 stands for the start."""
    return int(path.name.removeprefix("step-")) if path else 0


def _by_age(run: Run) -> list[Path]:
    """The newest first."""
    found = run.checkpoints.iterdir() if run.checkpoints.is_dir() else ()
    return sorted((path for path in found if re.fullmatch(r"step-\d+", path.name)), key=step_of, reverse=True)


def _damage(path: Path) -> str | None:
    try:
        sums = read_json(path / _SUMS)
    except (OSError, ValueError) as error:
        return f"its checksums cannot be read ({error})"
    if not isinstance(sums, dict) or not {_STATE, _TENSORS, "trainer_state.json"} <= set(sums):
        return "its checksums are incomplete"
    for name, expected in sums.items():
        try:
            if _digest(path / Path(name).name) != expected:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _pack(value: Any, name: str, tensors: dict[str, Any]) -> Any:
    """JSON in which tensors stand by name. Dicts are lists of pairs: an optimiser's have numbers for keys."""
    import torch

    if isinstance(value, torch.Tensor):
        # A copy of its own: optimisers share tensors between parameters, which safetensors refuses to write.
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_pack(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]}
    return value


def _unpack(value: Any, tensors: dict[str, Any]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inside),) = value.items()
    if kind == "tensor":
        return tensors[inside]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in inside}
    items = [_unpack(item, tensors) for item in inside]
    return tuple(items) if kind == "tuple" else items
