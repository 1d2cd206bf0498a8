"""Files of answers: streamed, continued after an interruption, never half a row."""

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest

from recipes.stages import predict
from recipes.stages.classifier import Scoring
from recipes.stages.predict import to_file
from recipes.stages.recipe import UserError
from recipes.stages.run import Run

NAMES = ["predicted", "confidence"]


class Answerer:
    """Stands where a model answers; dies when it is told to."""

    def __init__(self, dies_after: int | None = None):
        self.asked: list[str] = []
        self.dies_after = dies_after

    def __call__(self, texts: Sequence[str]) -> list[list[str]]:
        if self.dies_after is not None and len(self.asked) >= self.dies_after:
            raise KeyboardInterrupt
        self.asked += texts
        return [[text.strip().upper(), "0.5"] for text in texts]


def test_another_precision_is_another_order(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.adapter.mkdir()
    (run.adapter / "adapter_model.safetensors").touch()
    exact, again, narrow = (predict.made_with(run, Scoring(), dtype) for dtype in ("float32", "float32", "bfloat16"))
    assert exact == again != narrow


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(predict, "CHUNK", 7)
    path = tmp_path / "in.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "text"])
        table.writerows([i, f'payment "{i}",\nof two lines'] for i in range(50))
    return path


def rows(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_every_row_with_its_answer(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    assert to_file(source, out, "text", NAMES, Answerer(), {"run": "a"}) == 50
    got = rows(out)
    assert got[0] == ["id", "text", "predicted", "confidence"]
    assert got[1:] == [
        [str(i), f'payment "{i}",\nof two lines', f'PAYMENT "{i}",\nOF TWO LINES', "0.5"] for i in range(50)
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.csv", "out.csv"]


@pytest.mark.parametrize("torn", [b"", b'31,"payment', b'31,"payment ""31"",\n'])
def test_it_goes_on_where_it_stopped(source: Path, tmp_path: Path, torn: bytes) -> None:
    out, whole = tmp_path / "out.csv", tmp_path / "whole.csv"
    to_file(source, whole, "text", NAMES, Answerer(), {"run": "a"})
    first = Answerer(dies_after=21)
    with pytest.raises(KeyboardInterrupt):
        to_file(source, out, "text", NAMES, first, {"run": "a"})
    assert not out.exists()
    # What a killed process leaves of a row it was writing.
    with (tmp_path / "out.csv.part").open("ab") as file:
        file.write(torn)
    second = Answerer()
    assert to_file(source, out, "text", NAMES, second, {"run": "a"}) == 50
    assert out.read_bytes() == whole.read_bytes()
    assert len(first.asked) + len(second.asked) == 50


def test_what_was_begun_with_something_else_is_not_continued(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    with pytest.raises(KeyboardInterrupt):
        to_file(source, out, "text", NAMES, Answerer(dies_after=21), {"run": "a"})
    with pytest.raises(UserError, match=r"out.csv.part was begun with another run; .*delete it"):
        to_file(source, out, "text", NAMES, Answerer(), {"run": "b"})
    source.write_text(source.read_text() + "51,new\n")
    with pytest.raises(UserError, match="another bytes"):
        to_file(source, out, "text", NAMES, Answerer(), {"run": "a"})


def test_rows_without_a_text_keep_their_place(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("id;text\n1;a\n2;\n3\n4;b;surplus\n", encoding="utf-8")
    answer = Answerer()
    to_file(path, tmp_path / "out.csv", "text", NAMES, answer, {})
    assert answer.asked == ["a", "b"]
    assert rows(tmp_path / "out.csv")[1:] == [
        ["1", "a", "A", "0.5"], ["2", "", "", ""], ["3", "", "", ""], ["4", "b", "B", "0.5"],
    ]  # fmt: skip


def test_a_missing_column_names_those_found(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"no column 'text'; the columns found are 'a', 'b'"):
        to_file(tmp_path / "in.csv", tmp_path / "out.csv", "text", NAMES, Answerer(), {})
