"""Going on with a training that was stopped: where it stands, and whether it is still the same training."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fallback.choose import BACKENDS, Backend, BackendName, Choice, Dtype
from recipes.stages import crash
from recipes.stages import run as runs
from recipes.stages.base_model import Chosen
from recipes.stages.recipe import Balance, Recipe, Settings, UserError
from recipes.stages.run import NOT_OURS, BrokenFile, Run, read_json

# What may change without changing what is learned.
_HARMLESS = ("checkpoint_minutes",)
# What older runs have no word for, as it was for them.
_YOUNGER = {"compile": False}
DECISIONS = ("backend", "device", "dtype", "attention", "quantization", "optimizer", "triton")


@dataclass(frozen=True)
class Begun:
    """A training as it was begun: the defaults of its continuation."""

    run: Run
    config: dict[str, Any]
    choice: dict[str, Any]

    @property
    def settings(self) -> Settings:
        return settings_of(self.run)

    @property
    def processes(self) -> int:
        return int(self.config.get("processes", 1))

    @property
    def balance(self) -> Balance | None:
        return _from_json(Balance, self.config["balance"]) if "balance" in self.config else None

    @property
    def backend(self) -> Backend:
        """The one it was begun with, unless that died at once and nobody had named it."""
        named = str(self.choice["reasons"]["backend"]).startswith("--backend")
        return backend_of(self.run) if named or not crash.before_first_step(self.run) else "auto"

    @property
    def chosen(self) -> Chosen:
        return Chosen.opened(self.run.config)

    def changes(self, config: dict[str, Any], choice: Choice) -> list[str]:
        """What is not as it was, a line each."""
        whole = {**self.config, "settings": {**_YOUNGER, **self.config["settings"]}}
        before, now = _flat(whole, self.choice), _flat(config, choice.as_json())
        if self.processes != config["processes"]:
            # A batch of 8 in one process and of 4 in each of two are the same step.
            for flat, processes in ((before, self.processes), (now, config["processes"])):
                flat["examples per step"] = flat.pop("batch_size") * flat.pop("accumulation") * processes
        return [f"{name}: {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]


def dealt_out(settings: Settings, before: int, now: int) -> Settings:
    """The settings under which `now` processes take the steps that `before` took, with no larger batch in any."""
    if before == now:
        return settings
    whole = settings.batch_size * settings.accumulation * before
    if whole % now:
        able = ", ".join(str(n) for n in range(1, min(whole, 64) + 1) if whole % n == 0)
        raise UserError(
            f"--resume: a step of this training has {whole} examples, which {now} processes cannot share evenly; "
            f"start {able}"
        )
    batch = max(size for size in range(1, settings.batch_size + 1) if whole // now % size == 0)
    return replace(settings, batch_size=batch, accumulation=whole // now // batch)


def begun(recipe: Recipe, path: Path | None) -> Begun:
    """The training to go on with: in the folder that is named, else the newest that has not come to its end."""
    if path is None:
        found = [run for run in newest_first(recipe) if run.unfinished]
        if not found:
            raise UserError(f"--resume: no unfinished training of {recipe.name} in {runs.ROOT / recipe.name}")
        run = found[0]
    else:
        run = Run(path)
        if not run.config.is_file():
            raise UserError(f"--resume: no training was begun in {path}")
        if not run.unfinished:
            raise UserError(f"--resume: the training in {path} came to its end; there is nothing to go on with")
    try:
        found_here = Begun(run, read_json(run.config), read_json(run.path / "choice.json"))
        _ = found_here.settings, found_here.balance, found_here.chosen, found_here.backend
        _flat(found_here.config, found_here.choice)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"--resume: {run.path} cannot be read ({error}); train again without --resume") from None
    return found_here


def newest_first(recipe: Recipe) -> list[Run]:
    folders = sorted((runs.ROOT / recipe.name).glob("*"), reverse=True)
    return [Run(folder) for folder in folders if folder.is_dir()]


def settings_of(run: Run) -> Settings:
    """As training_config.json has them; what is not there is as it is by default."""
    try:
        return _from_json(Settings, read_json(run.config)["settings"])
    except (KeyError, TypeError, AttributeError) as error:
        raise BrokenFile(f"{run.config}: {NOT_OURS} ({' '.join(str(error).split())})") from None


def backend_of(run: Run) -> BackendName:
    return _decided(run, "backend", BACKENDS)


def trained_in(run: Run) -> str:
    """The precision, which may be another than would be chosen on this machine."""
    return _decided(run, "dtype", [dtype for dtype in get_args(Dtype) if dtype != "auto"])


def _decided(run: Run, what: str, known: Sequence[str]) -> Any:
    path = run.path / "choice.json"
    stored = read_json(path)
    found = stored.get(what) if isinstance(stored, dict) else None
    if found not in known:
        raise BrokenFile(f"{path}: {NOT_OURS} (no {what} is called {str(found)[:40]!r})")
    return found


def data_digest(run: Run) -> str:
    """Of what is trained on and validated with."""
    digest = hashlib.sha256()
    for name in ("train.jsonl", "val.jsonl"):
        with (run.data / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _flat(config: dict[str, Any], choice: dict[str, Any]) -> dict[str, Any]:
    """Names as the user knows them -> JSON values."""
    settings = {name: value for name, value in config["settings"].items() if name not in _HARMLESS}
    base = {f"base model's {name}": config["base_model"][name] for name in ("name", "size", "weights")}
    decided = {f"{name} (choice.json)": choice[name] for name in DECISIONS}
    data = {"training data": str(config.get("data_sha256"))[:12]}
    return json.loads(json.dumps({**settings, **config.get("balance", {}), **base, **decided, **data}))


def _from_json(kind: Any, values: dict[str, Any]) -> Any:
    """A flat dataclass of what JSON made of it."""
    hints = get_type_hints(kind)
    known = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name in hints}
    for name, value in known.items():
        if not _fits(value, hints[name]):
            raise TypeError(f"{name}: {str(value)[:40]!r} is none of its values")
    return kind(**known)


def _fits(value: Any, hint: Any) -> bool:
    """For what fields of ours are: numbers, texts, choices, tuples of texts."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(isinstance(part, str) for part in value)
    if get_origin(hint) is UnionType:
        return any(_fits(value, one) for one in get_args(hint))
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return isinstance(value, (int, float) if hint is float else hint)
