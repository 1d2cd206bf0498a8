"""The rows of a step: drawn, divided into parts, dealt out to processes, padded."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from recipes.stages.processes import Team
from recipes.stages.recipe import Settings, UserError
from recipes.stages.render import IGNORED

ROWS = 99
LENGTHS = [random.Random(5).choice((8, 30, 50, 90, 400)) + row % 7 for row in range(ROWS)]
ALONE = Team(0, 1)


def steps_of(settings: Settings, team: Team = ALONE, lengths: list[int] = LENGTHS) -> list[list[list[int]]]:
    from recipes.stages.batches import Drawn, Steps

    found = Steps(Drawn([0] * len(lengths), [len(lengths)], 3), lengths, settings, team, filler=-1)
    listed = list(found)
    assert len(listed) == len(found)
    return listed


def drawn() -> list[int]:
    from recipes.stages.batches import Drawn

    return list(Drawn([0] * ROWS, [ROWS], 3))


def fewest(lengths: list[int], tokens: int) -> int:
    """Of all ways to cut these, in order, the one with the fewest parts."""
    best = [0] + [ROWS] * len(lengths)
    for end in range(1, len(lengths) + 1):
        for start in range(end):
            part = lengths[start:end]
            if len(part) == 1 or len(part) * max(part) <= tokens:
                best[end] = min(best[end], best[start] + 1)
    return best[-1]


@pytest.mark.parametrize("tokens", [1, 64, 200, 1000, None])
def test_a_step_is_cut_into_as_few_parts_as_room_is_for(tokens: int | None) -> None:
    settings = Settings(batch_size=2, accumulation=8, max_length=512, batch_tokens=tokens)
    room = 1024 if tokens is None else tokens
    order, several = drawn(), 0
    for number, parts in enumerate(steps_of(settings)):
        rows = order[number * 16 : (number + 1) * 16]
        assert sorted(row for part in parts for row in part) == sorted(rows)
        for part in parts:
            assert len(part) == 1 or len(part) * max(LENGTHS[row] for row in part) <= room
        assert len(parts) == fewest(sorted(LENGTHS[row] for row in rows), room)
        several += len(parts) > 1
    assert several


def test_examples_are_counted_where_tokens_are_not() -> None:
    settings = Settings(batch_size=3, accumulation=2, batch_tokens=0)
    order = drawn()
    for number, parts in enumerate(steps_of(settings)):
        rows = sorted(order[number * 6 : (number + 1) * 6], key=lambda row: LENGTHS[row])
        assert len(rows) == 6 or number == 16
        # What fits at once stays as it was drawn.
        assert parts == ([rows[:3], rows[3:]] if len(rows) == 6 else [order[96:]])


def test_what_fits_at_once_stays_as_it_was_drawn() -> None:
    settings = Settings(batch_size=16, max_length=512)
    assert [row for parts in steps_of(settings) for part in parts for row in part] == drawn()
    assert all(len(parts) == 1 for parts in steps_of(settings))


@pytest.mark.parametrize("tokens", [0, 100, None])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_drawn_row_is_dealt_to_one_process_and_all_take_as_many_parts(size: int, tokens: int | None) -> None:
    settings = Settings(batch_size=2, accumulation=3, max_length=120, batch_tokens=tokens)
    dealt = [steps_of(settings, Team(rank, size)) for rank in range(size)]
    order = drawn()
    for number, step in enumerate(zip(*dealt, strict=True)):
        rows = order[number * 6 * size : (number + 1) * 6 * size]
        assert len({len(parts) for parts in step}) == 1
        theirs = [part for parts in step for part in parts]
        assert sorted(row for part in theirs for row in part if row != -1) == sorted(rows)
        assert all(part == [-1] or -1 not in part for part in theirs)
        # Nobody waits for a row that could have gone with those before.
        assert sum(any(part == [-1] for part in at_once) for at_once in zip(*step, strict=True)) <= 1
        for part in theirs:
            longest = max(LENGTHS[row] for row in part if row != -1) if part != [-1] else 0
            assert len(part) == 1 or (len(part) <= 2 if tokens == 0 else len(part) * longest <= (tokens or 240))


def test_who_is_left_without_a_row_gets_the_filler() -> None:
    last = [steps_of(Settings(batch_size=1), Team(rank, 5), [10] * 7)[-1] for rank in range(5)]
    assert [parts == [[-1]] for parts in last] == [False, False, True, True, True]


def test_no_less_than_one_example_at_once() -> None:
    for flag in ("batch_size", "accumulation"):
        with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} 0: 1 at least"):
            Settings(**{flag: 0})
    with pytest.raises(UserError, match="--batch-tokens -1: 0 at least"):
        Settings(batch_tokens=-1)


def test_a_bad_number_of_tokens_is_told_in_a_line(command: Callable[..., Any]) -> None:
    done = command("recipes.gemma3_12b_opercode", "train", "--batch-tokens", "-1")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == "error: --batch-tokens -1: 0 at least"


def test_padding_is_known_by_position() -> None:
    from recipes.stages.batches import Batches

    # The pad id occurs inside an example: it must stay supervised and attended to.
    batch = Batches(pad_token_id=3)([{"input_ids": [5, 3], "labels": [IGNORED, 3]}, {"input_ids": [7], "labels": [7]}])
    assert batch["input_ids"].tolist() == [[5, 3], [7, 3]]
    assert batch["labels"].tolist() == [[IGNORED, 3], [7, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
