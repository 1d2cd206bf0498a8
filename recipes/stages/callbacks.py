"""Who looks on at a training: what is recorded, when it is validated, and when it ends early.

Like trainer.py, to be imported only after a backend has loaded its libraries.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any, Protocol

import torch
from transformers import TrainerCallback

from recipes.stages import processes
from recipes.stages.console import say
from recipes.stages.stopping import EarlyStopping, Patience

if TYPE_CHECKING:
    from recipes.stages.trainer import RecipeTrainer


class Watch(Protocol):
    """Somebody who looks on at a training, such as bench, which measures the user's own."""

    def batch(self, batch: dict[str, torch.Tensor]) -> None:
        """A batch was put together. The data loader may be one ahead of the training."""

    def begin(self, trainer: "RecipeTrainer") -> None:
        """The first step is about to be taken."""

    def step(self) -> None:
        """A step is done, and the device with it: its loss has been read."""

    def resume(self) -> None:
        """Something else than training took place, and is over."""


class Watched(TrainerCallback):
    """The trainer's side of a Watch."""

    def __init__(self, watch: Watch):
        self.watch = watch
        self.trainer: RecipeTrainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.trainer is not None
        self.watch.begin(self.trainer)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.watch.step()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.watch.resume()


class StepRecord(TrainerCallback):
    """A line of steps.jsonl for every optimiser step."""

    def __init__(self, file: IO[str], on_step: Any):
        self.file, self.on_step = file, on_step
        self.trainer: RecipeTrainer | None = None
        self.seen, self.seen_likelihood = 0, 0.0
        self.began = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.trainer is not None
        self.seen, self.seen_likelihood = self.trainer.seen()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        assert self.trainer is not None
        total, likelihood = self.trainer.seen()
        step = {
            "step": state.global_step,
            "loss": float(logs["loss"]),
            "grad_norm": float(logs.get("grad_norm", float("nan"))),
            "learning_rate": logs.get("learning_rate"),
            "supervised_tokens": total - self.seen,
            "seconds": round(time.perf_counter() - self.began, 6),
        }
        if self.trainer.objective is not None:
            # The loss may be weighted or focused; this is comparable between runs.
            step["cross_entropy"] = (likelihood - self.seen_likelihood) / max(1, step["supervised_tokens"])
            self.seen_likelihood = likelihood
        self.seen = total
        self.file.write(json.dumps(step) + "\n")
        self.file.flush()
        self.on_step(step, state.max_steps)


class Validations(TrainerCallback):
    """Tells of every evaluation, sees to one at the end, and saves the adapter at each that is better than all before
    where that is wanted: what was reached is never lost again."""

    def __init__(
        self,
        metric: str,
        higher_is_better: bool,
        save: Callable[[], None] | None,
        on_evaluation: Callable[[int, dict[str, float], bool], None],
    ):
        self.metric, self.sign = metric, 1 if higher_is_better else -1
        self.save, self.on_evaluation = save, on_evaluation
        self.best_step, self.best = 0, float("nan")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A resumed training knows its best from the trainer's log."""
        for logs in state.log_history:
            now = logs.get(self.metric)
            if now is not None and (not self.best_step or self.sign * now > self.sign * self.best):
                self.best_step, self.best = logs["step"], now

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        # The trainer notes the new best metric in its state only after this.
        before, now = state.best_metric, metrics[self.metric]
        better = before is None or self.sign * now > self.sign * before
        if better:
            self.best_step, self.best = state.global_step, now
            if self.save:
                self.save()
        self.on_evaluation(state.global_step, metrics, better)


class StopEarly(TrainerCallback):
    """Ends training when its patience is exhausted. What it knows follows from the trainer's log alone, which is part
    of every checkpoint: a resumed run counts on where it was."""

    def __init__(self, rule: EarlyStopping, every: int):
        self.rule, self.every = rule, every
        self.patience, self.losses = Patience(rule), list[float]()
        self.stopped_at: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.patience, self.losses = Patience(self.rule), []
        for logs in state.log_history:
            self._see(logs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if self._see(logs or {}) and self.stopped_at is None:
            self.stopped_at = state.global_step
            control.should_training_stop = True
            control.should_evaluate = True
            # Going on from here would take a step too many.
            control.should_save = False

    def _see(self, logs: dict[str, float]) -> bool:
        """Whether patience is exhausted by this."""
        if self.rule.watch == "validation":
            return "eval_loss" in logs and self.patience.exhausted(logs["eval_loss"])
        if "loss" not in logs:
            return False
        self.losses.append(float(logs["loss"]))
        if len(self.losses) < self.every:
            return False
        mean = sum(self.losses) / self.every
        self.losses.clear()
        return self.patience.exhausted(mean)


class Safekeeping(TrainerCallback):
    """Sees to checkpoints: one every so many minutes, one when somebody asks the training to stop, and none of a state
    that is no good any more."""

    def __init__(self, minutes: float, bad_steps: int):
        self.seconds, self.bad_steps = minutes * 60, bad_steps
        self.saved = time.monotonic()
        self.asked: int | None = None
        """The signal that asked the training to stop."""
        self.bad = 0
        """Steps in a row whose gradients were not numbers."""

    @property
    def diverged(self) -> bool:
        return self.bad >= self.bad_steps

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the training after the step that is being taken. Only a main thread hears them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # Who was started in the background ignores Ctrl-C, which is meant for somebody else.
        heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._ask) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = number
        if processes.launched():
            # It may be the launcher, because another process died; who is alive agrees at the step's end.
            return
        with suppress(RuntimeError):
            # The signal may have come in the middle of a line that is being written.
            say("\nstopping after this step, with a checkpoint; a second time stops at once")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            return
        # All processes stop at the same step, and save at the same.
        late = time.monotonic() - self.saved >= self.seconds
        asked, due = processes.most([self.asked or 0, late])
        if asked:
            self.asked = int(asked)
            if processes.launched():
                say("stopping after this step, with a checkpoint")
            control.should_training_stop = True
        if asked or due:
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not logs or "grad_norm" not in logs:
            return
        self.bad = 0 if math.isfinite(logs["grad_norm"]) else self.bad + 1
        if self.bad:
            control.should_save = False
        if self.diverged:
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved = time.monotonic()
