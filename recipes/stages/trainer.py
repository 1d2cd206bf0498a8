"""TRL's SFTTrainer with our steps, our loss on whole answers and our checkpoints.

Import this only after a backend has loaded its libraries: Unsloth puts a class of its own under the name
SFTTrainer, and ours must inherit from whichever is there.
"""

import json
import math
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate.data_loader import prepare_data_loader
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map
from transformers import PrinterCallback
from trl import SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from recipes.stages import checkpoint, processes
from recipes.stages.batches import Parts, Steps, supervised
from recipes.stages.folding import by_example, understood
from recipes.stages.last_layer import only_asked_for
from recipes.stages.losses import Objective
from recipes.stages.room import TooMuchAtOnce, out_of_memory
from recipes.stages.run import Run


class RecipeTrainer(SFTTrainer):
    supervised_tokens: torch.Tensor | int = 0
    resumed: Any = None
    seconds_before: float = 0.0
    began: float = 0.0
    data_seconds: float = 0.0
    """Time in which the training waited for its batches to be put together."""
    negative_log_likelihood: torch.Tensor | float = 0.0

    def __init__(
        self,
        run: Run,
        steps: Steps,
        objective: Objective | None = None,
        validate: Callable[[int, int], dict[str, float]] | None = None,
        own_loss: bool = True,
        **arguments: Any,
    ):
        trained = [(p, p.data) for p in arguments["model"].parameters() if p.requires_grad]
        super().__init__(**arguments)
        for parameter, data in trained:
            # TRL rounds the LoRA matrices of a quantised model to bfloat16 for good, under either backend, and AdamW on
            # such parameters loses every update below their 8 bits.
            parameter.data = data
        # Unsloth's trainer has a loss of its own for free text. TRL's also computes every token's entropy, for metrics
        # that are not looked at: another pass over the logits.
        self.own_loss = objective is not None or own_loss
        if own_loss:
            add_fused_lm_head(self.model.get_base_model())
        self.remove_callback(PrinterCallback)
        self.run, self.steps, self.objective, self.validate = run, steps, objective, validate
        self.parts: list[int] = []
        """How many parts each optimiser step had."""

    def get_train_dataloader(self) -> Any:
        """A batch of it is a whole optimiser step, in its parts. accelerate would fill an uneven end with rows from the
        beginning, which one process does not see twice."""
        loader = torch.utils.data.DataLoader(
            Parts(self.train_dataset),
            batch_sampler=self.steps,
            collate_fn=lambda parts: [self.data_collator(part) for part in parts],
            pin_memory=self.args.dataloader_pin_memory,
        )
        return prepare_data_loader(
            loader, self.args.device, num_processes=1, process_index=0, put_on_device=True,
            non_blocking=self.accelerator.non_blocking,
        )  # fmt: skip

    def seen(self) -> tuple[int, float]:
        """Supervised tokens and their negative log-likelihood so far, of all processes, which all have to ask."""
        tokens, surprise = processes.summed([float(self.supervised_tokens), float(self.negative_log_likelihood)])
        return int(tokens), surprise

    def training_step(self, model: Any, inputs: list[dict[str, Any]], num_items_in_batch: Any = None) -> torch.Tensor:
        """All parts of an optimiser step: the Trainer, which counts parts, knows of one."""
        losses = []
        for number, part in enumerate(inputs, 1):
            last = number == len(inputs)
            # Gradients of several processes meet once. DeepSpeed goes by the flag alone.
            self.accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last or self.is_deepspeed_enabled else self.accelerator.no_sync(model):
                try:
                    losses.append(self._part(model, part, num_items_in_batch))
                except Exception as error:
                    if not out_of_memory(error):
                        raise
                    fold = part.get("fold")
                    rows, width = (fold.rows, fold.width) if fold else part["labels"].shape
                    raise TooMuchAtOnce(rows, rows * width) from error
        return torch.stack(losses).sum()

    def rehearse(self, parts: list[dict[str, Any]]) -> None:
        """A step without consequences."""
        random, counted = random_state(), (self.supervised_tokens, self.negative_log_likelihood)
        self.current_gradient_accumulation_steps = 1
        self.training_step(self.model_wrapped, parts, torch.tensor(1.0))
        self.model.zero_grad()
        self.supervised_tokens, self.negative_log_likelihood = counted
        set_random_state(random)

    def _part(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        with understood(self.model, self._prepare_inputs(inputs)) as ready:
            self.supervised_tokens += supervised(ready).sum()
            with only_asked_for(self.model, ready["labels"], self.data_collator.few_lengths):
                if not self.own_loss and not self.model_accepts_loss_kwargs:
                    # A head that is not told the count takes its part's mean, which the Trainer divides by this.
                    share = supervised(ready).sum() * self.accelerator.num_processes / num_items_in_batch
                    self.current_gradient_accumulation_steps = 1 / share
                    num_items_in_batch = None
                loss = super().training_step(model, ready, num_items_in_batch)
                # The mean over no token at all, which a filler has, is not a number.
                return loss if math.isfinite(self.current_gradient_accumulation_steps) else torch.zeros_like(loss)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The parts of one optimiser step, and what its loss is divided by: tokens, or what their examples weigh."""
        began = time.perf_counter()
        steps = list(islice(epoch_iterator, num_batches))
        self.data_seconds += time.perf_counter() - began
        if not steps:
            return [], None
        (parts,) = steps
        self.parts.append(len(parts))
        tokens = [supervised(part) for part in parts]
        if self.objective is None:
            counts = [each.sum() for each in tokens]
        else:
            counts = [self.objective.mass(each, part["class"]) for each, part in zip(tokens, parts, strict=True)]
        count = torch.stack(counts).sum().to(device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return steps, count

    def floating_point_ops(self, inputs: Any) -> int:
        """Nobody asks, and the Trainer would look for tokens in a list of parts."""
        return 0

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not self.own_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        classes = inputs.pop("class", None)
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        if self.objective is None:
            return -outputs.log_probs.sum() / num_items_in_batch * self.accelerator.num_processes
        log_p = by_example(outputs.log_probs, inputs.get("fold"))
        self.negative_log_likelihood -= log_p.detach().sum()
        if self.args.world_size > 1:
            # A filler has no answer, and with a prior's offset would have a loss all the same.
            answered = supervised(inputs) > 0
            log_p, classes = log_p[answered], classes[answered]
        # The mass is that of all processes, whose gradients will be averaged.
        return self.objective.loss(log_p, classes, num_items_in_batch) * self.accelerator.num_processes

    # Checkpoints in our own form, in place of the Trainer's: without pickle, whole or absent, with checksums. These are
    # the methods that it goes through when it resumes.

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.is_deepspeed_enabled:
            # Its optimiser's parts are its own, in a form of its own.
            return
        scaler = getattr(self.accelerator, "scaler", None)
        state = {
            "weights": self.trained_weights(),
            "optimizer": tree_map(_whole, self.optimizer.state_dict()),
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "random": processes.gathered(random_state()),
            "seconds": self.seconds_before + time.perf_counter() - self.began,
        }
        history = json.dumps(asdict(self.state), sort_keys=True)
        if processes.rank() == 0:
            checkpoint.save(self.run, self.state.global_step, state, history)

    def trained_weights(self) -> dict[str, torch.Tensor]:
        """Whole, wherever they are: where they are divided among processes, all of them have to ask."""
        found = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not self.is_deepspeed_enabled:
            return tree_map(_whole, found)
        from deepspeed import zero

        with zero.GatheredParameters(list(found.values())):
            return {name: p.detach().cpu().clone() for name, p in found.items()}

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is not None:
            self.resumed = checkpoint.load(Path(resume_from_checkpoint))
            self.seconds_before = self.resumed["seconds"]
        if processes.rank():
            # Dropout and NEFTune's noise are to fall differently on the rows of each process.
            torch.manual_seed(self.args.seed + processes.rank())
        self.began = time.perf_counter()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, *_: Any) -> None:
        weights = self.resumed["weights"]
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(_divided(weights[name], parameter))

    def _load_optimizer_and_scheduler(self, *_: Any) -> None:
        if self.resumed is not None:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            stored = self.resumed["optimizer"]
            of_each = {
                number: {name: _divided(value, parameters[number]) for name, value in state.items()}
                for number, state in stored["state"].items()
            }
            self.optimizer.load_state_dict({**stored, "state": of_each})
            self.lr_scheduler.load_state_dict(self.resumed["scheduler"])

    def _load_scaler(self, *_: Any) -> None:
        if self.resumed is not None and self.resumed["scaler"]:
            self.accelerator.scaler.load_state_dict(self.resumed["scaler"])

    def _load_rng_state(self, *_: Any) -> None:
        stored = self.resumed["random"]
        if len(stored) == processes.world():
            set_random_state(stored[processes.rank()])
        else:
            # Nobody's noise can go on where it was; at least it is not that of the beginning.
            torch.manual_seed(self.args.seed + processes.rank() + 1_000_003 * self.state.global_step)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """By answers, not by tokens: what counts is whether the code is right."""
        assert self.validate is not None
        self.model.eval()
        step = self.state.global_step
        steps = step if self.control.should_training_stop else self.state.max_steps
        metrics = {f"eval_{name}": value for name, value in self.validate(step, steps).items()}
        self.log(dict(metrics))
        self.model.train()
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _whole(value: Any) -> Any:
    """FSDP leaves a part of each tensor in each process."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _divided(value: Any, like: torch.Tensor) -> Any:
    """A whole tensor as FSDP keeps this parameter, and what an optimiser keeps for it."""
    if not isinstance(like, DTensor) or getattr(value, "shape", None) != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def random_state() -> dict[str, Any]:
    """Of every generator that a training step may draw from: dropout and NEFTune draw from torch's."""
    kind, keys, *rest = numpy.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, numpy.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
