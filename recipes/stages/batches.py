"""What a training reads: in which order rows are drawn, how a step's rows are divided, and how they are put together.

A step is so many rows, and what it learns from them does not depend on how many of them go through the network at
once: its loss is a sum, divided by what the whole step holds.

Import this after a backend has loaded its libraries.
"""

import math
import secrets
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from recipes.stages.callbacks import Watch
from recipes.stages.folding import LEAST_SAVED, by_example, folded
from recipes.stages.processes import Team
from recipes.stages.recipe import Settings
from recipes.stages.render import IGNORED


class Drawn(torch.utils.data.Sampler[int]):
    """A different order every epoch, decided by the seed alone: both backends, every process and a resumed run see
    the same batches.

    Each class is drawn as often as `draws` says, its rows in turn: none comes up a second time before all have
    come up once.
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


class Steps(torch.utils.data.BatchSampler):
    """The rows of every optimiser step, in the parts that go through the network one after the other.

    There are as few parts as room is for, and rows of like length are together, so that they need little padding.
    Together the processes take the rows that one process would take, to the uneven end of the last step, and each takes
    as many parts as the others, who wait for it; who is left without a row gets the filler.
    """

    def __init__(self, drawn: Drawn, lengths: Sequence[int], settings: Settings, team: Team, filler: int):
        self.sampler = drawn
        self.lengths, self.settings, self.team, self.filler = lengths, settings, team, filler
        self.together = settings.batch_size * settings.accumulation * team.size

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.together)

    def __iter__(self) -> Iterator[list[list[int]]]:
        rows = iter(self.sampler)
        while step := list(islice(rows, self.together)):
            yield [part[self.team.rank :: self.team.size] or [self.filler] for part in self._parts(step)]

    def _parts(self, step: list[int]) -> list[list[int]]:
        if self._fit(len(step), max(self.lengths[row] for row in step)):
            return [step]
        parts: list[list[int]] = [[]]
        for row in sorted(step, key=lambda row: self.lengths[row]):
            if parts[-1] and not self._fit(len(parts[-1]) + 1, self.lengths[row]):
                parts.append([])
            parts[-1].append(row)
        return parts

    def _fit(self, rows: int, longest: int) -> bool:
        each = -(-rows // self.team.size)
        tokens = self.settings.tokens_at_once
        return each <= self.settings.batch_size if tokens is None else each == 1 or each * longest <= tokens


class Parts(torch.utils.data.Dataset[list[dict[str, Any]]]):
    """Rows, a part of a step at a time."""

    def __init__(self, rows: Any):
        self.rows = rows

    def __getitem__(self, part: list[int]) -> list[dict[str, Any]]:
        return self.rows.__getitems__(part)


class Batches:
    """Pads a part of a step to its longest example. Padding is known by position, never by the pad token's id."""

    def __init__(
        self, pad_token_id: int, token_types: bool = False, watch: Watch | None = None,
        fold: bool = False, few_lengths: bool = False, always: bool = False,
    ):  # fmt: skip
        self.pad_token_id = pad_token_id
        # Gemma 3 with its vision tower will not train without being told that no token is an image.
        self.token_types = token_types
        self.watch = watch
        self.fold = fold
        """Put each batch into one row."""
        self.few_lengths = few_lengths
        self.least_saved = -math.inf if always else LEAST_SAVED
        """Share of its tokens that this spares at least."""
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
        laid_out = self.laid_out(batch)
        self.padded_tokens += batch["input_ids"].numel()
        self.computed_tokens += laid_out["input_ids"].numel()
        return laid_out

    def laid_out(self, padded: dict[str, Any]) -> dict[str, Any]:
        return folded(padded, self.few_lengths, self.least_saved) if self.fold else padded


def supervised(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Tokens of each example that carry loss; its first token has nothing before it to be predicted from."""
    return by_example((batch["labels"][:, 1:] != IGNORED).long(), batch.get("fold"))


def dataset(table: pa.Table, classes: Sequence[int] | None = None, filler: bool = False) -> Any:
    """With a filler: a last row, not drawn, that carries no loss."""
    from datasets import Dataset

    if filler:
        shortest = pc.list_value_length(table["input_ids"]).to_numpy().argmin()
        (ids,) = table["input_ids"][shortest : shortest + 1].to_pylist()
        last = pa.table({"input_ids": [ids], "labels": [[IGNORED] * len(ids)]}, table.schema)
        table = pa.concat_tables([table, last])
        classes = None if classes is None else [*classes, 0]
    if classes is not None:
        table = table.append_column("class", pa.array(classes, pa.int32()))
    # Without a name, datasets would pickle the whole table to find one.
    return Dataset(table, fingerprint=secrets.token_hex(8))
