"""Tables of answers, in which a spreadsheet finds no formulas.

A cell that begins like a formula gets an apostrophe in front. In a table of ours, known by its last columns, the reader
takes it away again; in any other file an apostrophe is part of the text.
"""

import re
from collections.abc import Iterable, Sequence

CELLS = ["predicted", "confidence", "second_choice", "second_confidence"]
"""Columns of an answer out of a closed set."""

# The wide ones are formulas to East Asian spreadsheets.
_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")
_NUMBER = re.compile(r"[+-]?[0-9][0-9.,  ]*%?")


def answer_cells(count: int) -> list[str]:
    """Columns of so many free-text answers to one question, and of how many of them ended by themselves."""
    return ["answer", *(f"answer_{i}" for i in range(2, count + 1)), "stopped"]


def table_line(cells: Iterable[str]) -> str:
    """A row of such a table. A lone carriage return, which Python 3.11's csv module leaves bare, and what separates
    cells in other countries' spreadsheets are quoted too."""
    return ",".join(quoted(guarded(cell)) for cell in cells) + "\n"


def quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"' if any(sign in cell for sign in ',"\r\n;\t') else cell


def guarded(cell: str) -> str:
    return f"'{cell}" if _begins_like_a_formula(cell) else cell


def unguarded(cell: str) -> str:
    """What guarded was given."""
    return cell[1:] if cell[:1] == "'" and _begins_like_a_formula(cell[1:]) else cell


def _begins_like_a_formula(cell: str) -> bool:
    """Numbers stay numbers. What begins with an apostrophe before such a sign gets another one, so that none is
    taken for ours."""
    return bool(_FORMULA.match(cell)) and not _NUMBER.fullmatch(cell)


def ours(header: Sequence[str]) -> bool:
    """Whether a table with these columns was written by evaluate or predict."""
    names = [cell.strip() for cell in header]
    return names[-4:] == CELLS or bool(re.fullmatch(r"(predicted|answer(_\d+)?),stopped", ",".join(names[-2:])))
