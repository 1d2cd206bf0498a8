"""Source files as they really come, and what is said about them."""

import os
from pathlib import Path

import pytest
from conftest import recipe

from recipes.stages.prepare import prepare
from recipes.stages.read import read_csv, read_jsonl
from recipes.stages.recipe import Reading, UserError

WANTED = ("PaymentComment", "OperCode")
ROW = 'PaymentComment,OperCode\n"Оплата, по счёту ""7""\nвторая строка",010151\n'


def rows(path: Path, older: tuple[str, ...] = ()) -> tuple[list[dict[str, str]], Reading]:
    reading = Reading(path)
    return [cells for _, cells in read_csv(path, WANTED, reading, older)], reading


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1251", "utf-16"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(ROW.encode(encoding))
    found, _ = rows(path, ("cp1251",))
    assert found == [{"PaymentComment": 'Оплата, по счёту "7"\nвторая строка', "OperCode": "010151"}]


@pytest.mark.parametrize(("delimiter", "name"), [(",", "comma"), (";", "semicolon"), ("\t", "tab")])
def test_delimiters(tmp_path: Path, delimiter: str, name: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"id{delimiter}OperCode{delimiter}PaymentComment\n1{delimiter}7{delimiter}x\n", encoding="utf-8")
    found, reading = rows(path)
    assert found == [{"PaymentComment": "x", "OperCode": "7"}]
    assert reading.notes["delimiter"] == name


def test_line_numbers_count_the_lines_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(ROW + "x,1\nshort\ny,2\n", encoding="utf-8")
    reading = Reading(path)
    assert [line for line, _ in read_csv(path, WANTED, reading)] == [2, 4, 6]
    assert reading.dropped == {"too few columns": [5]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"PaymentComment,OperCode\n", "no rows below the header"),
        (b"Comment,OperCode\nx,1\n", r"no column 'PaymentComment'; the columns found are 'Comment', 'OperCode'"),
        (b"PaymentComment,OperCode\n\xff\xff\xff,1\n", "not text in UTF-8"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        rows(path)


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\n\n"])
def test_only_a_header(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"PaymentComment,OperCode" + end)
    chosen = recipe("gemma3_12b_opercode")
    with pytest.raises(UserError, match="no rows below the header"):
        prepare(chosen, path, chosen.options, 1, tmp_path / "run", quiet=True)


@pytest.mark.parametrize(
    ("content", "line"),
    [("п,о\n1,2\n".encode() + b"3,\xff\n", 3), (b"\xff\xfe" + "п,о\n1,2".encode("utf-16-le") + b"\x00\xd8", 2)],
    ids=["UTF-8", "UTF-16"],
)
def test_what_is_no_text_is_named_by_its_line(tmp_path: Path, content: bytes, line: int) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"a.csv: line {line}: not text in UTF"):
        rows(path)


def test_what_cannot_be_read_twice_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match=r": not a file"):
            rows(path)


def test_a_header_may_stand_below_blank_lines_and_span_two(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('\n\n"two\nlines",PaymentComment,OperCode\n1,x,7\n', encoding="utf-8")
    assert list(read_csv(path, WANTED, Reading(path))) == [(5, {"PaymentComment": "x", "OperCode": "7"})]


def test_a_missing_file_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; name yours with --source"):
        rows(tmp_path / "none.csv")


def test_jsonl_counts_what_it_drops(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\nnot json\n[1]\n' + "[" * 5000 + '\n{"b": 2}\n', encoding="utf-8")
    reading = Reading(path)
    assert list(read_jsonl(path, reading)) == [(1, {"a": 1}), (6, {"b": 2})]
    assert reading.dropped == {"not JSON": [3], "not a JSON object": [4], "nested too deep": [5]}
