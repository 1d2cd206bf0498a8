"""What the trainer and bench's looking on cost: the same step, once through them and once in a bare loop.

    python -m bench overhead

In one process and in turns: after every step of a training that bench measures, the same batches go through a loop
that has nothing but TRL's loss, backward, clipping and torch's AdamW. What is told is what the trainer, its callbacks,
the data loader and the measuring add to that.
"""

import shlex
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import tyro

from bench.meters import TrainingMeter
from bench.recipes import NAMES
from bench.report import deliver
from bench.turns import Turns
from fallback.choose import Backend
from recipes.stages import cli
from recipes.stages.base_model import Size
from recipes.stages.console import say
from recipes.stages.fine_tune import fine_tune
from recipes.stages.recipe import UserError
from recipes.stages.run import environment


@dataclass(frozen=True)
class Overhead:
    """Measure what is around a training step."""

    recipe: str = "llama_1b_civil"
    """Which."""
    size: Size = "small"
    """A step of a tiny model takes hundredths of a second, and everything beside it seems large."""
    backend: Backend = "peft"
    """Backend of the training."""
    steps: int = 24
    """Steps; the first four are not counted."""
    out: Path | None = None
    """Also write the figures to this JSON file."""
    json: bool = False
    """Print the figures as JSON."""


class Beside(TrainingMeter):
    """bench's meter, and after every step of the trainer the bare one."""

    def __init__(self) -> None:
        super().__init__("", Turns())
        self.bare: list[float] = []
        self.trainer: Any = None
        self.optimizer: Any = None
        self.kept: list[Any] = []

    def begin(self, trainer: Any) -> None:
        import torch

        self.trainer = trainer
        learned = [p for p in trainer.model.parameters() if p.requires_grad]
        # No step of it moves anything: the training beside it should not notice.
        # None leaves torch its choice, False forbids more than that.
        fused = trainer.args.optim.endswith("_fused") or None
        self.optimizer = torch.optim.AdamW(learned, lr=0.0, weight_decay=0.0, fused=fused)
        super().begin(trainer)

    def batch(self, batch: Any) -> None:
        super().batch(batch)
        self.kept.append(batch)

    def step(self) -> None:
        super().step()
        began = time.perf_counter()
        self.bare_step()
        self.bare.append(time.perf_counter() - began)
        self.resume()

    def bare_step(self) -> None:
        import torch

        from recipes.stages.batches import supervised
        from recipes.stages.folding import understood

        trainer, args = self.trainer, self.trainer.args
        parts = self.parts[len(self.bare)]
        batches, self.kept = self.kept[:parts], self.kept[parts:]
        count = sum(int(supervised(batch).sum()) for batch in batches)
        if trainer.objective is not None:
            masses = [trainer.objective.mass(supervised(batch), batch["class"]) for batch in batches]
            count = torch.stack(masses).sum()
        for batch in batches:
            ready = trainer._prepare_inputs(trainer.data_collator.laid_out(batch))
            with understood(trainer.model, ready) as ready:
                trainer.compute_loss(trainer.model, ready, num_items_in_batch=count).backward()
        torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if trainer.model.device.type == "cuda":
            torch.cuda.synchronize()


def main(arguments: list[str]) -> None:
    args = tyro.cli(Overhead, prog="python -m bench overhead", args=arguments)
    if args.recipe not in NAMES:
        raise UserError(f"--recipe {args.recipe!r}: unknown; there are {', '.join(NAMES)}")
    import importlib

    recipe = importlib.import_module(f"recipes.{args.recipe}").RECIPE
    meter = Beside()
    given = ["--size", args.size, "--backend", args.backend, "--max-steps", str(args.steps), "--epochs", "100000"]
    given += ["--early-stopping", "off", "--log-every", "1000000", "--neftune-alpha", "0"]
    with tempfile.TemporaryDirectory(prefix="bench-overhead-") as folder:
        fine_tune(recipe, cli.parse_train(recipe, "train", [*given, "--run", f"{folder}/run"]), meter)
    ours, bare = meter.seconds[4:], meter.bare[4:]
    summary = {
        "command": shlex.join(["python", "-m", "bench", "overhead", *arguments]),
        "environment": environment(),
        "step_seconds_median": median(ours),
        "bare_step_seconds_median": median(bare),
        "ratio": median(a / b for a, b in zip(ours, bare, strict=True)),
        "step_seconds": ours,
        "bare_step_seconds": bare,
    }
    if not deliver(summary, args.out, args.json):
        say(f"a step as bench measures it {median(ours):.4f} s, in a bare loop {median(bare):.4f} s")
        say(f"ratio {summary['ratio']:.4f}, the median of {len(ours)} pairs")
