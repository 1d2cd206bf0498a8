"""TRL's SFTTrainer with our order of batches and our record of steps.

Import this only after a backend has loaded its libraries: Unsloth puts a class of its own under the name
SFTTrainer, and ours must inherit from whichever is there.
"""

import json
import time
from collections.abc import Iterator
from typing import IO, Any

import torch
from transformers import PrinterCallback, TrainerCallback
from trl import SFTTrainer

from recipes.stages.render import IGNORED, Rendered


class Batches:
    """Collator: pads to the longest example. Padding is known by position, never by the pad token's id."""

    def __init__(self, pad_token_id: int, token_types: bool = False):
        self.pad_token_id = pad_token_id
        # Gemma 3 with its vision tower will not train without being told that no token is an image.
        self.token_types = token_types

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
        return batch


class Shuffled(torch.utils.data.Sampler[int]):
    """A different order every epoch, decided by the seed alone: both backends see the same batches."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.length, generator=generator).tolist())


class RecipeTrainer(SFTTrainer):
    supervised_tokens: torch.Tensor | int = 0

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset: Any = None) -> Shuffled:
        return Shuffled(len(train_dataset if train_dataset is not None else self.train_dataset), self.args.seed)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        # The first token of a row has nothing before it to be predicted from.
        self.supervised_tokens += (inputs["labels"][:, 1:] != IGNORED).sum()
        return super().training_step(model, inputs, *args, **kwargs)


class StepRecord(TrainerCallback):
    """A line of steps.jsonl for every optimiser step."""

    def __init__(self, file: IO[str], on_step: Any):
        self.file, self.on_step = file, on_step
        self.trainer: RecipeTrainer | None = None
        self.seen = 0
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
        self.seen = total
        self.file.write(json.dumps(step) + "\n")
        self.file.flush()
        self.on_step(step, state.max_steps)


def dataset(rendered: list[Rendered]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": [r.input_ids for r in rendered], "labels": [r.labels for r in rendered]})
