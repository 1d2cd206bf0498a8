"""What a training really holds, in a process of its own: python -m bench.held CASE.json OUT.json FOLDER.

It is the user's own train() that runs; a callbacks.Watch counts. Weights, gradients and the optimiser's state are the
live storages of the real objects. What a step holds beside them is told by torch's allocator: on a CPU by the
profiler's record of every allocation, on a GPU by max_memory_allocated. Neither knows of footprint's stand-ins.
"""

import importlib
import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.case import Case
from fallback import leave_out
from recipes.stages import cli
from recipes.stages.fine_tune import fine_tune
from recipes.stages.run import read_json, write_json

# Steps before those that are measured: the first makes the optimiser's state.
UNMEASURED = 2
PARTS = 2
"""Batches of an optimiser step: from the second on, the gradients of the first are there."""


def storages(tensors: Iterable[Any]) -> int:
    """Bytes of what is behind some tensors, each storage once."""
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(held.values())


class Held:
    """A callbacks.Watch over one optimiser step for each of some shapes of batches."""

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        self.shapes = shapes
        self.batches: list[dict[str, Any]] = []
        self.terms: dict[str, int] = {}
        self.found: list[dict[str, Any]] = []
        self.paged = 0
        self._trainer: Any = None
        self._seen = self._steps = self._before = 0
        self._profiler: Any = None

    def batch(self, batch: Any) -> None:
        """Repeat what is in the batch until it has the shape whose turn it is: no sample has texts of every length."""
        from recipes.stages.batches import supervised

        turn = min(max(0, self._seen // PARTS - UNMEASURED), len(self.shapes) - 1)
        rows, length = self.shapes[turn]
        for name, value in batch.items():
            times = [-(-wanted // there) for wanted, there in zip((rows, length), value.shape, strict=False)]
            part = (slice(rows), slice(length))[: value.dim()]
            batch[name] = value.repeat(*times)[part].contiguous()
        self._seen += 1
        padded = not bool(batch["attention_mask"].all())
        self.batches.append({"supervised": int(supervised(batch).sum()), "padded": padded})

    def begin(self, trainer: Any) -> None:
        self._trainer = trainer
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        optimizer.register_step_pre_hook(self._before_update)
        optimizer.register_step_post_hook(self._after_update)

    def _before_update(self, optimizer: Any, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.terms["gradients"] = storages(p.grad for p in parameters if p.grad is not None)

    def _after_update(self, optimizer: Any, *_: Any) -> None:
        import torch

        states = (value for state in optimizer.state.values() for value in state.values())
        there = [value for value in states if isinstance(value, torch.Tensor)]
        self.paged = 0
        if torch.cuda.is_available():
            # What is paged comes to the GPU when it is needed, and torch's allocator does not know of it.
            paged = [value for value in there if getattr(value, "is_paged", False)]
            self.paged = storages(paged)
            there = [value for value in there if value.is_cuda] + paged
        self.terms["optimizer"] = storages(there)

    def step(self) -> None:
        self._steps += 1
        if self._steps > UNMEASURED:
            self._stop()
        if UNMEASURED <= self._steps < UNMEASURED + len(self.shapes):
            self._start()

    def resume(self) -> None:
        """The only evaluation comes after what is measured."""

    def _start(self) -> None:
        import torch

        self.terms |= weights(self._trainer.model)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._profiler = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=False
            )
            self._profiler.start()

    def _stop(self) -> None:
        import torch

        whole = {}
        if self._profiler is None:
            torch.cuda.synchronize()
            allocated = torch.cuda.max_memory_allocated()
            whole["most_held"] = allocated + self.paged
            most = allocated - self._before
        else:
            self._profiler.stop()
            most = most_allocated(self._profiler)
        # At both ends of the step there are no gradients; at its peak, in its last part, there are all of them.
        terms = {**self.terms, "activations_and_loss": most - self.terms["gradients"]}
        if set(self._trainer.parts[: self._steps]) != {PARTS}:
            raise RuntimeError("an epoch ended inside a step: the sample has too few rows")
        rows, length = self.shapes[self._steps - 1 - UNMEASURED]
        batches = self.batches[(self._steps - 1) * PARTS : self._steps * PARTS]
        self.found.append({"rows": rows, "length": length, "batches": batches, "terms": terms, **whole})


def most_allocated(profiler: Any) -> int:
    """The highest sum of what was allocated and not yet given back. What was there before the profiler does not
    count when it goes."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes), default=0)


def weights(network: Any) -> dict[str, int]:
    """The live storages of the model, by what they are; 4-bit weights with all that goes with them."""
    import torch

    head, embedding = network.get_output_embeddings(), network.get_input_embeddings()
    outer = {id(p) for p in (*embedding.parameters(), *head.parameters())}
    parts: dict[str, list[Any]] = {name: [] for name in ("quantized_weights", "unquantized_weights", "embedding")}
    lora = []
    for parameter in network.parameters():
        if parameter.requires_grad:
            lora.append(parameter)
        elif id(parameter) in outer:
            parts["embedding"].append(parameter)
        elif state := getattr(parameter, "quant_state", None):
            inner = state.state2
            tensors = [
                parameter,
                state.absmax,
                state.code,
                state.offset,
                *((inner.absmax, inner.code) if inner else ()),
            ]
            parts["quantized_weights"] += [t for t in tensors if isinstance(t, torch.Tensor)]
        else:
            parts["unquantized_weights"].append(parameter)
    parts["unquantized_weights"] += list(network.buffers())
    parts["unquantized_weights"] += [m.unpacked for m in network.modules() if hasattr(m, "unpacked")]
    return {name: storages(tensors) for name, tensors in parts.items()} | {"lora_weights": storages(lora)}


def measure(case: Case, folder: Path) -> dict[str, Any]:
    recipe = importlib.import_module(f"recipes.{case.recipe}").RECIPE
    args = cli.parse_train(recipe, "train", [*case.flags, "--run", str(folder)])
    rows, length = args.settings.batch_size, args.settings.max_length
    held = Held([(n, tokens) for n in (rows, 2 * rows) for tokens in (length // 2, length)])
    run, chosen, choice, _ = fine_tune(recipe, args, held)
    settings = read_json(run.config)["settings"]
    return {"model": chosen.source, "choice": choice.as_json(), "settings": settings, "shapes": held.found}


if __name__ == "__main__":
    leave_out.the_process_is_ours()
    write_json(Path(sys.argv[2]), measure(Case.of(read_json(Path(sys.argv[1]))), Path(sys.argv[3])))
