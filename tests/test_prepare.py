"""Rows in, splits out; nothing half-written."""

import csv
from collections import Counter
from pathlib import Path

import pytest
from conftest import RECIPES, recipe

from recipes.stages import run as runs
from recipes.stages.prepare import prepare, split_rows
from recipes.stages.recipe import Row, Split, UserError
from recipes.stages.run import Run, read_json, read_jsonl, writing


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runs, "ROOT", tmp_path / "runs")


def labelled(sizes: dict[str, int]) -> list[Row]:
    return [{"text": f"{label} {i}", "label": label} for label, n in sizes.items() for i in range(n)]


def test_every_class_has_its_share_in_every_split() -> None:
    rows = labelled({"a": 1000, "b": 100, "c": 10})
    parts = split_rows(rows, Split(0.15, 0.15, by="label"), seed=1)
    counts = {name: Counter(row["label"] for row in part) for name, part in parts.items()}
    assert counts["test"] == {"a": 150, "b": 15, "c": 2}
    assert counts["train"] == {"a": 700, "b": 70, "c": 6}
    assert sorted(row["text"] for part in parts.values() for row in part) == sorted(row["text"] for row in rows)


def test_even_the_smallest_class_is_in_training() -> None:
    for n in (1, 2, 3):
        parts = split_rows(labelled({"a": n}), Split(0.5, 0.5, by="label"), seed=1)
        assert len(parts["train"]) >= 1


def test_the_seed_decides() -> None:
    rows = labelled({"a": 100})
    split = Split(0.15, 0.15, by="label")
    assert split_rows(rows, split, 1) == split_rows(rows, split, 1)
    assert split_rows(rows, split, 1) != split_rows(rows, split, 2)


def test_assigned_rows_stay_where_they_were_assigned() -> None:
    rows: list[Row] = [{"n": i, "data_type": "valid" if i % 4 == 0 else "train"} for i in range(40)]
    parts = split_rows(rows, Split(0.5, 0.5, assigned="data_type"), seed=1)
    assert [row["data_type"] for row in parts["train"]] == ["train"] * 30
    assert len(parts["val"]) == len(parts["test"]) == 5


@pytest.mark.parametrize("name", RECIPES)
def test_sample(name: str) -> None:
    run = prepare(recipe(name), None, recipe(name).options, seed=1)
    metadata = read_json(run.data / "metadata.json")
    assert metadata["dropped"] == {}
    for split in ("train", "val", "test"):
        rows = list(read_jsonl(run.data / f"{split}.jsonl"))
        assert len(rows) == metadata["splits"][split]["rows"] > 0
        with (run.data / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            assert len(list(csv.reader(file))) == len(rows) + 1
    for row in rows:
        assert recipe(name).to_example(row).messages[-1].role == "assistant"


def test_what_is_dropped_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "pay.csv"
    good = "".join(f"pay {i},{'010151' if i % 2 else '7'}\n" for i in range(60))
    path.write_text("PaymentComment,OperCode\n" + good + " ,7\nx,\nlonely,99\n", encoding="utf-8")
    chosen = recipe("gemma3_12b_opercode")
    run = prepare(chosen, path, chosen.options, seed=1)
    metadata = read_json(run.data / "metadata.json")
    assert metadata["rows"] == 60
    assert metadata["dropped"] == {
        "empty text": {"rows": 1, "first_lines": [62]},
        "empty label": {"rows": 1, "first_lines": [63]},
        "class with fewer than 10 rows": {"rows": 1, "first_lines": [64]},
    }
    assert metadata["dropped_classes"] == {"99": 1}
    assert {row["label"] for row in read_jsonl(run.data / "train.jsonl")} == {"010151", "7"}


def test_dialogues_with_wrong_roles_are_dropped(tmp_path: Path) -> None:
    good = '{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]}\n'
    bad = '{"messages":[{"role":"assistant","content":"a"},{"role":"user","content":"q"}]}\n{"messages":"x"}\n'
    path = tmp_path / "d.jsonl"
    path.write_text(good * 30 + bad + '{"messages":[{"role":"user","content":7}]}\n', encoding="utf-8")
    chosen = recipe("gemma3_1b_counsel")
    metadata = read_json(prepare(chosen, path, chosen.options, seed=1).data / "metadata.json")
    assert metadata["rows"] == 30
    assert sorted(part["rows"] for part in metadata["dropped"].values()) == [1, 1, 1]


def test_nothing_is_written_when_the_source_is_bad(tmp_path: Path) -> None:
    chosen = recipe("llama_1b_civil")
    path = tmp_path / "qa.csv"
    path.write_text("question,answer,category,difficulty\n,x,y,z\n", encoding="utf-8")
    with pytest.raises(UserError, match="no usable rows"):
        prepare(chosen, path, chosen.options, seed=1)
    assert not (tmp_path / "runs").exists()


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old", encoding="utf-8")

    def interrupted() -> None:
        with writing(path) as file:
            file.write("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_metrics_of_other_stages_stay(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.add_metrics(train={"loss": 1})
    run.add_metrics(test={"accuracy": 0.5})
    assert read_json(run.metrics) == {"train": {"loss": 1}, "test": {"accuracy": 0.5}}
