"""Source files -> raw rows. Finds out what a file is before it is believed, and says what is wrong with it."""

import codecs
import csv
import html
import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from recipes.stages.cells import ours, unguarded
from recipes.stages.recipe import Reading, Row, UserError

# A cell may be as long as memory allows; the module's own limit is 128 KiB.
csv.field_size_limit(sys.maxsize)
_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}


def fold(text: str) -> str:
    """Every run of white space becomes one space."""
    return " ".join(text.split())


_TAG = re.compile(r"</?[a-zA-Z][a-zA-Z0-9]*(?:\s[^<>]*)?/?>")
_BREAK = re.compile(r"<(?:br|/p|/div|/li|/tr|/h[1-6])\s*/?>", re.IGNORECASE)


# More digits than Python turns into a number; html.unescape would raise.
_ENDLESS = re.compile(r"&#\d{4000,};?")


def clean(text: str) -> str:
    """Text that was copied from web pages: tags and entities resolved, Unicode composed, white space in order. Line
    breaks stay, one empty line at most between two paragraphs."""
    text = html.unescape(_ENDLESS.sub("\ufffd", _TAG.sub("", _BREAK.sub("\n", text))))
    text = unicodedata.normalize("NFC", _piled().sub(lambda marks: marks[0][:30], text))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


@cache
def _piled() -> re.Pattern[str]:
    """More than 30 combining marks on one letter, which no language has. Composing sorts them, and the time it takes
    grows with the square of their number: a few megabytes of them would take hours."""
    marks = "".join(chr(c) for c in range(0x300, 0x1F000) if unicodedata.combining(chr(c)))
    return re.compile(f"[{marks}]{{31,}}")


def encoding_of(path: Path, older: Sequence[str] = ()) -> str:
    """UTF-16 where a byte order mark says so, else UTF-8 where the whole file is valid UTF-8, else the first older
    encoding that decodes it."""
    try:
        # A pipe could not be read twice, and a device never ends.
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a file; --source wants one that can be read twice")
        with path.open("rb") as file:
            start = file.read(4)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name yours with --source FILE") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; --source wants a readable file") from None
    wide = start.startswith((b"\xff\xfe", b"\xfe\xff"))
    tried = ("utf-16",) if wide else ("utf-8-sig", *older)
    faults = []
    for encoding in tried:
        fault = _undecodable(path, encoding)
        if fault is None:
            return encoding
        faults.append(fault)
    expected = "UTF-16, which its first bytes announce" if wide else ", ".join(("UTF-8", "UTF-16", *older))
    raise UserError(f"{path}: line {faults[0]}: not text in {expected}; convert the file to UTF-8")


def _undecodable(path: Path, encoding: str) -> int | None:
    """The first line that is not in this encoding."""
    decoder = codecs.getincrementaldecoder(encoding)()
    line = 1
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                line += _line_ends(decoder.decode(chunk))
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        return line + _line_ends(error.object[: error.start].decode(error.encoding, "ignore"))
    return None


def _line_ends(text: str) -> int:
    return text.count("\n") or text.count("\r")


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
    header_ends: int
    """The header's last line."""
    guarded: bool
    """Written by us, with apostrophes before what a spreadsheet would take for formulas."""

    @property
    def width(self) -> int:
        return len(self.header)


def layout_of(path: Path, columns: Sequence[str], reading: Reading, older: Sequence[str] = ()) -> Layout:
    """The delimiter is the one under which the header has the columns."""
    encoding = encoding_of(path, older)
    best: list[str] = []
    for delimiter in _DELIMITERS:
        first, last, cells = next(_records(path, encoding, delimiter), (1, 1, []))
        if not cells:
            raise UserError(f"{path}: the file is empty; it needs a header with the columns {', '.join(columns)}")
        header = [cell.strip() for cell in cells]
        if guarded := ours(header):
            header = [unguarded(cell) for cell in header]
        if set(columns) <= set(header):
            break
        best = max(best, header, key=len)
    else:
        missing = [column for column in columns if column not in best]
        found = [repr(column[:40]) for column in best[:20]] + ["…"] * (len(best) > 20)
        raise UserError(
            f"{path}: line {first}: no column {', '.join(map(repr, missing))}; the columns found are {', '.join(found)}"
        )
    twice = [column for column in columns if header.count(column) > 1]
    if twice:
        raise UserError(f"{path}: line {first}: more than one column is called {twice[0]!r}; rename all but one")
    reading.notes.update(encoding=encoding, delimiter=_DELIMITERS[delimiter])
    return Layout(encoding, delimiter, header, {column: header.index(column) for column in columns}, last, guarded)


def _records(path: Path, encoding: str, delimiter: str) -> Iterator[tuple[int, int, list[str]]]:
    """(first line, last line, cells) of every record that is not blank, the header among them."""
    ended = False

    def lines(file: Iterable[str]) -> Iterator[str]:
        nonlocal ended
        yield from file
        ended = True

    with path.open(encoding=encoding, newline="") as file:
        records = csv.reader(lines(file), delimiter=delimiter)
        before = 0
        for cells in records:
            if ended:
                # The reader wanted more to finish this record: all that follows the quote would pass for one cell.
                raise UserError(
                    f"{path}: line {before + 1}: a quote is opened in this row and never closed; close it, and double "
                    "the quotes inside of texts"
                )
            if cells:
                yield before + 1, records.line_num, cells
            before = records.line_num


def csv_records(path: Path, layout: Layout) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of every record below the header that is not blank."""
    records = _records(path, layout.encoding, layout.delimiter)
    next(records)
    number = 0
    for number, (line, _, cells) in enumerate(records, 1):  # noqa: B007
        yield line, [unguarded(cell) for cell in cells] if layout.guarded else cells
    if not number:
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


# What may be half of a surrogate pair: json reads it, and no file can be written with it.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def _parsed(line: str) -> tuple[Any, str]:
    """The line's object, or what is wrong with it."""
    try:
        value = json.loads(line)
        if not isinstance(value, dict):
            return None, "not a JSON object"
        if _HALF.search(line):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return None, "half a character (a lone surrogate)"
    except RecursionError:
        return None, "nested too deep"
    except ValueError:
        return None, "not JSON"
    return value, ""


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
            value, fault = _parsed(line)
            if not fault:
                yield number, value
            elif strict:
                raise UserError(f"{path}: line {number}: {fault}; mend it, or leave --strict away to drop such lines")
            else:
                reading.drop(fault, number)
    if not lines:
        raise UserError(f"{path}: the file is empty; it needs one JSON object a line")
