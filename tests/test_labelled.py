"""A file of labelled texts by columns: what is kept equals what a plain reading of the file gives."""

import csv
import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, recipe

from recipes.samples.payments import write_csv
from recipes.stages import labelled
from recipes.stages.read import Columns, read_labelled
from recipes.stages.recipe import Reading, Split, UserError

COLUMNS = Columns("t", "c", min_samples_per_class=2)
SPLIT = Split(validation=0.15, test=0.15, by="label")


def prepared(source: Path, folder: Path, columns: Columns = COLUMNS, seed: int = 1) -> tuple[dict[str, Any], list[Any]]:
    folder.mkdir()
    metadata = labelled.prepare(source, columns, SPLIT, seed, folder)
    rows = []
    for name in ("train", "val", "test"):
        lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            assert [dict(row) for row in csv.DictReader(file)] == lines, "CSV and JSONL say different things"
        assert len(lines) == metadata["splits"][name]["rows"]
        assert Counter(line["label"] for line in lines) == {
            label: n for label, n in metadata["splits"][name]["label"].items() if n
        }
        rows += [(name, line["text"], line["label"]) for line in lines]
    assert not list(folder.glob(".*")), "scratch files are left"
    return metadata, rows


def plain(source: Path, columns: Columns = COLUMNS) -> Counter[tuple[str, str]]:
    """What the file holds by Python's csv module, one row after the other."""
    rows = [(row["text"], row["label"]) for row in read_labelled(source, columns, Reading(source))]
    sizes = Counter(label for _, label in rows)
    return Counter((text, label) for text, label in rows if sizes[label] >= columns.min_samples_per_class)


AWKWARD = [
    'a "quoted" word', "comma, inside", "semi;colon", "tab\there", "two\nlines", "crlf\r\ninside", "back\\slash",
    "  spaces   everywhere  ", "\u00a0no-break\u00a0\u2003em", "оплата за товар", "한국어 텍스트", "emoji 🙂",
    "control \x01 char", "unit\x1fseparator", "line\u2028separator", "ends with quote\"", '"', '""', "'single'", "é",
    "e\u0301", "NUL\x00inside",
]  # fmt: skip


def write(path: Path, rows: list[tuple[str, str]], delimiter: str = ",", encoding: str = "utf-8", **how: Any) -> None:
    with path.open("w", encoding=encoding, newline="") as file:
        table = csv.writer(file, delimiter=delimiter, **how)
        table.writerow(["x", "t", "c"])
        table.writerows([str(i), text, label] for i, (text, label) in enumerate(rows))


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_awkward_texts(delimiter: str, encoding: str, tmp_path: Path) -> None:
    rows = [(f"{text} {i % 7}", "010151" if i % 3 else "7") for i, text in enumerate(AWKWARD * 6)]
    write(tmp_path / "in.csv", rows, delimiter, encoding)
    metadata, kept = prepared(tmp_path / "in.csv", tmp_path / "data")
    assert Counter((text, label) for _, text, label in kept) == plain(tmp_path / "in.csv")
    assert {label for *_, label in kept} == {"010151", "7"}
    assert metadata["dropped"] == {}
    assert all(text == " ".join(text.split()) for _, text, _ in kept)


def test_cp1251(tmp_path: Path) -> None:
    write(tmp_path / "in.csv", [(f"оплата за товар {i}", str(i % 2)) for i in range(40)], ";", "cp1251")
    metadata, kept = prepared(tmp_path / "in.csv", tmp_path / "data")
    assert metadata["encoding"] == "cp1251"
    assert len(kept) == 40
    assert all(text.startswith("оплата") for _, text, _ in kept)


@pytest.mark.parametrize("line", ["1,too few\n", "1,text,a,too,many\n", '1,"closed" and on,a\n', "\n", "1,  ,a\n"])
def test_unsound_lines_are_read_as_python_reads_them(line: str, tmp_path: Path) -> None:
    good = [f"{i},text {i},{'a' if i % 2 else 'b'}\n" for i in range(40)]
    (tmp_path / "in.csv").write_text("x,t,c\n" + "".join([*good[:20], line, *good[20:]]), encoding="utf-8")
    _, kept = prepared(tmp_path / "in.csv", tmp_path / "data")
    assert Counter((text, label) for _, text, label in kept) == plain(tmp_path / "in.csv")


def test_a_quote_that_is_never_closed_swallows_no_rows_in_silence(tmp_path: Path) -> None:
    good = [f"{i},text {i},{'a' if i % 2 else 'b'}\n" for i in range(40)]
    for name, line in (("middle", '1,"open quote,a\n'), ("last", '1,text,"open quote\n')):
        (tmp_path / f"{name}.csv").write_text("x,t,c\n" + "".join([*good[:20], line, *good[20:]]))
        with pytest.raises(UserError, match=r"csv: line 22: a quote is opened in this row and never closed"):
            prepared(tmp_path / f"{name}.csv", tmp_path / name)


@pytest.mark.parametrize("blank", ["", "\n"], ids=["a line each", "a blank line"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_rows_of_rare_classes_have_their_lines_too(blank: str, end: str, tmp_path: Path) -> None:
    good = "".join(f"{i},text {i},{'a' if i % 2 else 'b'}\n" for i in range(40))
    content = "x,t,c\n" + good + blank + "7, ,a\n8,alone,rare\n"
    (tmp_path / "in.csv").write_bytes(content.replace("\n", end).encode())
    metadata, _ = prepared(tmp_path / "in.csv", tmp_path / "data")
    at = 42 + len(blank)
    assert metadata["dropped"] == {
        "empty text": {"rows": 1, "first_lines": [at]},
        "class with fewer than 2 rows": {"rows": 1, "first_lines": [at + 1]},
    }


def test_what_is_dropped_has_its_lines_under_either_parser(tmp_path: Path) -> None:
    body = "".join(f'{i},"two\nlines {i}",{"a" if i % 2 else "b"}\n' for i in range(30))
    for name, ragged in (("sound", ""), ("ragged", "99,short\n")):
        source = tmp_path / f"{name}.csv"
        source.write_text("x,t,c\n" + body + '7,"",a\n8,text,\n' + ragged, encoding="utf-8")
        metadata, kept = prepared(source, tmp_path / name)
        assert len(kept) == 30
        assert metadata["dropped"]["empty text"] == {"rows": 1, "first_lines": [62]}
        assert metadata["dropped"]["empty label"] == {"rows": 1, "first_lines": [63]}
        assert ("too few columns" in metadata["dropped"]) == bool(ragged)


def test_lines_are_found_by_quotes_and_only_where_quotes_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled, "_BLOCK", 101)
    generator = random.Random(3)
    source = tmp_path / "in.csv"
    rows = [(generator.choice(AWKWARD) * generator.randrange(3), generator.choice("ab")) for _ in range(300)]
    write(source, [(text.replace("\r", ""), label) for text, label in rows])
    for end in ("\n", "\r\n"):
        source.write_bytes(source.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", end.encode()) + end.encode())
        layout = labelled.layout_of(source, ("t", "c"), Reading(source))
        expected = [line for line, _ in labelled.csv_rows(source, layout, Reading(source))]
        everything = labelled.np.arange(len(expected))
        found = labelled._lines_by_quotes(source, layout, len(expected), everything)
        assert found == dict(enumerate(expected))
        assert labelled._lines_by_quotes(source, layout, len(expected) + 1, everything) is None
    source.write_text('t,c\na 5" pipe,a\nanother,b\n', encoding="utf-8")
    layout = labelled.layout_of(source, ("t", "c"), Reading(source))
    assert labelled._lines_by_quotes(source, layout, 2, labelled.np.arange(2)) is None
    source.write_bytes(b"t,c\r\none,a\rtwo,b\r\n")
    assert labelled._lines_by_quotes(source, layout, 2, labelled.np.arange(2)) is None


def test_lines_are_those_of_the_csv_module_where_quotes_mislead(tmp_path: Path) -> None:
    more = "".join(f"text {i},{'AB'[i % 2]}\n" for i in range(8))
    marks = 't,c\n5" p,A\n"a\nb\nc\nd",A\n,A\n6" q,B\n' + more
    ragged = 't,c\nragged\n,a\n5" x,a\n7" y,a\n' + more
    for name, content, line in (("marks", marks, 7), ("ragged", ragged, 3)):
        source = tmp_path / f"{name}.csv"
        source.write_text(content, encoding="utf-8")
        metadata, _ = prepared(source, tmp_path / name)
        assert metadata["dropped"]["empty text"]["first_lines"] == [line], name


def test_blocks_of_blank_lines_repeat_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled, "_BLOCK", 1000)
    first, then = ("".join(f"0,text {n} {i},{i % 3}\n" for i in range(60)) for n in (1, 2))
    (tmp_path / "in.csv").write_text("x,t,c\n" + first + "\n" * 5000 + then, encoding="utf-8")
    metadata, rows = prepared(tmp_path / "in.csv", tmp_path / "data")
    assert metadata["rows"] == len(rows) == 120
    assert metadata["identical_texts"]["texts"] == 0


def test_a_class_whose_texts_are_all_another_s_too_is_trained(tmp_path: Path) -> None:
    rows = [(f"a {i}", "A") for i in range(40)] + [("a 5", "B")] * 12 + [(f"c {i}", "C") for i in range(40)]
    write(tmp_path / "in.csv", rows)
    for seed in range(30):
        metadata, kept = prepared(tmp_path / "in.csv", tmp_path / f"data{seed}", seed=seed)
        assert all(metadata["splits"]["train"]["label"].values()), seed
        assert len({split for split, text, _ in kept if text == "a 5"}) == 1


def test_identical_texts_have_one_fingerprint_and_others_another() -> None:
    words = ["", "\0", "\0" * 8, "a", "a\0", "abcdefgh", "abcdefgh\0", "abcdefghabcdefgh", "Оплата", "Оплатa"]
    pairs = [a + b for a in ("12345678", "87654321", "x") for b in ("12345678", "87654321", "x")]
    generator = random.Random(1)
    texts = [*words, *pairs, *(f"payment {i}" for i in range(3000))]
    drawn = [generator.choice(texts) for _ in range(20_000)]
    column = labelled._strings([*texts, *drawn])
    for part, start in ((column, 0), (column.slice(700), 700)):
        found = labelled.fingerprints(labelled._bytes(part), labelled._ends(part), 77).tolist()
        by_text: dict[str, set[int]] = {}
        for text, number in zip([*texts, *drawn][start:], found, strict=True):
            by_text.setdefault(text, set()).add(number)
        assert all(len(numbers) == 1 for numbers in by_text.values())
        assert len({next(iter(numbers)) for numbers in by_text.values()}) == len(by_text)
    assert labelled.fingerprints(labelled._bytes(column[:0]), labelled._ends(column[:0]), 77).tolist() == []


def test_a_row_takes_about_a_hundred_bytes_at_most_however_long_its_text_is(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from recipes.stages import labelled
from recipes.stages.read import Columns
from recipes.stages.recipe import Split
source, folder = Path(sys.argv[1]), Path(sys.argv[2])
folder.mkdir()
labelled.prepare(source, Columns("t", "c"), Split(validation=0.15, test=0.15, by="label"), 1, folder)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    peaks = []
    few, many = 200_000, 2_000_000
    for rows in (few, many):
        source = tmp_path / f"{rows}.csv"
        with source.open("w", encoding="utf-8") as file:
            file.write("t,c\n")
            file.writelines(f"{'long ' * 20}{i // 2 if i % 5 == 0 else i},{i % 7}\n" for i in range(rows))
        command = [sys.executable, "-c", code, str(source), str(tmp_path / f"data{rows}")]
        peaks.append(int(subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout))
    # Twelve bytes are kept; the rest is sorted, drawn and thrown away, once.
    assert (peaks[1] - peaks[0]) / (many - few) < 140


def test_random_files_equal_a_plain_reading(tmp_path: Path) -> None:
    generator = random.Random(5)
    alphabet = ['"', '""', ",", "\n", "\r\n", " ", "a", "ж", "\\", "\u00a0", "0", "x y"]
    for number in range(60):
        source, rows = tmp_path / f"{number}.csv", []
        for i in range(generator.randint(12, 60)):
            text = "".join(generator.choice(alphabet) for _ in range(generator.randint(0, 12)))
            # Half of the files are well-formed, in the others cells stand as they come.
            cell = '"' + text.replace('"', '""') + '"' if number % 2 else text
            rows.append(f"{i},{cell},{'a' if i % 2 else 'b'}\n")
        source.write_text("x,t,c\n" + "".join(rows), encoding="utf-8", newline="")
        try:
            _, kept = prepared(source, tmp_path / f"data{number}")
        except UserError as error:
            if "never closed" in str(error):
                with pytest.raises(UserError, match="never closed"):
                    plain(source)
                continue
            # Nothing usable, or too little; it must be so for the plain reading too.
            assert len({label for _, label in plain(source)}) < 2 or sum(plain(source).values()) < 20, rows
            continue
        assert Counter((text, label) for _, text, label in kept) == plain(source), rows


def test_identical_texts_stay_together_unless_told_otherwise(tmp_path: Path) -> None:
    rows = [(f"payment {i % 25}", str(i % 25 % 2)) for i in range(200)]
    write(tmp_path / "in.csv", rows)
    metadata, kept = prepared(tmp_path / "in.csv", tmp_path / "together")
    where: dict[str, set[str]] = {}
    for split, text, _ in kept:
        where.setdefault(text, set()).add(split)
    assert all(len(splits) == 1 for splits in where.values())
    assert metadata["identical_texts"] == {"texts": 25, "in_more_than_one_split": 0, "with_different_labels": 0}
    metadata, kept = prepared(tmp_path / "in.csv", tmp_path / "apart", replace(COLUMNS, allow_leak=True))
    assert metadata["identical_texts"]["in_more_than_one_split"] > 10
    assert len(kept) == 200


def test_conflicts_are_listed(tmp_path: Path) -> None:
    rows = (
        [(f"payment {i}", str(i % 2)) for i in range(60)]
        + [('twice, and quoted "so"', "0")] * 3
        + [('twice, and quoted "so"', "1")]
    )
    write(tmp_path / "in.csv", rows)
    metadata, _ = prepared(tmp_path / "in.csv", tmp_path / "data")
    assert metadata["identical_texts"]["with_different_labels"] == 1
    with (tmp_path / "data" / "conflicts.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["text", "label", "rows"], ['twice, and quoted "so"', "0", "3"], ['twice, and quoted "so"', "1", "1"],
        ]  # fmt: skip


def test_every_class_is_in_training_and_shares_are_kept(tmp_path: Path) -> None:
    rows = [(f"text {i}", "big") for i in range(1000)] + [(f"rare {i}", "rare") for i in range(3)]
    write(tmp_path / "in.csv", rows)
    metadata, _ = prepared(tmp_path / "in.csv", tmp_path / "data")
    splits = metadata["splits"]
    assert (splits["train"]["label"]["big"], splits["val"]["label"]["big"]) == (700, 150)
    assert splits["train"]["label"]["rare"] >= 1
    weights = json.loads((tmp_path / "data" / "class_weights.json").read_text())
    counts = splits["train"]["label"]
    for name, weight in weights.items():
        assert weight == pytest.approx(sum(counts.values()) / (len(counts) * counts[name]))
    picture = (tmp_path / "data" / "classes.svg").read_text()
    assert picture.count("<rect") == 3
    assert "big: 1,000 rows" in picture


def test_the_seed_decides_and_the_process_does_not(tmp_path: Path) -> None:
    write(tmp_path / "in.csv", [(f"text {i % 80}", str(i % 3)) for i in range(200)])
    code = (
        "import sys; from pathlib import Path; from recipes.stages import labelled; from tests.test_labelled import *;"
        "labelled.prepare(Path(sys.argv[1]), COLUMNS, SPLIT, int(sys.argv[3]), Path(sys.argv[2]))"
    )
    found = []
    for number, (seed, hashing) in enumerate([(1, "0"), (1, "5"), (2, "0")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "in.csv"), str(folder), str(seed)],
            check=True, cwd=ROOT, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PYTHONHASHSEED": hashing},
        )  # fmt: skip
        found.append((folder / "train.jsonl").read_bytes())
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_blocks_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in.csv", [(f'text "{i}"\nof two lines', str(i % 3)) for i in range(3000)])
    _, whole = prepared(tmp_path / "in.csv", tmp_path / "whole")
    monkeypatch.setattr(labelled, "_BLOCK", 5_000)
    _, parts = prepared(tmp_path / "in.csv", tmp_path / "parts")
    assert parts == whole


def test_the_sample_of_the_true_shape(tmp_path: Path) -> None:
    write_csv(tmp_path / "in.csv", 60_000, 86)
    chosen = recipe("gemma3_12b_opercode")
    (tmp_path / "data").mkdir()
    metadata = labelled.prepare(tmp_path / "in.csv", chosen.options, chosen.split, 42, tmp_path / "data")
    assert sum(plain(tmp_path / "in.csv", chosen.options).values()) == metadata["rows"]
    train = metadata["splits"]["train"]["label"]
    assert max(train.values()) / metadata["splits"]["train"]["rows"] == pytest.approx(0.26, abs=0.01)
    assert min(train.values()) >= 6


def test_one_class_is_not_enough(tmp_path: Path) -> None:
    write(tmp_path / "in.csv", [(f"text {i}", "only") for i in range(30)])
    with pytest.raises(UserError, match="1 codes have 2 rows"):
        prepared(tmp_path / "in.csv", tmp_path / "data")
