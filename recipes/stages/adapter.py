"""A run's adapter/, which may have been damaged, or come from anybody: what is wrong with it is said in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from recipes.stages.base_model import refuse_pickles
from recipes.stages.recipe import Message, UserError
from recipes.stages.render import Renderer
from recipes.stages.run import BrokenFile, Run, read_json

_WEIGHTS = "adapter_model.safetensors"
_REMEDY = "train again, or bring back a copy of the folder"


def check(run: Run) -> None:
    """As far as it can be told before a backend is loaded."""
    refuse_pickles(run.adapter, "adapter_model", "adapter_model")
    for name in ("adapter_config.json", "tokenizer.json", "tokenizer_config.json"):
        if not (run.adapter / name).is_file():
            raise BrokenFile(f"{run.adapter / name} is missing; {_REMEDY}")
        if not isinstance(read_json(run.adapter / name), dict):
            raise BrokenFile(f"{run.adapter / name}: not what was written there; {_REMEDY}")
    _names(run)


def check_loaded(run: Run, network: Any) -> None:
    """PEFT only warns of matrices that it does not find, and leaves them as they began: an untrained model."""
    wanted = {name.replace(".default", "") for name, _ in network.named_parameters() if ".lora_" in name}
    if other := wanted ^ _names(run):
        raise BrokenFile(
            f"{run.adapter / _WEIGHTS}: {len(other)} of its {len(wanted)} matrices are missing or others, such as "
            f"{sorted(other)[0]}; {_REMEDY}"
        )


def check_template(renderer: Renderer) -> None:
    question = "\ue002"
    if question not in renderer.text((Message("user", question),), generation_prompt=True):
        raise ValueError("it leaves out what users say")


@contextmanager
def reading(run: Run, what: str) -> Iterator[None]:
    """Libraries raise what they like over a file that is not what they wrote."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or type(error).__name__ == "OutOfMemoryError":
            raise
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise BrokenFile(f"{run.adapter / what}: cannot be read ({told}); {_REMEDY}") from error


def _names(run: Run) -> set[str]:
    from safetensors import safe_open

    with reading(run, _WEIGHTS), safe_open(run.adapter / _WEIGHTS, "numpy") as file:
        return set(file.keys())
