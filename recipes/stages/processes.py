"""Several processes, started by torchrun or accelerate launch: which of them this one is, and what they do together.

Where there is one process nothing of torch is loaded. Where there are several, `join` makes the group that the Trainer
finds in place; what the first process does for all goes through the launcher's store, whose waiting has no deadline.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

Found = TypeVar("Found")
Item = TypeVar("Item")

_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# What a launcher sets: a process of our own that has nothing to do with the others must not take it for its own.
_LAUNCHERS = (*_LAUNCHED, "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")
_STEP = timedelta(minutes=10)
"""A process that has said nothing for so long, in the middle of a step, is taken for dead."""
_EVER = timedelta(days=7)
_store: Any = None
_asked = 0


class Elsewhere(Exception):
    """Another process of this training has failed, and has said why."""


@dataclass(frozen=True)
class Team:
    """Processes that share work between them. What each of them does is what one alone would do at that place."""

    rank: int = 0
    size: int = 1

    def mine(self, items: Sequence[Item]) -> list[tuple[int, Item]]:
        """This process's part, each item with its place among all."""
        return list(enumerate(items))[self.rank :: self.size]

    def together(self, mine: Sequence[tuple[int, Item]]) -> list[Item]:
        """All parts in the order of their places, in every process."""
        parts = gathered(list(mine)) if self.size > 1 else [mine]
        return [item for _, item in sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])]


ALONE = Team()


def launched() -> bool:
    """Other software sets WORLD_SIZE too; launchers set all of these."""
    return all(name in os.environ for name in _LAUNCHED) and int(os.environ["WORLD_SIZE"]) > 1


def rank() -> int:
    return int(os.environ["RANK"]) if launched() else 0


def world() -> int:
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def team() -> Team:
    return Team(rank(), world())


def alone() -> dict[str, str]:
    """The environment for a process of our own that belongs to no group."""
    return {
        name: value
        for name, value in os.environ.items()
        if not (launched() and (name in _LAUNCHERS or name.startswith("TORCHELASTIC_")))
    }


def sharded(environ: Mapping[str, str] = os.environ) -> bool:
    """accelerate's configuration divides the weights among the processes: a forward pass then needs all of them, and
    no process may take one more than the others."""
    return any(environ.get(f"ACCELERATE_USE_{engine}", "").lower() == "true" for engine in ("FSDP", "DEEPSPEED"))


def join(device: str) -> None:
    """Meet the other processes. Call it when Choice.module has set what torch has to find in its environment."""
    global _store
    if not launched() or _store is not None:
        return
    import torch
    from torch.distributed import PrefixStore, init_process_group, rendezvous

    backend = "gloo"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # What is no tensor of the training, such as answers and flags, needs no GPU to wait for.
        backend = "cpu:gloo,cuda:nccl"
    store, number, size = next(rendezvous("env://", timeout=_STEP))
    init_process_group(backend, store=PrefixStore("group", store), rank=number, world_size=size, timeout=_STEP)
    _store = PrefixStore("ours", store)


def leave() -> None:
    """At the end of work that went well: one process must not close its connections while another still uses them."""
    if _store is None:
        return
    from torch import distributed

    distributed.barrier()
    distributed.destroy_process_group()


def first(do: Callable[[], Found]) -> Found:
    """What the first process does, or finds, for all of them; JSON. The others wait, however long that takes."""
    global _asked
    if not launched():
        return do()
    _asked += 1
    key = f"first/{_asked}"
    if rank():
        _store.wait([key], _EVER)
        found = json.loads(_store.get(key))
        if "failed" in found:
            raise Elsewhere
        return found["found"]
    try:
        done = do()
    except BaseException:
        _store.set(key, json.dumps({"failed": True}))
        raise
    _store.set(key, json.dumps({"found": done}))
    return done


def first_here(do: Callable[[], None]) -> None:
    """For what is kept on a machine: its first process goes first, and finds nothing done; the others find it done."""
    if not launched():
        do()
        return
    from torch import distributed

    if os.environ["LOCAL_RANK"] == "0":
        do()
    distributed.barrier()
    if os.environ["LOCAL_RANK"] != "0":
        do()


def gathered(value: Any) -> list[Any]:
    """The value of every process, by rank, in every process."""
    if not launched():
        return [value]
    from torch import distributed

    values: list[Any] = [None] * world()
    distributed.all_gather_object(values, value)
    return values


def summed(values: Sequence[float]) -> list[float]:
    return _reduced(values, "SUM")


def most(values: Sequence[float]) -> list[float]:
    """Of each value the largest that any process has."""
    return _reduced(values, "MAX")


def _reduced(values: Sequence[float], how: str) -> list[float]:
    if not launched():
        return list(values)
    import torch
    from torch import distributed

    numbers = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(numbers, getattr(distributed.ReduceOp, how))
    return numbers.tolist()


def speaks() -> bool:
    """Whether it is for this process to tell of what went wrong: one message is enough."""
    if not launched():
        return True
    if _store is None:
        # Nothing but the command line and the machine was looked at yet, which are the same for all.
        return rank() == 0
    try:
        return _store.add("told", 1) == 1
    except RuntimeError:
        # The launcher's store went away with it.
        return True


def lost(error: BaseException) -> bool:
    """Whether this error means that another process is gone."""
    if not launched():
        return False
    said = str(error)
    signs = ("closed by peer", "reset by peer", "Broken pipe", "[c10d]", "gloo", "NCCL", "Application timeout")
    network = getattr(sys.modules.get("torch.distributed"), "DistError", ())
    return isinstance(error, network) or (isinstance(error, RuntimeError) and any(sign in said for sign in signs))
