"""The tokens that a training reads: rendered once, kept in a file, and mapped from there by every later training on the
same examples.

What is kept goes by what went in, so that nothing has to notice a change: every piece of text that the template and the
examples gave, the tokenizer as it is in memory, the length, and the code that made tokens of them. A file carries its
digest, and one that is not what was written is made anew.

Import this after a backend has loaded its libraries: it loads pyarrow and NumPy.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fallback.probe import version
from recipes.stages import processes
from recipes.stages.console import note, progress, say
from recipes.stages.recipe import Example
from recipes.stages.render import SOURCE, Rendered, Renderer
from recipes.stages.run import replacing

CACHE = Path(__file__).parents[2] / ".cache" / "tokens"
# What was used last stays.
_MOST_BYTES = 4 * 2**30
_ROWS = 10_000
_DAY = 24 * 60 * 60
_DIGEST = hashlib.sha256
_CODE = Path(__file__).read_bytes() + SOURCE


class Tokens(NamedTuple):
    items: list[Example]
    """Those that fit."""
    table: pa.Table
    """Of each its input_ids and labels."""
    counts: dict[str, int]
    """How many there are, had to be shortened, and were left out."""

    @property
    def lengths(self) -> list[int]:
        return pc.list_value_length(self.table["input_ids"]).to_pylist()


def tokens_of(renderer: Renderer, items: Sequence[Example], max_length: int, what: str) -> Tokens:
    path = CACHE / f"{_key(renderer, items, max_length)}.arrow"
    table = _mapped(path)
    if table is None:
        with progress(f"reading {what}", "examples") as bar:
            table = table_of(bar.track(renderer.examples(items, max_length), total=len(items), description=""))
        # Every process of several has made the same; one writes it.
        if processes.rank() == 0 and table.nbytes <= _MOST_BYTES:
            table = _keep(table, path) or table
    else:
        say(f"the tokens of {what} are those of an earlier training")
    fitting = table["item"].to_pylist()
    shortened = pc.sum(pc.greater(table["cut_tokens"], 0)).as_py() or 0
    return Tokens(
        [items[place] for place in fitting],
        table.select(["input_ids", "labels"]),
        {"examples": len(fitting), "shortened": shortened, "left_out": len(items) - len(fitting)},
    )


def table_of(many: Iterable[Rendered | None]) -> pa.Table:
    """In 32 bits each, and without those that do not fit."""
    batches, numbered = [], ((place, one) for place, one in enumerate(many) if one is not None)
    while some := list(islice(numbered, _ROWS)):
        batches.append(_batch(some))
    return pa.Table.from_batches(batches or [_batch([])])


def _batch(some: Sequence[tuple[int, Rendered]]) -> pa.RecordBatch:
    ends = np.cumsum([0, *(len(one.input_ids) for _, one in some)], dtype=np.int32)

    def lists(of: Iterable[list[int]]) -> pa.Array:
        return pa.ListArray.from_arrays(ends, np.fromiter(chain.from_iterable(of), np.int32, count=ends[-1]))

    return pa.RecordBatch.from_pydict(
        {
            "input_ids": lists(one.input_ids for _, one in some),
            "labels": lists(one.labels for _, one in some),
            "cut_tokens": np.array([one.cut_tokens for _, one in some], np.int32),
            "item": np.array([place for place, _ in some], np.int64),
        }
    )


def _key(renderer: Renderer, items: Iterable[Example], max_length: int) -> str:
    digest = _DIGEST(_CODE)
    digest.update(json.dumps([max_length, *(version(name) for name in ("transformers", "tokenizers"))]).encode())
    digest.update(renderer.tokenizer.backend_tokenizer.to_str().encode())
    for item in items:
        pieces = renderer.pieces(item.messages)
        borders = [(len(text), typed, supervised) for text, typed, supervised in pieces]
        digest.update(f"{borders}{''.join([piece.text for piece in pieces])}".encode())
    return digest.hexdigest()[:32]


def _mapped(path: Path) -> pa.Table | None:
    try:
        with pa.memory_map(str(path)) as source:
            whole = source.read_buffer()
        content, digest = whole[: -_DIGEST().digest_size], whole[-_DIGEST().digest_size :]
        if _DIGEST(content).digest() != digest.to_pybytes():
            raise ValueError("it is damaged")
        table = pa.ipc.open_file(pa.BufferReader(content)).read_all()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        note(f"{path} is not used: {error}")
        return None
    with suppress(OSError):
        # It was used just now.
        os.utime(path)
    return table


def _keep(table: pa.Table, path: Path) -> pa.Table | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            with pa.ipc.new_file(str(beside), table.schema) as writer:
                writer.write_table(table)
            with beside.open("r+b") as file:
                digest = hashlib.file_digest(file, _DIGEST).digest()
                file.write(digest)
    except OSError as error:
        note(f"the tokens are not kept for a later training: {error}")
        return None
    _forget_old()
    return _mapped(path)


def _forget_old() -> None:
    used = 0
    for path in sorted(CACHE.iterdir(), key=_last_used, reverse=True):
        with suppress(OSError):
            # What somebody else is about to put in place, or never will: a training was killed as it wrote.
            if path.suffix != ".arrow":
                if time.time() - _last_used(path) > _DAY:
                    path.unlink()
                continue
            used += path.stat().st_size
            if used > _MOST_BYTES:
                path.unlink()


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        # Somebody else forgot it just now.
        return 0.0
