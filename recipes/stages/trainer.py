"""TRL's SFTTrainer with our order of batches, our loss on whole answers and our record of steps.

Import this only after a backend has loaded its libraries: Unsloth puts a class of its own under the name
SFTTrainer, and ours must inherit from whichever is there.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, Protocol

import torch
from transformers import PrinterCallback, TrainerCallback
from trl import SFTTrainer

from recipes.stages.losses import Objective
from recipes.stages.render import IGNORED, Rendered
from recipes.stages.stopping import EarlyStopping, Patience


class Batches:
    """Collator: pads to the longest example. Padding is known by position, never by the pad token's id."""

    def __init__(self, pad_token_id: int, token_types: bool = False, watch: "Watch | None" = None):
        self.pad_token_id = pad_token_id
        # Gemma 3 with its vision tower will not train without being told that no token is an image.
        self.token_types = token_types
        self.watch = watch

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(example["input_ids"]) for example in examples)

        def padded(key: str, filler: int) -> torch.Tensor:
            return torch.tensor([e[key] + [filler] * (width - len(e[key])) for e in examples])

        batch = {
            "input_ids": padded("input_ids", self.pad_token_id),
            "labels": padded("labels", IGNORED),
            "attention_mask": torch.tensor(
                [[1] * len(e["input_ids"]) + [0] * (width - len(e["input_ids"])) for e in examples]
            ),
        }
        if self.token_types:
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        if "class" in examples[0]:
            batch["class"] = torch.tensor([example["class"] for example in examples])
        if self.watch:
            self.watch.batch(batch)
        return batch


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


def supervised(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Tokens of each row that carry loss; a row's first token has nothing before it to be predicted from."""
    return (batch["labels"][:, 1:] != IGNORED).sum(-1)


class Drawn(torch.utils.data.Sampler[int]):
    """A different order every epoch, decided by the seed alone: both backends, every process and a resumed run see
    the same batches.

    Each class is drawn as often as `draws` says, its rows in turn: none comes up a second time before all have
    come up once. Over several processes the data loader deals these out like any other order.
    """

    def __init__(self, classes: Sequence[int], draws: Sequence[int], seed: int):
        self.members = [
            torch.tensor([row for row, c in enumerate(classes) if c == index]) for index in range(len(draws))
        ]
        self.draws, self.seed, self.epoch = draws, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.draws)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        drawn = []
        for members, count in zip(self.members, self.draws, strict=True):
            turns = -(-count // len(members))
            in_turn = [members[torch.randperm(len(members), generator=generator)] for _ in range(turns)]
            drawn.append(torch.cat(in_turn)[:count])
        rows = torch.cat(drawn)
        return iter(rows[torch.randperm(len(rows), generator=generator)].tolist())


class RecipeTrainer(SFTTrainer):
    supervised_tokens: torch.Tensor | int = 0
    negative_log_likelihood: torch.Tensor | float = 0.0

    def __init__(
        self,
        sampler: Drawn,
        objective: Objective | None = None,
        validate: Callable[[], dict[str, float]] | None = None,
        **arguments: Any,
    ):
        trained = [(p, p.data) for p in arguments["model"].parameters() if p.requires_grad]
        super().__init__(**arguments)
        for parameter, data in trained:
            # TRL rounds the LoRA matrices of a quantised model to bfloat16 for good, under either backend, and AdamW on
            # such parameters loses every update below their 8 bits.
            parameter.data = data
        self.remove_callback(PrinterCallback)
        self.sampler, self.objective, self.validate = sampler, objective, validate
        self.parts: list[int] = []
        """Batches of each optimiser step: at an epoch's end there may be fewer."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Drawn:
        return self.sampler

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.supervised_tokens += supervised(inputs).sum()
        return super().training_step(model, inputs, *args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The parts of one optimiser step, and what its loss is divided by. Unsloth replaces this method of the base
        class, and the count of tokens inside it, so the weighted count is put in place out here."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self.parts.append(len(batches))
        if self.objective is not None and batches:
            masses = [self.objective.mass(supervised(batch), batch["class"]) for batch in batches]
            count = torch.stack(masses).sum().to(device)
            if self.args.world_size > 1:
                count = self.accelerator.gather(count).sum()
        return batches, count

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.objective is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        classes = inputs.pop("class")
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        log_p = outputs.log_probs.sum(-1)
        self.negative_log_likelihood -= log_p.detach().sum()
        # The mass is that of all processes, whose gradients will be averaged.
        return self.objective.loss(log_p, classes, num_items_in_batch) * self.accelerator.num_processes

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """By answers, not by tokens: what counts is whether the code is right."""
        assert self.validate is not None
        self.model.eval()
        metrics = {f"eval_{name}": value for name, value in self.validate().items()}
        self.log(dict(metrics))
        self.model.train()
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class StepRecord(TrainerCallback):
    """A line of steps.jsonl for every optimiser step."""

    def __init__(self, file: IO[str], on_step: Any):
        self.file, self.on_step = file, on_step
        self.trainer: RecipeTrainer | None = None
        self.seen, self.seen_likelihood = 0, 0.0
        self.began = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        assert self.trainer is not None
        total = int(self.trainer.supervised_tokens)
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
            likelihood = float(self.trainer.negative_log_likelihood)
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


def dataset(rendered: list[Rendered], classes: Sequence[int] | None = None) -> Any:
    from datasets import Dataset

    columns: dict[str, Any] = {
        "input_ids": [r.input_ids for r in rendered],
        "labels": [r.labels for r in rendered],
    }
    if classes is not None:
        columns["class"] = list(classes)
    return Dataset.from_dict(columns)
