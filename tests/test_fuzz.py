"""Files as nobody should write them, through the real readers and prepare: held against a plain reading of each.

A few hundred files in a normal run. `make fuzz` makes 10,000 of each format and writes what came of them to
results/fuzz.json.
"""

import csv
import io
import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import recipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipes.stages.persona import STOP
from recipes.stages.prepare import prepare
from recipes.stages.read import clean, fold
from recipes.stages.recipe import UserError
from recipes.stages.run import environment, read_json, read_jsonl, write_json

FILES = int(os.environ.get("FUZZ_FILES", "250"))
"""Of each format."""
# Processor time, so that a busy machine does not fail the test; files of 10 MB have to pass within it too.
LIMIT_SECONDS = 20

Lines = list[tuple[int, Any]]
outcome: dict[str, Counter[str]] = {"csv": Counter(), "jsonl": Counter()}


@pytest.fixture(scope="module", autouse=True)
def _report() -> Iterator[None]:
    began = time.perf_counter()
    yield
    if out := os.environ.get("FUZZ_OUT"):
        write_json(
            Path(out),
            {
                "command": "make fuzz",
                "environment": environment(),
                "formats": {name: dict(sorted(found.items())) for name, found in outcome.items()},
                "seconds": round(time.perf_counter() - began, 1),
            },
        )


@contextmanager
def limited() -> Iterator[None]:
    """What hangs is interrupted, and what is slow fails."""

    def give_up(*_: Any) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(10 * LIMIT_SECONDS)
    began = time.process_time()
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - began < LIMIT_SECONDS


class Refused(Exception):
    """The plain reading cannot make anything of the file either."""


def decoded(data: bytes, older: tuple[str, ...]) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        older = ("utf-16",)
    else:
        older = ("utf-8-sig", *older)
    for encoding in older:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise Refused("not text in")


def csv_lines(data: bytes, columns: tuple[str, ...], older: tuple[str, ...]) -> Lines:
    """(line, cells or None where there are too few) of every record."""
    text = decoded(data, older)
    for delimiter in ",;\t":
        table = csv.reader(io.StringIO(text + "\n\x1aend", newline=""), delimiter=delimiter)
        records, before = [], 0
        for record in table:
            records.append((before + 1, record))
            before = table.line_num
        last = records.pop()[1]
        records = [(line, record) for line, record in records if record]
        if not records:
            raise Refused("never closed" if last != ["\x1aend"] else "the file is empty")
        header = [cell.strip() for cell in records[0][1]]
        if set(columns) <= set(header):
            break
    else:
        # What the header is, is not known either where a quote in it is never closed.
        raise Refused("no column|never closed")
    if any(header.count(column) > 1 for column in columns):
        raise Refused("more than one column")
    if last != ["\x1aend"]:
        raise Refused("never closed")
    if not records[1:]:
        raise Refused("no rows below the header")
    places = [header.index(column) for column in columns]
    return [
        (line, [record[place] for place in places] if len(record) > max(places) else None)
        for line, record in records[1:]
    ]


def payments(lines: Lines) -> Iterator[tuple[int, Any]]:
    usable = [(line, cells and {"text": fold(cells[0]), "label": cells[1].strip()}) for line, cells in lines]
    sizes = Counter(row["label"] for _, row in usable if row and row["text"] and row["label"])
    for line, row in usable:
        yield line, row if row and row["text"] and sizes[row["label"]] >= 10 else None


def questions(lines: Lines) -> Iterator[tuple[int, Any]]:
    seen = set()
    names = ("question", "answer", "category", "difficulty")
    for line, cells in lines:
        row = cells and dict(zip(names, map(fold, cells), strict=True))
        pair = row and (row["question"], row["answer"])
        if row and min(map(len, pair)) >= 5 and pair not in seen:
            seen.add(pair)
            yield line, row
        else:
            yield line, None


def persona(lines: Lines) -> Iterator[tuple[int, Any]]:
    for line, cells in lines:
        if cells:
            kind, asked, long, short, memory = cells
            answer = fold((short or long).replace(STOP, ""))
            row = {"data_type": kind.strip(), "question": fold(asked), "answer": answer, "memory": fold(memory)}
            if row["data_type"] in ("train", "valid") and row["question"] and answer:
                yield line, row
                continue
        yield line, None


CSV = {
    "gemma3_12b_opercode": (("PaymentComment", "OperCode"), ("cp1251",), payments),
    "llama_1b_civil": (("question", "answer", "category", "difficulty"), ("cp949",), questions),
    "polyglot_1_3b_ohlora": (("data_type", "input_data", "output_data", "output_message", "memory"), (), persona),
}


def jsonl_lines(data: bytes) -> Lines:
    lines = [(n, line) for n, line in enumerate(re.split("\r\n|\r|\n", decoded(data, ())), 1) if line.strip()]
    if not lines:
        raise Refused("the file is empty")
    return [(line, dialogue(text)) for line, text in lines]


def dialogue(line: str) -> Any:
    try:
        turns = json.loads(line)["messages"]
        roles = [turn["role"] for turn in turns]
        texts = [clean(turn["content"] + "") for turn in turns]
        line.encode()
        json.dumps(json.loads(line), ensure_ascii=False).encode()
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    sound = bool(spoken) and spoken == ["user", "assistant"] * (len(spoken) // 2) and all(texts)
    return {"messages": [dict(role=r, content=t) for r, t in zip(roles, texts, strict=True)]} if sound else None


def held_against(plain: Callable[[], Lines], name: str, file: Path, kind: str) -> None:
    """The file through prepare: what is kept and dropped is what the plain reading keeps and drops."""
    try:
        expected: Lines | None = plain()
        refusal = "no usable rows|leave nothing for|codes have"
    except Refused as refused:
        expected, refusal = None, str(refused)
    count = outcome[kind]
    count["files"] += 1
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        with limited():
            run = prepare(recipe(name), file, recipe(name).options, 1, folder / "run", quiet=True)
    except UserError as error:
        message = str(error)
        assert message.startswith(f"{file}: "), message
        assert len(message.splitlines()) == 1, message
        assert len(message) < 3000, "the file is in the message"
        assert re.search(refusal, message), message
        assert ": line " in message or re.search("empty|no rows|no usable|leave nothing|codes have", message), message
        kept = sum(row is not None for _, row in expected or ())
        assert kept < 30, message
        if "no usable rows" in message:
            assert not kept
        assert not (folder / "run").exists()
        count["refused"] += 1
        return
    else:
        assert expected is not None, f"kept, though {refusal}"
        found = [row for split in ("train", "val", "test") for row in read_jsonl(run.data / f"{split}.jsonl")]
        metadata = read_json(run.data / "metadata.json")
    finally:
        shutil.rmtree(folder)
    dropped = metadata["dropped"].values()
    assert Counter(map(json.dumps, found)) == Counter(json.dumps(row) for _, row in expected if row is not None)
    assert len(found) + sum(part["rows"] for part in dropped) == len(expected), "kept + dropped is not the file"
    told = sorted(line for part in dropped for line in part["first_lines"])
    lost = [line for line, row in expected if row is None]
    assert len(told) == sum(min(20, part["rows"]) for part in dropped)
    assert set(told) <= set(lost) if len(lost) > 20 else told == lost
    count["prepared"] += 1
    count["rows_kept"] += len(found)
    count["rows_dropped"] += len(lost)


WORDS = ["оплата за товар", "계약이 끝났어요", "salary", "010151", "7", "train", "valid", "전세사기", "", " "]
NASTY = [
    '"', '""', '"open', 'close"', 'a "quoted" word', '"a","b', "'", ",", ";", "\t", "a,b;c\td", "\n", "\r", "\r\n",
    "two\nlines", "\x00", "nul\x00inside", "\ufeff", "line\u2028separator", "\u2029", "\x85", "\x0b\x0c", "\x1c",
    "\u00a0", "\u3000", "\u200b", "e\u0301", "é", "\\", '\\"', "\\N", "NULL", "NaN", "=1+1", "-5", "🙂", "\U0010ffff",
    "<end_of_turn>", "(답변 종료)", "$\\frac$", "а" * 5000, "\u0301" * 200,
]  # fmt: skip
cells = st.one_of(st.sampled_from(WORDS), st.sampled_from(NASTY), st.text(max_size=8))
encodings = st.sampled_from(
    ["utf-8"] * 30 + ["utf-8-sig", "utf-16", "cp1251", "cp949", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"]
)
snippets = st.sampled_from(
    [b'"', b'""', b"\x00", b"\xff", b"\xfe", b"\xed\xa0\x80", b"\xc3", b"\r", b"\n", b"\r\n", b",", b"\xef\xbb\xbf",
     b"\xd0\xbe", b"\xee", b"{", b"\\", b"\n\n", b" "]
)  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, text: str) -> bytes:
    """Encoded, perhaps in two encodings, perhaps with bytes put in or cut off."""
    encoding = draw(encodings)
    data = text.encode(encoding, "replace")
    if draw(st.integers(0, 19)) == 0:
        half = len(text) // 2
        data = text[:half].encode(encoding, "replace") + text[half:].encode(draw(encodings), "replace")
    damage = st.lists(st.tuples(snippets, st.floats(0, 1)), max_size=3)
    for snippet, place in draw(damage) if draw(st.integers(0, 3)) == 0 else []:
        at = int(place * len(data))
        data = data[:at] + snippet + data[at:]
    if draw(st.integers(0, 19)) == 0:
        data = data[: int(draw(st.floats(0, 1)) * len(data))]
    return data


@st.composite
def csv_files(draw: st.DrawFn) -> tuple[str, bytes]:
    name = draw(st.sampled_from(list(CSV)))
    columns = ["n", *CSV[name][0]]
    delimiter = draw(st.sampled_from(",,;\t"))
    header = draw(
        st.sampled_from(
            [columns] * 40
            + [columns[:-1], columns + columns[-1:], ["n", *columns], [f" {c} " for c in columns], columns[1:2], [],
               ["two\nlines", *columns], ["", *columns], ['"', *columns]]
        )
    )  # fmt: skip
    good = {
        "gemma3_12b_opercode": lambda i: [str(i), f"оплата {i}", "010151" if i % 2 else "7"],
        "llama_1b_civil": lambda i: [str(i), f"질문이 있습니다 {i}", f"답변 드립니다 {i}", "전세사기", "easy"],
        "polyglot_1_3b_ohlora": lambda i: [str(i), "valid" if i % 4 == 0 else "train", f"안녕 {i}", "", "네", ""],
    }[name]
    rows = [good(i) for i in range(draw(st.sampled_from([40] * 10 + [0, 3])))]
    for row in draw(st.lists(st.lists(cells, max_size=len(columns) + 1), max_size=10)):
        rows.insert(draw(st.integers(0, len(rows))), row)
    if draw(st.integers(0, 60)) == 0:
        # Longer than a block of the fast parser.
        rows.insert(0, [*good(0)[:-1], good(0)[-1] + "가나다 " * 800_000])
    end = draw(st.sampled_from(["\n", "\n", "\r\n", "\r"]))
    file = io.StringIO(newline="")
    quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_MINIMAL, csv.QUOTE_ALL, None]))
    if quoting is None:
        file.write("".join(delimiter.join(row) + end for row in [header, *rows]))
    else:
        csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows([header, *rows])
    text = file.getvalue()
    if draw(st.integers(0, 4)) == 0:
        text = text.rstrip("\r\n")
    if draw(st.integers(0, 9)) == 0:
        text = draw(st.sampled_from(["\n", "\n\n", " \n", "\r\n"])) + text
    return name, draw(damaged(text))


def spoken(text: Any, role: Any = "assistant") -> str:
    turns = [{"role": "user", "content": "질문"}, {"role": role, "content": text}]
    return json.dumps({"messages": turns}, ensure_ascii=False)


ROLES = ["system", "user", "assistant", "model", "", None, 7, ["user"], {"role": "user"}, True, "user\n", "USER"]
CONTENTS = [
    None, 0, 10**5000, 1e999, float("nan"), [], {}, ["text"], True, "&#" + "9" * 5000 + ";", "&#xD800;", "<br" * 500,
    "<p>a</p>", "&lt;b&gt;", "\u0301" * 200, "<", "&amp;amp;",
]  # fmt: skip
LINES = [
    "{", "}", "[]", "null", "NaN", "-Infinity", "1", '"text"', "{}", '{"messages": []}', '{"messages": {}}',
    '{"messages": [[]]}', '{"messages": "text"}', "[" * 100_000, "[" * 100_000 + "]" * 100_000,
    '{"a":' * 100_000, '{"messages":' + "[" * 100_000 + "]" * 100_000 + "}", "9" * 5000, "1e99999",
    '{"a": ' + "9" * 5000,
    '{"messages": NaN}', '{"messages": [], "messages": []}', "\ufeff{}", "'single'", "{'a': 1}", '{"a": 1} {"b": 2}',
    '{"a": "\\ud800"}', '{"\\udc00": 1}', '{"a": "\\ud83d\\ude42"}', '{"a": "\\uD83D"}', '{"a": "tab\there"}', "\u2028",
    spoken("half \\ud800 of it").replace("\\\\", "\\"), spoken("whole \\ud83d\\ude42").replace("\\\\", "\\"),
    spoken("two") + spoken("objects"), spoken("long " * 200_000), spoken("deep", {"a": 1}),
    '{"messages": [{"role": "user", "content": "q"}, {"role": ' + "[" * 700 + "]" * 700 + ', "content": "a"}]}',
]  # fmt: skip


def text_of(turns: Any) -> str:
    try:
        return json.dumps({"messages": turns}, ensure_ascii=False)
    except ValueError:
        # A number of more digits than Python writes.
        return json.dumps({"messages": []})


@st.composite
def jsonl_files(draw: st.DrawFn) -> bytes:
    lines = [spoken(f"대답 {i}") for i in range(draw(st.sampled_from([40] * 10 + [0, 3])))]
    turn = st.fixed_dictionaries(
        {"role": st.one_of(st.sampled_from(["user", "assistant"]), st.sampled_from(ROLES)),
         "content": st.one_of(cells, st.sampled_from(CONTENTS))}
    )  # fmt: skip
    for extra in draw(
        st.lists(
            st.one_of(
                st.sampled_from(LINES),
                st.one_of(cells, st.sampled_from(CONTENTS)).map(spoken_or_nothing),
                st.lists(turn, max_size=4).map(text_of),
                st.text(max_size=10),
                st.sampled_from(["", " "]),
            ),
            max_size=8,
        )
    ):
        lines.insert(draw(st.integers(0, len(lines))), extra)
    end = draw(st.sampled_from(["\n", "\n", "\r\n", "\r"]))
    return draw(damaged(end.join(lines) + draw(st.sampled_from(["", end]))))


def spoken_or_nothing(content: Any) -> str:
    try:
        return spoken(content)
    except ValueError:
        return "9" * 5000


def often(files: int) -> Any:
    return settings(
        max_examples=files,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


@often(FILES)
@given(csv_files())
def test_csv(made: tuple[str, bytes]) -> None:
    name, data = made
    columns, older, rows = CSV[name]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        file = Path(folder) / "in.csv"
        file.write_bytes(data)
        held_against(lambda: list(rows(csv_lines(data, columns, older))), name, file, "csv")


@often(FILES)
@given(jsonl_files())
def test_jsonl(data: bytes) -> None:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        file = Path(folder) / "in.jsonl"
        file.write_bytes(data)
        held_against(lambda: jsonl_lines(data), "gemma3_1b_counsel", file, "jsonl")


@pytest.mark.parametrize("name", list(CSV))
def test_cells_of_ten_megabytes(name: str, tmp_path: Path) -> None:
    columns, older, rows = CSV[name]
    long = "оплата, по «счёту» " * 300_000
    file = tmp_path / "in.csv"
    with file.open("w", encoding="utf-8", newline="") as written:
        table = csv.writer(written)
        table.writerow(columns)
        for i in range(40):
            kind = {"OperCode": str(i % 2), "category": "x", "data_type": "valid" if i % 4 else "train"}
            table.writerow([kind.get(column, f"{long if i == 20 else 'short'} {i}") for column in columns])
    assert file.stat().st_size > 10_000_000
    data = file.read_bytes()
    held_against(lambda: list(rows(csv_lines(data, columns, older))), name, file, "csv")


@pytest.mark.parametrize("long", ["слово " * 1_000_000, "\u0301\u0316" * 2_500_000, "<a " * 300_000, "&#" * 300_000])
def test_dialogues_of_ten_megabytes(long: str, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    lines = [spoken(f"대답 {i}") for i in range(30)]
    file.write_text("\n".join([*lines[:15], spoken(long), *lines[15:]]), encoding="utf-8")
    data = file.read_bytes()
    held_against(lambda: jsonl_lines(data), "gemma3_1b_counsel", file, "jsonl")


def test_blocks_of_long_rows_stay_within_what_an_offset_can_hold(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from recipes.stages import labelled

    monkeypatch.setattr(labelled, "_SLOW_CHARACTERS", 1000)
    test_cells_of_ten_megabytes("gemma3_12b_opercode", tmp_path)


def test_the_files_are_of_both_kinds() -> None:
    """Runs behind the others: files that nothing can be read from would show nothing."""
    if not outcome["csv"]["files"]:
        pytest.skip("the files were not made in this process")
    for name, count in outcome.items():
        assert count["prepared"] > 0.3 * count["files"], name
        assert count["refused"] > 0.05 * count["files"], name
        assert count["rows_dropped"] > 0, name
