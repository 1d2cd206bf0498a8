"""Source files as they really come, and what is said about them."""

from pathlib import Path

import pytest

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


def test_a_missing_file_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; name yours with --source"):
        rows(tmp_path / "none.csv")


def test_jsonl_counts_what_it_drops(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\nnot json\n[1]\n' + "[" * 5000 + '\n{"b": 2}\n', encoding="utf-8")
    reading = Reading(path)
    assert list(read_jsonl(path, reading)) == [(1, {"a": 1}), (6, {"b": 2})]
    assert reading.dropped == {"not JSON": [3], "not a JSON object": [4], "nested too deep": [5]}
