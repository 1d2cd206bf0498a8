"""What is remembered, and when it is brought up."""

from pathlib import Path

import pytest
from conftest import recipe

from recipes.stages.memory import Memory, Recall, asker, read_items
from recipes.stages.recipe import UserError

ITEMS = ["[오늘 일정: 친구랑 카페 방문]", "[좋아하는 음식: 떡볶이]", "[반려동물: 강아지 콩이]"]
PERSONA = recipe("polyglot_1_3b_ohlora")


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("나 오늘 일정 뭐였지?", ITEMS[0]),
        ("떡볶이 먹을까?", ITEMS[1]),
        ("우리 강아지 이름 기억나?", ITEMS[2]),
        ("심심한데 노래 불러 줘", ""),
    ],
)
def test_the_most_related_item(question: str, expected: str) -> None:
    assert Memory(ITEMS).related(question) == expected


def test_the_threshold() -> None:
    (best, item), *others = Memory(ITEMS).ranked("우리 강아지 이름 기억나?")
    assert item == ITEMS[2]
    assert all(score < best for score, _ in others)
    assert Memory(ITEMS, threshold=best).related("우리 강아지 이름 기억나?") == item
    assert Memory(ITEMS, threshold=best + 0.01).related("우리 강아지 이름 기억나?") == ""


def test_it_stands_before_the_question_as_in_training(tmp_path: Path) -> None:
    path = tmp_path / "memory.txt"
    path.write_text("\n".join(ITEMS) + "\n\n", encoding="utf-8")
    ask = asker(PERSONA, Recall(path))
    trained = PERSONA.to_example({"question": "떡볶이 먹을까?", "answer": "좋지!", "memory": ITEMS[1]})
    assert ask("떡볶이 먹을까?") == trained.prompt
    assert ask("심심한데 노래 불러 줘") == PERSONA.ask("심심한데 노래 불러 줘")
    assert asker(PERSONA, Recall()) is PERSONA.ask


@pytest.mark.parametrize(
    ("content", "message"), [("", "the file is empty"), ("오늘 일정\n", "line 1: '오늘 일정' is not of the form")]
)
def test_a_file_that_is_none(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "memory.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_items(path)


def test_a_missing_file_or_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_items(tmp_path / "none.txt")
    path = tmp_path / "memory.txt"
    path.write_text(ITEMS[0], encoding="utf-8")
    with pytest.raises(UserError, match="--memory-model nobody/nothing"):
        Memory.of(Recall(path, memory_model="nobody/nothing"))
