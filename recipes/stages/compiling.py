"""`train --compile`: the layers are compiled before the first step, and the training is told what that is worth to it.

Like trainer.py, to be imported only after a backend has loaded its libraries.
"""

import copy
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
from transformers import TrainerCallback

from fallback import compiled
from recipes.stages.callbacks import Safekeeping
from recipes.stages.console import duration
from recipes.stages.recipe import Interrupted, UserError
from recipes.stages.run import Run

if TYPE_CHECKING:
    from recipes.stages.trainer import RecipeTrainer

_TURNS = 5
"""Of a step as it is written beside the same step compiled; fewer where a step takes long."""
_MOST_SECONDS = 30.0


class Compiling(TrainerCallback):
    def __init__(self, tell: Callable[[str], None], safe: Safekeeping, go_on: str):
        self.tell, self.safe, self.go_on = tell, safe, go_on
        self.trainer: RecipeTrainer | None = None
        self.found: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """By the rows of the first step of all, in a training that goes on too: what is compiled for any length may be
        chosen by those that it is compiled for."""
        trainer = self.trainer
        assert trainer is not None
        began = time.perf_counter()
        # The trainer's own counts what it puts together, and tells who looks on.
        collate = copy.copy(trainer.data_collator)
        collate.watch = None
        parts = [collate(trainer.train_dataset.__getitems__(part)) for part in next(iter(trainer.steps))]

        def step(stance: Literal["default", "force_eager"]) -> float:
            with torch.compiler.set_stance(stance):
                start = time.perf_counter()
                trainer.rehearse(parts)
                return time.perf_counter() - start

        trainer.rehearse(parts)
        self.tell("compiling the layers …")
        # It tries what the processor can by compiling it, and takes a compiler that was stopped for a no.
        pick_vec_isa()
        if self.safe.asked is not None:
            stopped = f"stopped before step {state.global_step + 1}; go on with {self.go_on}"
            raise Interrupted(stopped, 128 + self.safe.asked)
        compiled.teach(trainer.model)
        first = step("default")
        turns = [(step("force_eager"), step("default"))]
        while len(turns) < _TURNS and sum(map(sum, turns)) < _MOST_SECONDS and self.safe.asked is None:
            turns.append((step("force_eager"), step("default")))
        written, now = (median(times) for times in zip(*turns, strict=True))
        self.tell(told(time.perf_counter() - began, written, now, state.max_steps - state.global_step))
        self.found = {"seconds": first - now, "step_seconds": now, "step_seconds_as_written": written}


@contextmanager
def failures_told(run: Run, safe: Safekeeping, go_on: str) -> Iterator[None]:
    """Around a whole training: what is like nothing before is compiled when it comes."""
    try:
        yield
    except (TorchDynamoException, CppCompileError, InvalidCxxCompiler) as error:
        if safe.asked is not None:
            # A Ctrl-C in a terminal reaches the C++ compiler too.
            stopped = f"stopped while layers were compiled; go on with {go_on}"
            raise Interrupted(stopped, 128 + safe.asked) from error
        traceback.print_exception(error)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--compile: the compiler failed ({reason}); what it said is in {run.logs / 'libraries.log'}; train with "
            "--no-compile"
        ) from error


def told(cost: float, written: float, now: float, steps: int) -> str:
    """Whether it pays in so many steps."""
    made = (
        f"compiled and tried out in {duration(cost)}; a step takes {now:.3f} s so, and {written:.3f} s as it is written"
    )
    if written <= now:
        return f"{made}: nothing is gained by --compile here"
    needed = cost / (written - now)
    if needed > steps:
        return f"{made}: that would be paid back after {needed:,.0f} steps, and there are {steps:,}"
    saved = duration((steps - needed) * (written - now))
    return f"{made}: paid back after {needed:,.0f} of {steps:,} steps, and {saved} saved in all"
