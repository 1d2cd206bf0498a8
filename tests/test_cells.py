"""Tables of answers: no formula for a spreadsheet, and read back as they were."""

import csv
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import recipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipes.stages.cells import CELLS, answer_cells, guarded, ours, table_line, unguarded
from recipes.stages.predict import to_file
from recipes.stages.prepare import prepare
from recipes.stages.read import read_csv
from recipes.stages.recipe import Reading
from recipes.stages.run import read_jsonl

FORMULAS = [
    "=1+1",
    "=cmd|'/C calc'!A0",
    "+1+cmd",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "'=1",
    "''-x",
    "-",
    "＝1",
]
texts = st.one_of(
    st.sampled_from([*FORMULAS, "-5", "+7 495", "-1,234.5", "'", "''", "'-5", "it's", "оплата", ""]),
    st.text(alphabet="'=+-@\t\r\n,\";1aж", max_size=6),
    st.text(max_size=6),
)


@given(texts)
def test_every_cell_comes_back(text: str) -> None:
    assert unguarded(guarded(text)) == text
    if text[:1] in tuple("=+-@\t\r\n＝＋－＠"):
        assert guarded(text)[0] == "'" or not any(letter.isalpha() or letter in "=@(|!'" for letter in text)


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_get_an_apostrophe(text: str) -> None:
    assert guarded(text) == f"'{text}"


@pytest.mark.parametrize("text", ["-5", "-0.25", "+3", "-1,234.5", "-12 %", "0.9312", "it's", "'quoted'", ""])
def test_numbers_and_plain_texts_stay_as_they_are(text: str) -> None:
    assert guarded(text) == text


def echo(asked: Sequence[str]) -> list[list[str]]:
    return [[text, "1"] for text in asked]


@settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=5))
def test_a_file_of_answers_is_read_as_what_was_written(rows: list[tuple[str, str]]) -> None:
    """Twice through predict --file: the second time from a file of ours."""
    with tempfile.TemporaryDirectory() as folder:
        source, first, second = (Path(folder) / name for name in ("in.csv", "first.csv", "second.csv"))
        with source.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, quoting=csv.QUOTE_ALL)
            table.writerow(["text", "=other", "n"])
            table.writerows([*row, i] for i, row in enumerate(rows))
        to_file(source, first, "text", answer_cells(1), echo, {})
        with first.open(encoding="utf-8", newline="") as file:
            header, *cells = csv.reader(file)
        assert header[1] == "'=other"
        assert [tuple(line[:2]) for line in cells] == [tuple(map(guarded, row)) for row in rows]
        back = [line for _, line in read_csv(first, ("text", "=other", "n"), Reading(first))]
        assert back == [{"text": a, "=other": b, "n": str(i)} for i, (a, b) in enumerate(rows)]
        to_file(first, second, "text", answer_cells(1), echo, {})
        again = [tuple(line.values()) for _, line in read_csv(second, ("text", "=other"), Reading(second))]
        assert again == rows


def test_the_apostrophes_of_other_files_are_theirs(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("question,answer\n'=1,''-x\n", encoding="utf-8")
    assert [line for _, line in read_csv(file, ("question", "answer"), Reading(file))] == [
        {"question": "'=1", "answer": "''-x"}
    ]


def test_a_table_of_ours_is_known_by_its_last_columns() -> None:
    assert ours(["id", "text", *CELLS])
    assert ours(["text", *answer_cells(1)])
    assert ours(["text", *answer_cells(4)])
    assert ours(["text", "true", "predicted", "stopped"])
    assert not ours(["question", "answer"])
    assert not ours(["text", "predicted"])
    assert not ours(["stopped"])
    assert not ours([])


def test_predictions_can_be_trained_on_again(tmp_path: Path) -> None:
    source = tmp_path / "predictions.csv"
    written = io.StringIO(newline="")
    written.write(table_line(("text", "true", *CELLS)))
    for i in range(40):
        written.write(table_line((f"=payment {i}", "+a" if i % 2 else "-b", "+a", "0.9", "-b", "0.1")))
    source.write_text(written.getvalue(), encoding="utf-8")
    chosen = recipe("gemma3_12b_opercode")
    columns = type(chosen.options)("text", "true")
    run = prepare(chosen, source, columns, 1, tmp_path / "run", quiet=True)
    rows = [row for split in ("train", "val", "test") for row in read_jsonl(run.data / f"{split}.jsonl")]
    assert {row["label"] for row in rows} == {"+a", "-b"}
    assert {row["text"] for row in rows} == {f"=payment {i}" for i in range(40)}
