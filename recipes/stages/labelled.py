"""A file of labelled texts -> cleaned, split -> data/, by columns instead of rows.

Millions of rows pass through in blocks: the first pass cleans and keeps of each row its label's number and a hash
of its text, which is all that the split needs; the second writes. Sound files are parsed by pyarrow; whatever it
refuses (ragged rows, open quotes) is read by Python's csv module, whose reading is the one that counts.
"""

import csv
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as pa_csv

from recipes.stages.cells import quoted
from recipes.stages.prepare import SPLITS
from recipes.stages.read import Columns, Layout, csv_rows, layout_of
from recipes.stages.recipe import Reading, Split, UserError
from recipes.stages.run import writing

_BLOCK = 1 << 21
_SLOW_BLOCK = 50_000
# Characters; offsets within a block are 32 bits wide, and escaping makes a text up to six times as long.
_SLOW_CHARACTERS = 1 << 25
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
    """A number for every text: the same for identical texts."""
    dropped: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """Reason -> numbers of the records."""


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
            if last is not None:
                yield Block(last.column(0), last.column(1), first)
                first += last.num_rows
            last = batch if batch.num_rows else last
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
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    schema = pa.schema([("text", pa.string())])
    with pa.OSFile(str(scratch), "wb") as file, pa.ipc.new_file(file, schema) as kept:
        for block in _ahead(map(_tidied, blocks)):
            texts, labels = block.texts, block.labels
            no_text, no_label = (pc.equal(pc.binary_length(some), _number(0)) for some in (texts, labels))
            usable = pc.invert(pc.or_(no_text, no_label))
            if not pc.all(usable).as_py():
                for reason, which in (("empty text", no_text), ("empty label", pc.and_not(no_label, no_text))):
                    found = _view(pc.indices_nonzero(which), np.uint64).astype(np.int64) + block.first
                    if len(found):
                        cleaned.dropped.setdefault(reason, []).append(found)
                texts, labels = texts.filter(usable), labels.filter(usable)
            coded = labels.dictionary_encode()
            numbers = np.array([index.setdefault(name, len(index)) for name in coded.dictionary.to_pylist()], np.int32)
            hashes = np.fromiter(map(hash, texts.to_pylist()), np.int64, len(texts))
            parts.append((numbers[_view(coded.indices, np.int32)], hashes))
            kept.write_batch(pa.record_batch([texts], schema))
    if parts:
        cleaned.labels, cleaned.texts = (np.concatenate(some) for some in zip(*parts, strict=True))
    cleaned.names = list(index)
    return cleaned


def _tidied(block: Block) -> Block:
    return Block(_folded(block.texts), pc.utf8_trim_whitespace(block.labels), block.first)


def _ahead(blocks: Iterator[Block]) -> Iterator[Block]:
    """The next block is parsed and folded while this one is worked on."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = pool.submit(next, blocks, None)
            yield block


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
    if not len(texts):
        return np.empty(0, np.uint8)
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int32, len(texts) + 1, texts.offset * 4)
    return np.frombuffer(data, np.uint8, int(ends[-1] - ends[0]), int(ends[0]))


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
    sizes = np.bincount(cleaned.labels, minlength=len(cleaned.names))
    rare = sizes < columns.min_samples_per_class
    if (~rare).sum() < 2:
        raise UserError(
            f"{source}: {(~rare).sum()} codes have {columns.min_samples_per_class} rows or more, and two are needed to "
            "tell apart; add rows or lower --min-samples-per-class"
        )
    keep = ~rare[cleaned.labels]
    belongs = np.full(len(keep), -1, np.int8)
    belongs[keep] = _assign(cleaned.labels[keep], cleaned.texts[keep], split, seed, columns.allow_leak)
    totals = np.stack([np.bincount(cleaned.labels[belongs == s], minlength=len(cleaned.names)) for s in range(3)])
    empty = [name for name, count in zip(SPLITS, totals.sum(axis=1), strict=True) if not count]
    if empty:
        raise UserError(
            f"{source}: {keep.sum()} usable rows leave nothing for the {' and '.join(empty)} split; "
            "more rows are needed"
        )
    twice, in_conflict, leaking = _identical(cleaned, keep, belongs)
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
        lost = [record for parts in cleaned.dropped.values() for record in parts]
        records = np.arange(len(keep) + sum(map(len, lost)))
        usable = np.setdiff1d(records, np.concatenate(lost)) if lost else records
        cleaned.dropped[f"class with fewer than {columns.min_samples_per_class} rows"] = [usable[~keep]]
    return {
        **reading.notes,
        "dropped_classes": {
            cleaned.names[i]: int(sizes[i]) for i in sorted(np.flatnonzero(rare), key=lambda i: (-sizes[i], i))
        },
        "labels": [cleaned.names[i] for i in order],
        "rows": int(keep.sum()),
        "dropped": _dropped(source, layout, cleaned, reading),
        "identical_texts": {
            "texts": twice,
            "in_more_than_one_split": leaking,
            "with_different_labels": len(in_conflict),
        },
        "longest_bytes": longest,
        "splits": {
            name: {"rows": int(totals[s].sum()), "label": {cleaned.names[i]: int(totals[s][i]) for i in order}}
            for s, name in enumerate(SPLITS)
        },
    }


class _Same(NamedTuple):
    """Rows grouped by their text."""

    order: np.ndarray
    """Rows with identical texts beside each other, each group in the file's order."""
    starts: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, texts: np.ndarray) -> "_Same":
        order = np.argsort(texts, kind="stable")
        ordered = texts[order]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        return cls(order, starts, np.diff(np.r_[starts, len(ordered)]))


def _assign(labels: np.ndarray, texts: np.ndarray, split: Split, seed: int, allow_leak: bool) -> np.ndarray:
    """0, 1 or 2 for every row: train, val, test. Identical texts go as one; every class has its share everywhere,
    and something in train."""
    generator = np.random.Generator(np.random.PCG64(seed))
    same = None if allow_leak else _Same.of(texts)
    if same is None or len(same.starts) == len(texts):
        unit = np.arange(len(texts))
        unit_labels, unit_sizes = labels, np.ones(len(texts), np.int64)
    else:
        # Hashes differ from process to process, so units are numbered by where they first occur.
        first = same.order[same.starts]
        rank = np.empty(len(first), np.int64)
        by_first = np.argsort(first)
        rank[by_first] = np.arange(len(first))
        unit = np.empty(len(texts), np.int64)
        unit[same.order] = np.repeat(rank, same.counts)
        unit_labels, unit_sizes = labels[first[by_first]], same.counts[by_first]
    # By label, and within a label by lot.
    order = np.argsort(unit_labels + generator.random(len(unit_labels)))
    sorted_labels, sorted_sizes = unit_labels[order], unit_sizes[order]
    begins = np.r_[True, sorted_labels[1:] != sorted_labels[:-1]]
    starts, group = np.flatnonzero(begins), np.cumsum(begins) - 1
    before = np.r_[0, np.cumsum(sorted_sizes)[:-1]]
    total = np.add.reduceat(sorted_sizes, starts)
    # The first text of a class is for training; then validation takes its share, then the test.
    first_size = sorted_sizes[starts]
    validation, test = np.rint(total * split.validation), np.rint(total * split.test)
    place = before - before[starts][group] - first_size[group]
    middle = place + sorted_sizes / 2
    belongs_unit = np.zeros(len(order), np.int8)
    inside = place >= 0
    belongs_unit[inside & (middle < validation[group])] = 1
    belongs_unit[inside & (middle >= validation[group]) & (middle < (validation + test)[group])] = 2
    of_unit = np.empty(len(order), np.int8)
    of_unit[order] = belongs_unit
    return of_unit[unit]


def _identical(cleaned: Cleaned, keep: np.ndarray, belongs: np.ndarray) -> tuple[int, set[int], int]:
    """How many texts occur more than once, which of them under different labels, and how many in several splits."""
    same = _Same.of(cleaned.texts[keep])
    order, starts = same.order, same.starts
    labels, splits = cleaned.labels[keep][order], belongs[keep][order]
    differ = np.minimum.reduceat(labels, starts) != np.maximum.reduceat(labels, starts)
    leak = np.minimum.reduceat(splits, starts) != np.maximum.reduceat(splits, starts)
    conflicts = cleaned.texts[keep][order[starts[differ]]]
    return int((same.counts > 1).sum()), set(conflicts.tolist()), int(leak.sum())


def _write(folder: Path, cleaned: Cleaned, belongs: np.ndarray, in_conflict: set[int]) -> int:
    """The texts once more, into their splits; the same rows as JSONL and as CSV. Returns the longest text's bytes."""
    json_ends = _strings([f', "label": {json.dumps(name, ensure_ascii=False)}}}\n' for name in cleaned.names])
    csv_ends = _strings([f",{quoted(name)}\n" for name in cleaned.names])
    conflicts: dict[tuple[str, int], int] = {}
    conflicting = np.array(sorted(in_conflict), np.int64)
    longest = at = 0
    files = {(name, kind): (folder / f"{name}.{kind}").open("wb") for name in SPLITS for kind in ("jsonl", "csv")}
    try:
        for name in SPLITS:
            files[name, "csv"].write(b"text,label\n")
        with pa.memory_map(str(cleaned.scratch)) as mapped, ThreadPoolExecutor(2) as pool:
            reader = pa.ipc.open_file(mapped)
            for number in range(reader.num_record_batches):
                texts = reader.get_batch(number).column(0)
                here = slice(at, at + len(texts))
                at += len(texts)
                labels, split = _numbers(cleaned.labels[here]), belongs[here]
                which = _numbers(split.astype(np.int32))
                masks = [pc.equal(which, _number(s)) for s in range(3)]
                longest = max(longest, pc.max(pc.binary_length(texts)).as_py() or 0)
                work = [
                    pool.submit(_write_lines, form, texts, labels, ends, masks, [files[name, kind] for name in SPLITS])
                    for kind, form, ends in (("jsonl", _as_json, json_ends), ("csv", _as_csv, csv_ends))
                ]
                for done in work:
                    done.result()
                if len(conflicting):
                    some = np.flatnonzero(np.isin(cleaned.texts[here], conflicting) & (split >= 0))
                    for text, label in zip(
                        texts.take(_numbers(some.astype(np.int32))).to_pylist(), cleaned.labels[here][some], strict=True
                    ):
                        conflicts[text, int(label)] = conflicts.get((text, int(label)), 0) + 1
    finally:
        for file in files.values():
            file.close()
    with writing(folder / "conflicts.csv", newline="") as table:
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(["text", "label", "rows"])
        rows.writerows([text, cleaned.names[label], count] for (text, label), count in sorted(conflicts.items()))
    return longest


def _write_lines(
    form: Callable[[pa.Array, pa.Array], pa.Array],
    texts: pa.Array,
    labels: pa.Array,
    ends: pa.Array,
    masks: Sequence[pa.Array],
    files: Sequence[Any],
) -> None:
    lines = form(texts, ends.take(labels))
    for mask, file in zip(masks, files, strict=True):
        file.write(_bytes(lines.filter(mask)).data)


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


def _dropped(source: Path, layout: Layout, cleaned: Cleaned, reading: Reading) -> dict[str, dict[str, Any]]:
    """Counts and first lines by reason."""
    found = {reason: np.concatenate(parts) for reason, parts in cleaned.dropped.items()}
    lines = _lines(source, layout, cleaned, {int(record) for records in found.values() for record in records[:20]})
    return {
        **{reason: {"rows": len(at), "first_lines": at[:20]} for reason, at in reading.dropped.items()},
        **{
            reason: {"rows": len(records), "first_lines": [lines[int(record)] for record in records[:20]]}
            for reason, records in found.items()
        },
    }


def _lines(source: Path, layout: Layout, cleaned: Cleaned, wanted: set[int]) -> dict[int, int]:
    """Record -> line. Where not every record is one line, by reading the file once more, as far as is needed."""
    if not wanted:
        return {}
    # Those that lost their class are among cleaned.labels, the others are not.
    with_text = [part for reason, parts in cleaned.dropped.items() if reason.startswith("empty") for part in parts]
    if _line_ends(source, layout) == layout.header_ends + len(cleaned.labels) + sum(map(len, with_text)):
        return {record: layout.header_ends + 1 + record for record in wanted}
    lines = {}
    for record, (line, _) in enumerate(csv_rows(source, layout, Reading(source))):
        if record in wanted:
            lines[record] = line
            if len(lines) == len(wanted):
                break
    return lines


def _line_ends(source: Path, layout: Layout) -> int | None:
    """How many line ends there are, if all are alike and counted in no time."""
    if layout.encoding == "utf-16":
        return None
    count = returns = pairs = 0
    last = b""
    with source.open("rb") as file:
        while chunk := file.read(1 << 22):
            pairs += chunk.count(b"\r\n") + (last == b"\r" and chunk[:1] == b"\n")
            returns += chunk.count(b"\r")
            count += chunk.count(b"\n")
            last = chunk[-1:]
    return count + (last != b"\n") if returns == pairs else None


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
