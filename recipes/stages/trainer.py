"""TRL's SFTTrainer with our order of batches, our loss on whole answers and our record of steps.

Import this only after a backend has loaded its libraries: Unsloth puts a class of its own under the name
SFTTrainer, and ours must inherit from whichever is there.
"""

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
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
from recipes.stages.callbacks import Watch
from recipes.stages.folding import by_example, folded, understood
from recipes.stages.last_layer import only_asked_for
from recipes.stages.losses import Objective
from recipes.stages.processes import Team
from recipes.stages.render import IGNORED, Rendered
from recipes.stages.run import Run


class Batches:
    """Collator: pads to the longest example. Padding is known by position, never by the pad token's id."""

    def __init__(self, pad_token_id: int, token_types: bool = False, watch: Watch | None = None, fold: bool = False):
        self.pad_token_id = pad_token_id
        # Gemma 3 with its vision tower will not train without being told that no token is an image.
        self.token_types = token_types
        self.watch = watch
        self.fold = fold
        """Put each batch into one row."""
        self.padded_tokens = self.computed_tokens = 0

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
        laid_out = folded(batch) if self.fold else batch
        self.padded_tokens += batch["input_ids"].numel()
        self.computed_tokens += laid_out["input_ids"].numel()
        return laid_out


def supervised(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Tokens of each example that carry loss; its first token has nothing before it to be predicted from."""
    return by_example((batch["labels"][:, 1:] != IGNORED).long(), batch.get("fold"))


class Drawn(torch.utils.data.Sampler[int]):
    """A different order every epoch, decided by the seed alone: both backends, every process and a resumed run see
    the same batches.

    Each class is drawn as often as `draws` says, its rows in turn: none comes up a second time before all have
    come up once. Over several processes the data loader deals these out like any other order.

    The rows of one optimiser step, `together` of them, are sorted by length, so that its parts need little padding.
    """

    def __init__(
        self, classes: Sequence[int], draws: Sequence[int], seed: int, lengths: Sequence[int] = (), together: int = 1
    ):
        self.lengths, self.together = torch.tensor(lengths), together
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
        rows = rows[torch.randperm(len(rows), generator=generator)]
        if len(self.lengths):
            steps = rows.split(self.together)
            rows = torch.cat([step[self.lengths[step].argsort(stable=True)] for step in steps])
        return iter(rows.tolist())


class Dealt(torch.utils.data.BatchSampler):
    """This process's part of every batch. Together the processes take at each step the rows that one process with the
    whole batch would take, to the uneven end of the last; who is left without one gets the filler."""

    def __init__(self, sampler: Drawn, batch_size: int, team: Team, filler: int):
        super().__init__(sampler, batch_size, drop_last=False)
        self.team, self.filler = team, filler

    def __len__(self) -> int:
        return -(-len(self.sampler) // (self.batch_size * self.team.size))

    def __iter__(self) -> Iterator[list[int]]:
        rows = iter(self.sampler)
        while whole := list(islice(rows, self.batch_size * self.team.size)):
            yield whole[self.team.rank :: self.team.size] or [self.filler]


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
        sampler: Drawn,
        objective: Objective | None = None,
        validate: Callable[[], dict[str, float]] | None = None,
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
        self.run, self.sampler, self.objective, self.validate = run, sampler, objective, validate
        self.parts: list[int] = []
        """Batches of each optimiser step: at an epoch's end there may be fewer."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Drawn:
        return self.sampler

    def get_train_dataloader(self) -> Any:
        """accelerate would fill an uneven end with rows from the beginning, which one process does not see twice."""
        team = processes.team()
        if team.size == 1:
            return super().get_train_dataloader()
        loader = torch.utils.data.DataLoader(
            self.train_dataset,
            batch_sampler=Dealt(self.sampler, self.args.train_batch_size, team, filler=len(self.train_dataset) - 1),
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return prepare_data_loader(loader, self.args.device, num_processes=1, process_index=0, put_on_device=True)

    def seen(self) -> tuple[int, float]:
        """Supervised tokens and their negative log-likelihood so far, of all processes, which all have to ask."""
        tokens, surprise = processes.summed([float(self.supervised_tokens), float(self.negative_log_likelihood)])
        return int(tokens), surprise

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        with understood(self.accelerator.unwrap_model(model), self._prepare_inputs(inputs)) as ready:
            self.supervised_tokens += supervised(ready).sum()
            with only_asked_for(self.accelerator.unwrap_model(model), ready["labels"]):
                return super().training_step(model, ready, *args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The parts of one optimiser step, and what its loss is divided by. Unsloth replaces this method of the base
        class, and the count of tokens inside it, so the weighted count is put in place out here."""
        began = time.perf_counter()
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.data_seconds += time.perf_counter() - began
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
        metrics = {f"eval_{name}": value for name, value in self.validate().items()}
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


def dataset(rendered: list[Rendered], classes: Sequence[int] | None = None, filler: bool = False) -> Any:
    """With a filler: a last row, not drawn, that carries no loss."""
    from datasets import Dataset

    if filler:
        shortest = min(rendered, key=lambda r: len(r.input_ids))
        rendered = [*rendered, replace(shortest, labels=[IGNORED] * len(shortest.labels))]
        classes = None if classes is None else [*classes, 0]
    columns: dict[str, Any] = {
        "input_ids": [r.input_ids for r in rendered],
        "labels": [r.labels for r in rendered],
    }
    if classes is not None:
        columns["class"] = list(classes)
    return Dataset.from_dict(columns)
