"""A file of labelled texts -> cleaned, split -> data/, by columns instead of rows.

Millions of rows pass through in blocks: the first pass cleans and keeps of each row its label's number and a hash
of its text, which is all that the split needs; the second writes. Sound files are parsed by pyarrow; whatever it
refuses (ragged rows, open quotes) is read by Python's csv module, whose reading is the one that counts.
"""

import csv
import json
import math
import os
import secrets
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as pa_csv

from recipes.stages.assign import Same, assign, counts
from recipes.stages.cells import quoted
from recipes.stages.fingerprint import fingerprints
from recipes.stages.prepare import SPLITS
from recipes.stages.read import Columns, Layout, csv_rows, layout_of
from recipes.stages.recipe import Reading, Split, UserError
from recipes.stages.run import writing

_BLOCK = 1 << 21
_SLOW_BLOCK = 50_000
# Characters: each thread holds a block and what is made of it. Offsets within one are 32 bits wide besides, and
# escaping makes a text up to six times as long.
_SLOW_CHARACTERS = 1 << 22
# What fold changes: white space at an end, two in a row, or one that is no plain space. RE2's \s is ASCII only.
_WHITE = r"\t\n\v\f\r \x1c-\x1f\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
_UNTIDY = rf"^ | $|  |[{_WHITE.replace(' ', '')}]"
_CONTROL = r"[\x00-\x1f]"


class Block(NamedTuple):
    texts: pa.Array
    labels: pa.Array
    first: int
    """Number of the first record."""


@dataclass
class Cleaned:
    """The file after its first pass: everything but the texts themselves, which lie in a scratch file."""

    scratch: Path
    names: list[str] = field(default_factory=list)
    labels: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    texts: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """A number for every text: the same for identical texts. Emptied when identical ones have been found."""
    dropped: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """Reason -> numbers of the records."""


class Tidied(NamedTuple):
    """A block without what cannot be used."""

    texts: pa.Array
    names: list[str]
    labels: np.ndarray
    """Places in names."""
    fingerprints: np.ndarray
    dropped: dict[str, np.ndarray]


def prepare(
    source: Path, columns: Columns, split: Split, seed: int, folder: Path, older: Sequence[str] = ("cp1251",)
) -> dict[str, Any]:
    """Write train, val and test, conflicts.csv, class_weights.json and classes.svg into folder; returns what
    metadata.json says."""
    reading = Reading(source)
    layout = layout_of(source, (columns.text_column, columns.label_column), reading, older)
    scratch = folder / ".texts"
    try:
        cleaned = _cleaned(source, layout, columns, reading, scratch)
        return _split_and_write(source, layout, columns, split, seed, folder, cleaned, reading)
    finally:
        scratch.unlink(missing_ok=True)


def _cleaned(source: Path, layout: Layout, columns: Columns, reading: Reading, scratch: Path) -> Cleaned:
    if not layout.guarded:
        with suppress(pa.ArrowInvalid):
            cleaned = _clean(_fast_blocks(source, layout, columns), scratch)
            # A file of which nothing is left is looked at by the reader that says why.
            if len(cleaned.labels):
                return cleaned
    return _clean(_slow_blocks(source, layout, columns, reading), scratch)


# A last row of our own: pyarrow takes a quote that is never closed for a cell that ends with the file.
_END = "\x1aend of the file\x1a"


class _Ended:
    """A file with one more row."""

    closed = False

    def __init__(self, file: IO[bytes], layout: Layout):
        row = "\n" + layout.delimiter.join([_END] * layout.width) + "\n"
        start = file.read(2)
        file.seek(0)
        wide = "utf-16-le" if start == b"\xff\xfe" else "utf-16-be"
        self.file, self.end = file, row.encode(wide if layout.encoding == "utf-16" else "utf-8")

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        if not data:
            data, self.end = self.end, b""
        return data


def _fast_blocks(source: Path, layout: Layout, columns: Columns) -> Iterator[Block]:
    names = [f"c{i}" for i in range(layout.width)]
    wanted = [names[layout.where[name]] for name in (columns.text_column, columns.label_column)]

    with source.open("rb") as file:
        reader = pa_csv.open_csv(
            _Ended(file, layout),
            pa_csv.ReadOptions(
                block_size=_BLOCK, column_names=names, skip_rows=layout.header_ends,
                encoding="utf8" if layout.encoding == "utf-8-sig" else layout.encoding,
            ),
            pa_csv.ParseOptions(delimiter=layout.delimiter, newlines_in_values=True),
            pa_csv.ConvertOptions(
                include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string()), strings_can_be_null=False
            ),
        )  # fmt: skip
        first = 0
        last = None
        for batch in reader:
            # Of a part of the file that is blank lines alone.
            if not batch.num_rows:
                continue
            if last is not None:
                yield Block(last.column(0), last.column(1), first)
                first += last.num_rows
            last = batch
        if last is None or [last.column(i)[-1].as_py() for i in range(2)] != [_END, _END]:
            raise pa.ArrowInvalid("a quote is never closed")
        last = last.slice(0, last.num_rows - 1)
        yield Block(last.column(0), last.column(1), first)


def _slow_blocks(source: Path, layout: Layout, columns: Columns, reading: Reading) -> Iterator[Block]:
    texts: list[str] = []
    labels: list[str] = []
    first = characters = 0
    for _, cells in csv_rows(source, layout, reading):
        texts.append(cells[columns.text_column])
        labels.append(cells[columns.label_column])
        characters += len(texts[-1]) + len(labels[-1])
        if len(texts) == _SLOW_BLOCK or characters > _SLOW_CHARACTERS:
            yield Block(_strings(texts), _strings(labels), first)
            first += len(texts)
            texts, labels, characters = [], [], 0
    if texts:
        yield Block(_strings(texts), _strings(labels), first)


def _clean(blocks: Iterator[Block], scratch: Path) -> Cleaned:
    cleaned = Cleaned(scratch)
    index: dict[str, int] = {}
    # Arrays that grow where they are: parts that are put together at the end would be there twice.
    labels, texts = array("i"), array("q")
    schema = pa.schema([("text", pa.string())])
    tidied = partial(_tidied, secrets.randbits(64))
    with pa.OSFile(str(scratch), "wb") as file, pa.ipc.new_file(file, schema) as kept, _workers() as pool:
        for block in _in_order(pool, tidied, blocks):
            for reason, records in block.dropped.items():
                cleaned.dropped.setdefault(reason, []).append(records)
            numbers = np.array([index.setdefault(name, len(index)) for name in block.names], np.intc)
            labels.frombytes(numbers[block.labels].tobytes())
            texts.frombytes(block.fingerprints.tobytes())
            kept.write_batch(pa.record_batch([block.texts], schema))
    cleaned.labels, cleaned.texts = np.frombuffer(labels, np.intc), np.frombuffer(texts, np.int64)
    cleaned.names = list(index)
    return cleaned


def _tidied(secret: int, block: Block) -> Tidied:
    texts, labels = _folded(block.texts), pc.utf8_trim_whitespace(block.labels)
    no_text, no_label = (pc.equal(pc.binary_length(some), _number(0)) for some in (texts, labels))
    usable = pc.invert(pc.or_(no_text, no_label))
    dropped = {}
    if not pc.all(usable).as_py():
        for reason, which in (("empty text", no_text), ("empty label", pc.and_not(no_label, no_text))):
            found = _view(pc.indices_nonzero(which), np.uint64).astype(np.int64) + block.first
            if len(found):
                dropped[reason] = found
        texts, labels = texts.filter(usable), labels.filter(usable)
    coded = labels.dictionary_encode()
    numbers = fingerprints(_bytes(texts), _ends(texts), secret)
    return Tidied(texts, coded.dictionary.to_pylist(), _view(coded.indices, np.int32), numbers, dropped)


def _cores() -> int:
    """Eight at most: reading and writing could not keep up with more, and each has a block in memory."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _workers() -> ThreadPoolExecutor:
    """Threads do: what they do happens in pyarrow and numpy, which let others on."""
    return ThreadPoolExecutor(_cores())


def _in_order(pool: ThreadPoolExecutor, work: Callable[[Any], Any], given: Iterable[Any]) -> Iterator[Any]:
    """As map, with a few blocks under work or waiting, and not the whole file."""
    waiting: deque[Future[Any]] = deque()
    for one in given:
        waiting.append(pool.submit(work, one))
        if len(waiting) > _cores():
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _folded(texts: pa.Array) -> pa.Array:
    """As read.fold, a column at a time; the tidy ones stay as they are."""
    untidy = pc.match_substring_regex(texts, _UNTIDY)
    some = pc.replace_substring_regex(texts.filter(untidy), f"[{_WHITE}]+", " ")
    return pc.replace_with_mask(texts, untidy, pc.ascii_trim_whitespace(some)) if len(some) else texts


def _strings(texts: Sequence[str]) -> pa.Array:
    """As pa.array. That, like any Python value given to a kernel, would import pandas to find out whether it is of
    pandas' making, and pandas takes longer to load than the whole file takes to prepare."""
    encoded = [text.encode() for text in texts]
    ends = np.zeros(len(encoded) + 1, np.int32)
    np.cumsum([len(text) for text in encoded], out=ends[1:])
    return pa.StringArray.from_buffers(len(encoded), pa.py_buffer(ends), pa.py_buffer(b"".join(encoded)))


def _numbers(values: np.ndarray) -> pa.Array:
    return pa.Int32Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def _view(values: pa.Array, kind: Any) -> np.ndarray:
    return np.frombuffer(values.buffers()[1], kind, len(values), values.offset * np.dtype(kind).itemsize)


def _bytes(texts: pa.Array) -> np.ndarray:
    """All texts, one behind the other."""
    ends = _places(texts)
    if ends[-1] == ends[0]:
        return np.empty(0, np.uint8)
    return np.frombuffer(texts.buffers()[2], np.uint8, int(ends[-1] - ends[0]), int(ends[0]))


def _ends(texts: pa.Array) -> np.ndarray:
    """Where in these bytes each text ends, after where the first begins."""
    ends = _places(texts)
    return ends - ends[0]


def _places(texts: pa.Array) -> np.ndarray:
    if not len(texts):
        return np.zeros(1, np.int32)
    return np.frombuffer(texts.buffers()[1], np.int32, len(texts) + 1, texts.offset * 4)


def _number(value: int) -> pa.Scalar:
    return _numbers(np.array([value], np.int32))[0]


def _string(text: str) -> pa.Scalar:
    return _strings([text])[0]


def _split_and_write(
    source: Path,
    layout: Layout,
    columns: Columns,
    split: Split,
    seed: int,
    folder: Path,
    cleaned: Cleaned,
    reading: Reading,
) -> dict[str, Any]:
    sizes = counts(cleaned.labels)
    rare = sizes < columns.min_samples_per_class
    if (~rare).sum() < 2:
        raise UserError(
            f"{source}: {(~rare).sum()} codes have {columns.min_samples_per_class} rows or more, and two are needed to "
            "tell apart; add rows or lower --min-samples-per-class"
        )
    labels, texts, kept = cleaned.labels, cleaned.texts, None
    if rare.any():
        kept = ~rare[labels]
        labels, texts = labels[kept], texts[kept]
    same, cleaned.texts = Same.of(texts), np.empty(0, np.int64)
    del texts
    belongs = assign(labels, None if columns.allow_leak else same, split, seed)
    totals = np.stack([np.bincount(labels[belongs == s], minlength=len(cleaned.names)) for s in range(3)])
    empty = [name for name, count in zip(SPLITS, totals.sum(axis=1), strict=True) if not count]
    if empty:
        raise UserError(
            f"{source}: {len(labels)} usable rows leave nothing for the {' and '.join(empty)} split; "
            "more rows are needed"
        )
    differing, leaking = same.differing(labels), same.differing(belongs)
    in_conflict = same.rows_of(differing)
    if kept is not None:
        in_conflict = np.flatnonzero(kept)[in_conflict] if len(in_conflict) else in_conflict
        within, belongs = belongs, np.full(len(cleaned.labels), -1, np.int8)
        belongs[kept] = within
    longest = _write(folder, cleaned, belongs, in_conflict)
    order = [int(i) for i in np.argsort(-sizes, kind="stable") if not rare[i]]
    by_class = {cleaned.names[i]: int(sizes[i]) for i in order}
    train = {cleaned.names[i]: int(totals[0][i]) for i in order}
    with writing(folder / "class_weights.json") as file:
        total = sum(train.values())
        json.dump({name: total / (len(train) * count) for name, count in train.items()}, file, indent=2)
    with writing(folder / "classes.svg") as file:
        file.write(_bars(by_class))
    if rare.any():
        reason = f"class with fewer than {columns.min_samples_per_class} rows"
        cleaned.dropped[reason] = [_records(np.flatnonzero(belongs < 0), cleaned)]
    return {
        **reading.notes,
        "dropped_classes": {
            cleaned.names[i]: int(sizes[i]) for i in sorted(np.flatnonzero(rare), key=lambda i: (-sizes[i], i))
        },
        "labels": [cleaned.names[i] for i in order],
        "rows": len(labels),
        "dropped": _dropped(source, layout, cleaned, reading),
        "identical_texts": {
            "texts": len(same.starts),
            "in_more_than_one_split": int(leaking.sum()),
            "with_different_labels": int(differing.sum()),
        },
        "longest_bytes": longest,
        "splits": {
            name: {"rows": int(totals[s].sum()), "label": {cleaned.names[i]: int(totals[s][i]) for i in order}}
            for s, name in enumerate(SPLITS)
        },
    }


def _records(rows: np.ndarray, cleaned: Cleaned) -> np.ndarray:
    """The records' numbers, of which those without text or label are no rows."""
    parts = [part for parts in cleaned.dropped.values() for part in parts]
    lost = np.sort(np.concatenate([np.empty(0, np.int64), *parts]))
    return rows + np.searchsorted(lost - np.arange(len(lost)), rows, side="right")


class _Lines(NamedTuple):
    """A block's rows as they will be written, by kind of file and split."""

    written: dict[tuple[str, str], np.ndarray]
    longest: int
    conflicts: list[tuple[str, int]]


def _write(folder: Path, cleaned: Cleaned, belongs: np.ndarray, in_conflict: np.ndarray) -> int:
    """The texts once more, into their splits; the same rows as JSONL and as CSV. Returns the longest text's bytes."""
    ends = {
        "jsonl": _strings([f', "label": {json.dumps(name, ensure_ascii=False)}}}\n' for name in cleaned.names]),
        "csv": _strings([f",{quoted(name)}\n" for name in cleaned.names]),
    }
    conflicts: Counter[tuple[str, int]] = Counter()
    longest = 0
    files = {(name, kind): (folder / f"{name}.{kind}").open("wb") for name in SPLITS for kind in _FORMS}
    # A file's lines have an order, so that each kind has a writer of its own.
    writers = {kind: ThreadPoolExecutor(1) for kind in _FORMS}
    writing_now: deque[Future[None]] = deque()
    try:
        for name in SPLITS:
            files[name, "csv"].write(b"text,label\n")
        with pa.OSFile(str(cleaned.scratch)) as scratch, _workers() as pool:
            work = partial(_lines_of, cleaned.labels, belongs, in_conflict, ends)
            for lines in _in_order(pool, work, _kept(scratch)):
                longest = max(longest, lines.longest)
                conflicts.update(lines.conflicts)
                for kind, writer in writers.items():
                    writing_now.append(writer.submit(_write_lines, files, kind, lines))
                while len(writing_now) > 2 * len(writers):
                    writing_now.popleft().result()
            for done in writing_now:
                done.result()
    finally:
        for writer in writers.values():
            writer.shutdown()
        for file in files.values():
            file.close()
    with writing(folder / "conflicts.csv", newline="") as table:
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(["text", "label", "rows"])
        rows.writerows([text, cleaned.names[label], count] for (text, label), count in sorted(conflicts.items()))
    return longest


def _kept(scratch: pa.NativeFile) -> Iterator[tuple[pa.Array, int]]:
    """Texts of the scratch file, and the number of the first."""
    reader = pa.ipc.open_file(scratch)
    at = 0
    for number in range(reader.num_record_batches):
        texts = reader.get_batch(number).column(0)
        yield texts, at
        at += len(texts)


def _lines_of(
    labels: np.ndarray, belongs: np.ndarray, in_conflict: np.ndarray, ends: dict[str, pa.Array],
    block: tuple[pa.Array, int],
) -> _Lines:  # fmt: skip
    texts, at = block
    here = slice(at, at + len(texts))
    numbers, split = _numbers(labels[here]), _numbers(belongs[here].astype(np.int32))
    masks = {name: pc.equal(split, _number(s)) for s, name in enumerate(SPLITS)}
    written: dict[tuple[str, str], np.ndarray] = {}
    for kind, form in _FORMS.items():
        lines = form(texts, ends[kind].take(numbers))
        written |= {(name, kind): _bytes(lines.filter(mask)) for name, mask in masks.items()}
    first, last = np.searchsorted(in_conflict, (here.start, here.stop))
    some = in_conflict[first:last]
    differing = texts.take(_numbers((some - at).astype(np.int32))).to_pylist()
    longest = pc.max(pc.binary_length(texts)).as_py() or 0
    return _Lines(written, longest, list(zip(differing, labels[some].tolist(), strict=True)))


def _write_lines(files: dict[tuple[str, str], Any], kind: str, lines: _Lines) -> None:
    for name in SPLITS:
        files[name, kind].write(lines.written[name, kind].data)


def _as_json(texts: pa.Array, ends: pa.Array) -> pa.Array:
    escaped = pc.replace_substring(pc.replace_substring(texts, "\\", "\\\\"), '"', '\\"')
    if (_bytes(texts) < ord(" ")).any():
        control = pc.match_substring_regex(texts, _CONTROL)
        rare = texts.filter(control).to_pylist()
        written = [json.dumps(text, ensure_ascii=False)[1:-1] for text in rare]
        escaped = pc.replace_with_mask(escaped, control, _strings(written))
    return pc.binary_join_element_wise(_string('{"text": "'), escaped, _string('"'), ends, _string(""))


def _as_csv(texts: pa.Array, ends: pa.Array) -> pa.Array:
    doubled = pc.replace_substring(texts, '"', '""')
    return pc.binary_join_element_wise(_string('"'), doubled, _string('"'), ends, _string(""))


_FORMS = {"jsonl": _as_json, "csv": _as_csv}


def _dropped(source: Path, layout: Layout, cleaned: Cleaned, reading: Reading) -> dict[str, dict[str, Any]]:
    """Counts and first lines by reason."""
    found = {reason: np.concatenate(parts) for reason, parts in cleaned.dropped.items()}
    by_quotes = layout.encoding != "utf-16" and not reading.dropped
    lines = _lines(
        source, layout, cleaned, by_quotes, {int(record) for records in found.values() for record in records[:20]}
    )
    return {
        **{reason: {"rows": len(at), "first_lines": at[:20]} for reason, at in reading.dropped.items()},
        **{
            reason: {"rows": len(records), "first_lines": [lines[int(record)] for record in records[:20]]}
            for reason, records in found.items()
        },
    }


def _lines(source: Path, layout: Layout, cleaned: Cleaned, by_quotes: bool, wanted: set[int]) -> dict[int, int]:
    """Record -> line."""
    if not wanted:
        return {}
    # Those that lost their class are among cleaned.labels, the others are not.
    with_text = [part for reason, parts in cleaned.dropped.items() if reason.startswith("empty") for part in parts]
    records = len(cleaned.labels) + sum(map(len, with_text))
    found = _lines_by_quotes(source, layout, records, np.array(sorted(wanted))) if by_quotes else None
    if found is None:
        found = {}
        for record, (line, _) in enumerate(csv_rows(source, layout, Reading(source))):
            if record in wanted:
                found[record] = line
                if len(found) == len(wanted):
                    break
    return found


def _lines_by_quotes(source: Path, layout: Layout, records: int, wanted: np.ndarray) -> dict[int, int] | None:
    """A line end after an odd number of quotes is inside a text, any other ends a record, unless it ends an empty
    line. None where that is not how the file is written: where a quote opens in the middle of a cell, or where it does
    not lead to as many records as were read."""
    found: dict[int, int] = {}
    record, line, rest = 0, layout.header_ends + 1, b""
    before = np.frombuffer(f'{layout.delimiter}"\n'.encode(), np.uint8)
    with source.open("rb") as file:
        lines = [file.readline() for _ in range(layout.header_ends)]
        if _lone_returns(b"".join(lines)):
            return None
        while True:
            chunk = file.read(_BLOCK)
            data = np.frombuffer(rest + (chunk or b"\n"), np.uint8)
            ends, quotes = np.flatnonzero(data == ord("\n")), np.flatnonzero(data == ord('"'))
            outside = np.flatnonzero(np.searchsorted(quotes, ends) % 2 == 0)
            whole = int(ends[outside[-1]]) + 1 if len(outside) else 0
            rest = data[whole:].tobytes()
            if len(rest) > 64 * _BLOCK or _lone_returns(data[:whole].tobytes()):
                return None
            opening = quotes[: np.searchsorted(quotes, whole)][::2]
            if not np.isin(data[opening[opening > 0] - 1], before).all():
                return None
            starts = np.r_[0, ends[outside] + 1][:-1]
            empty = (length := ends[outside] - starts) == 0
            empty |= (length == 1) & (data[starts] == ord("\r"))
            at = (line + np.r_[0, outside + 1][:-1])[~empty]
            first, last = np.searchsorted(wanted, (record, record + len(at)))
            found |= {int(one): int(at[one - record]) for one in wanted[first:last]}
            record += len(at)
            line += int(outside[-1]) + 1 if len(outside) else 0
            if not chunk:
                return found if record == records and not rest else None


def _lone_returns(data: bytes) -> bool:
    return data.count(b"\r") != data.count(b"\r\n")


def _bars(sizes: dict[str, int]) -> str:
    """The class distribution as a picture, drawn by hand: a plotting library would take longer than all the rest."""
    bar, left, top, height = 13, 56, 34, 220
    width = left + bar * len(sizes) + 16
    most = max(sizes.values())
    decades = math.ceil(math.log10(max(10, most)))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top + height + 64}" '
        'font-family="sans-serif" font-size="10">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="18" font-size="13">Rows of each of the {len(sizes)} classes (logarithmic)</text>',
    ]
    for decade in range(decades + 1):
        y = top + height - height * decade / decades
        parts.append(f'<line x1="{left}" x2="{width - 16}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 3:.1f}" text-anchor="end">{10**decade:,}</text>')
    for place, (name, size) in enumerate(sizes.items()):
        x, tall = left + bar * place, max(1.0, height * math.log10(max(1, size)) / decades)
        label = name.replace("&", "&amp;").replace("<", "&lt;")
        parts.append(
            f'<rect x="{x + 1.5}" y="{top + height - tall:.1f}" width="{bar - 3}" height="{tall:.1f}" fill="#2b6cb0">'
            f"<title>{label}: {size:,} rows</title></rect>"
        )
        parts.append(f'<text transform="translate({x + 9} {top + height + 6}) rotate(90)" font-size="9">{label}</text>')
    return "\n".join([*parts, "</svg>\n"])
