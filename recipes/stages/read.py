"""Source files -> raw rows. Finds out what a file is before it is believed, and says what is wrong with it."""

import codecs
import csv
import html
import json
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from recipes.stages.recipe import Reading, Row, UserError

# A cell may be as long as memory allows; the module's own limit is 128 KiB.
csv.field_size_limit(sys.maxsize)
_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}


def fold(text: str) -> str:
    """Every run of white space becomes one space."""
    return " ".join(text.split())


_TAG = re.compile(r"</?[a-zA-Z][a-zA-Z0-9]*(?:\s[^<>]*)?/?>")
_BREAK = re.compile(r"<(?:br|/p|/div|/li|/tr|/h[1-6])\s*/?>", re.IGNORECASE)


def clean(text: str) -> str:
    """Text that was copied from web pages: tags and entities resolved, Unicode composed, white space in order. Line
    breaks stay, one empty line at most between two paragraphs."""
    text = unicodedata.normalize("NFC", html.unescape(_TAG.sub("", _BREAK.sub("\n", text))))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def encoding_of(path: Path, older: Sequence[str] = ()) -> str:
    """UTF-8 where the whole file is valid UTF-8, else what its byte order mark says, else the first older encoding
    that decodes it."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name yours with --source FILE") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; --source wants a readable file") from None
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    for encoding in ("utf-8-sig", *older):
        try:
            decoder = codecs.getincrementaldecoder(encoding)()
            with path.open("rb") as file:
                while chunk := file.read(1 << 22):
                    decoder.decode(chunk)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            continue
        return encoding
    raise UserError(f"{path}: not text in {', '.join(('UTF-8', 'UTF-16', *older))}; convert it to UTF-8")


@dataclass(frozen=True)
class Columns:
    """What the reader can be told about an export."""

    text_column: str = "text"
    """Column with the text."""
    label_column: str = "label"
    """Column with the class; classes are text, leading zeros stay."""
    min_samples_per_class: int = 10
    """Classes with fewer rows are dropped: nothing can be learned or measured on them."""
    allow_leak: bool = False
    """Let identical texts fall into different splits; the test then measures partly what was learned by heart."""


class Layout(NamedTuple):
    """How a CSV file is written."""

    encoding: str
    delimiter: str
    header: list[str]
    where: dict[str, int]
    """Column -> its place."""

    @property
    def width(self) -> int:
        return len(self.header)


def layout_of(path: Path, columns: Sequence[str], reading: Reading, older: Sequence[str] = ()) -> Layout:
    """The delimiter is the one under which the header has the columns."""
    encoding = encoding_of(path, older)
    with path.open(encoding=encoding, newline="") as file:
        header_line = file.readline()
    if not header_line.strip():
        raise UserError(f"{path}: the file is empty; it needs a header with the columns {', '.join(columns)}")
    best: list[str] = []
    for delimiter in _DELIMITERS:
        header = [cell.strip() for cell in next(csv.reader([header_line], delimiter=delimiter))]
        if set(columns) <= set(header):
            break
        best = max(best, header, key=len)
    else:
        missing = [column for column in columns if column not in best]
        raise UserError(
            f"{path}: line 1: no column {', '.join(map(repr, missing))}; the columns found are "
            f"{', '.join(map(repr, best))}"
        )
    reading.notes.update(encoding=encoding, delimiter=_DELIMITERS[delimiter])
    return Layout(encoding, delimiter, header, {column: header.index(column) for column in columns})


def csv_records(path: Path, layout: Layout) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of every record below the header that is not blank."""
    with path.open(encoding=layout.encoding, newline="") as file:
        file.readline()
        records = csv.reader(file, delimiter=layout.delimiter)
        before = 0
        while True:
            line = records.line_num + 2
            try:
                cells = next(records)
            except StopIteration:
                break
            except csv.Error as error:
                raise UserError(f"{path}: line {line}: {error}; check its quotes") from None
            before += 1
            if cells:
                yield line, cells
        if not before:
            raise UserError(f"{path}: no rows below the header")


def csv_rows(path: Path, layout: Layout, reading: Reading) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, the layout's columns) of every record that has them."""
    widest = max(layout.where.values())
    for line, cells in csv_records(path, layout):
        if len(cells) > widest:
            yield line, {column: cells[index] for column, index in layout.where.items()}
        else:
            reading.drop("too few columns", line)


def read_csv(
    path: Path, columns: Sequence[str], reading: Reading, older: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, the named columns) of every record."""
    yield from csv_rows(path, layout_of(path, columns, reading, older), reading)


def read_labelled(
    source: Path, columns: Columns, reading: Reading, older: Sequence[str] = ("cp1251",)
) -> Iterator[Row]:
    """Row by row, for files that fit into memory as Python objects."""
    layout = layout_of(source, (columns.text_column, columns.label_column), reading, older)
    for line, cells in csv_rows(source, layout, reading):
        text, label = fold(cells[columns.text_column]), cells[columns.label_column].strip()
        if text and label:
            yield {"text": text, "label": label}
        else:
            reading.drop("empty text" if not text else "empty label", line)


def read_jsonl(path: Path, reading: Reading, strict: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line. Lines that hold no JSON object are dropped and counted, or end it all."""
    encoding = encoding_of(path)
    reading.notes.update(encoding=encoding)
    lines = 0
    with path.open(encoding=encoding) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            lines += 1
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if isinstance(value, dict):
                yield number, value
                continue
            fault = "not JSON" if value is None else "not a JSON object"
            if strict:
                raise UserError(f"{path}: line {number}: {fault}; mend it, or leave --strict away to drop such lines")
            reading.drop(fault, number)
    if not lines:
        raise UserError(f"{path}: the file is empty; it needs one JSON object a line")
