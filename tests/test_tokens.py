"""Tokens are kept between trainings, and only those of the same examples, tokenizer, template and length come back."""

import copy
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, recipe
from tokenizers.normalizers import Lowercase

from recipes.stages import tokens
from recipes.stages.recipe import Example, Message
from recipes.stages.render import Renderer

NAME = "gemma3_12b_opercode"
ANSWERS = (
    "10151",
    "20301",
    "a whole sentence of many words that alone is longer than some twenty tokens are, all of them",
)
EXAMPLES = [
    Example((
        Message("system", "Codes."), Message("user", f"payment {'of a long name ' * n}{n}"),
        Message("assistant", answer),
    ))
    for n, answer in enumerate(ANSWERS)
]  # fmt: skip
LENGTH = 60


@pytest.fixture
def renderer(tokenizers: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Renderer:
    monkeypatch.setattr(tokens, "CACHE", tmp_path / "tokens")
    return Renderer(tokenizers(NAME), recipe(NAME).stop_phrase)


def read(renderer: Renderer, examples: list[Example] = EXAMPLES, length: int = LENGTH) -> tokens.Tokens:
    return tokens.tokens_of(renderer, examples, length, "a split")


def kept() -> list[Path]:
    return sorted(tokens.CACHE.iterdir())


def test_what_is_kept_is_what_was_rendered(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    short = 24
    rendered = [renderer.example(example, short) for example in EXAMPLES]
    first = read(renderer, length=short)
    monkeypatch.setattr(renderer, "examples", None)
    for found in (first, read(renderer, length=short)):
        assert [one is None for one in rendered] == [False, False, True]
        assert found.items == EXAMPLES[:2]
        assert found.table.to_pylist() == [{"input_ids": r.input_ids, "labels": r.labels} for r in rendered if r]
        assert found.lengths == [len(r.input_ids) for r in rendered if r]
        assert found.counts == {"examples": 2, "shortened": sum(r.cut_tokens > 0 for r in rendered if r), "left_out": 1}
        assert found.counts["shortened"]


def test_nothing_fits(renderer: Renderer) -> None:
    for _ in range(2):
        found = read(renderer, length=3)
        assert (found.items, found.lengths, found.table.num_rows) == ([], [], 0)
        assert found.counts == {"examples": 0, "shortened": 0, "left_out": 3}


def other_examples() -> dict[str, list[Example]]:
    first, *rest = EXAMPLES
    system, question, answer = first.messages

    def conversation(*messages: Message) -> list[Example]:
        return [replace(first, messages=messages), *rest]

    return {
        "another order": [*rest, first],
        "one less": rest,
        "another answer": conversation(system, question, Message("assistant", "10152")),
        "another role": conversation(Message("user", "Codes."), Message("assistant", question.content)),
        "a turn more": conversation(system, question, answer, question, answer),
        # The same letters one after the other: the template puts a system text there too.
        "another border": conversation(Message("user", f"Codes.\n\n{question.content}"), answer),
    }


@pytest.mark.parametrize("what", other_examples())
def test_other_examples_are_rendered_anew(renderer: Renderer, what: str) -> None:
    read(renderer)
    other = other_examples()[what]
    rendered = [r for r in renderer.examples(other, LENGTH) if r]
    assert read(renderer, other).table.to_pylist() == [{"input_ids": r.input_ids, "labels": r.labels} for r in rendered]
    assert len(kept()) == 2


def test_another_tokenizer_template_length_or_stop_phrase_is_another_file(renderer: Renderer) -> None:
    before = read(renderer).table.to_pylist()
    words, template, roles = (copy.deepcopy(renderer.tokenizer) for _ in range(3))
    words.backend_tokenizer.normalizer = Lowercase()
    template.chat_template = template.chat_template.replace("model", "clerk")
    # Both were special before: only what the template writes is another.
    roles.bos_token = roles.eos_token
    others = [Renderer(words), Renderer(template), Renderer(roles), Renderer(renderer.tokenizer, "(the end)")]
    for number, other in enumerate(others, 2):
        assert read(other).table.to_pylist() != before, number
        assert len(kept()) == number
    read(renderer, length=LENGTH + 1)
    assert len(kept()) == 6
    assert read(renderer).table.to_pylist() == before
    assert len(kept()) == 6


def test_another_process_looks_under_the_same_name(renderer: Renderer) -> None:
    """There, sets have another order."""
    code = (
        "import test_tokens as here; from recipes.stages.base_model import load_tokenizer, settle\n"
        "tokenizer = load_tokenizer(here.recipe(here.NAME), settle(here.recipe(here.NAME), 'tiny', 'random').source)\n"
        "print(here.tokens._key(here.Renderer(tokenizer), here.EXAMPLES, here.LENGTH))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.split() == [tokens._key(renderer, EXAMPLES, LENGTH)], done.stderr


def test_other_code_renders_anew(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    read(renderer)
    for name in ("tokens", "render"):
        assert (ROOT / f"recipes/stages/{name}.py").read_bytes() in tokens._CODE
    monkeypatch.setattr(tokens, "_CODE", tokens._CODE + b"# changed")
    read(renderer)
    assert len(kept()) == 2


def test_a_damaged_file_is_made_anew(renderer: Renderer, capsys: pytest.CaptureFixture[str]) -> None:
    before = read(renderer).table.to_pylist()
    (path,) = kept()
    whole = path.read_bytes()
    damages = [whole[: len(whole) // 2], b"", whole + b"\0", b"not a table", whole[:-32]]
    for place in range(0, len(whole), max(1, len(whole) // 40)):
        damages.append(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    for damaged in damages:
        path.write_bytes(damaged)
        assert read(renderer).table.to_pylist() == before
        assert f"{path} is not used" in capsys.readouterr().err
        assert path.read_bytes() == whole
    assert kept() == [path]


def test_where_nothing_can_be_kept_a_training_reads_all_the_same(
    renderer: Renderer, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read(renderer).table.to_pylist()
    for path in kept():
        path.unlink()
    tokens.CACHE.rmdir()
    tokens.CACHE.write_text("a file where the folder would be")
    assert read(renderer).table.to_pylist() == before
    assert "are not kept" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_whole_leaves_nothing(
    renderer: Renderer, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        found = read(renderer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert kept() == []
    assert "are not kept for a later training" in capsys.readouterr().err
    assert found.table.to_pylist() == read(renderer).table.to_pylist()


def last_used(path: Path, when: float) -> Path:
    os.utime(path, (when, when))
    return path


def added(renderer: Renderer, length: int) -> Path:
    before = set(tokens.CACHE.glob("*.arrow"))
    read(renderer, length=length)
    (path,) = set(tokens.CACHE.glob("*.arrow")) - before
    return path


def test_what_was_used_last_stays(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    oldest, middle, newest = (last_used(added(renderer, LENGTH + n), 1000 + n) for n in range(3))
    monkeypatch.setattr(tokens, "_MOST_BYTES", 3 * newest.stat().st_size + 1000)
    read(renderer, length=LENGTH)
    last = added(renderer, LENGTH + 3)
    assert sorted(kept()) == sorted([oldest, newest, last])
    assert not middle.exists()


def test_a_table_that_is_too_large_is_not_kept(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_MOST_BYTES", 100)
    assert read(renderer).items
    assert not tokens.CACHE.exists()


def test_what_a_killed_training_left_goes_after_a_day(renderer: Renderer) -> None:
    first = added(renderer, LENGTH)
    being_written, left = (tokens.CACHE / f".{first.name}.{name}" for name in "ab")
    for path in (being_written, left):
        path.write_bytes(b"half a table")
    last_used(left, 1000)
    second = added(renderer, LENGTH + 1)
    assert kept() == sorted([being_written, first, second])


def test_one_process_of_several_keeps(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens.processes, "rank", lambda: 1)
    assert read(renderer).items
    assert not tokens.CACHE.exists()


def test_tokens_stay_where_they_are_kept(renderer: Renderer) -> None:
    """Mapped: a table of millions of rows is no memory of the process."""
    read(renderer)
    found = read(renderer)
    assert found.items
    (path,) = kept()
    assert str(path) in Path("/proc/self/maps").read_text()


def test_what_a_trainer_is_given(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across the batches of a file, with classes, and with the filler, the shortest row without its loss."""
    from recipes.stages.batches import dataset

    monkeypatch.setattr(tokens, "_ROWS", 2)
    many = [EXAMPLES[0], EXAMPLES[1], EXAMPLES[0], EXAMPLES[1], EXAMPLES[0]]
    rendered = [r for r in renderer.examples(many, LENGTH) if r]
    rows = [{"input_ids": r.input_ids, "labels": r.labels} for r in rendered]
    for _ in range(2):
        table = read(renderer, many).table
        assert table["labels"].num_chunks == 3
        assert list(dataset(table[1:])) == rows[1:]
        found = dataset(table, [3, 4, 5, 6, 7], filler=True)
        filler = {"input_ids": rows[0]["input_ids"], "labels": [-100] * len(rows[0]["labels"]), "class": 0}
        assert list(found) == [*({**row, "class": n} for n, row in enumerate(rows, 3)), filler]
        assert found.__getitems__([4, 0, 3]) == [{**rows[k], "class": k + 3} for k in (4, 0, 3)]
