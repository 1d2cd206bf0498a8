"""Scores of free text against small cases worked out by hand."""

import random

import pytest

from recipes.stages.answers import chrf, distinct, foreign, identical, rouge_l, score_answers
from recipes.stages.recipe import Example, Message, Prediction


def prediction(question: str, answer: str, reference: str = "정답", stopped: bool = True) -> Prediction:
    return Prediction(Example((Message("user", question), Message("assistant", reference))), answer, stopped)


def test_rouge_l_counts_syllables_in_order() -> None:
    assert rouge_l("가나다", "가나다") == 1
    assert rouge_l("가 나 다", "가나다") == 1
    assert rouge_l("가다", "가나다") == pytest.approx(2 * 2 / 5)
    assert rouge_l("다나가", "가나다") == pytest.approx(2 * 1 / 6)
    assert rouge_l("", "가나다") == rouge_l("라", "가나다") == 0


def test_rouge_l_against_the_table_of_the_textbook() -> None:
    generator = random.Random(1)
    for _ in range(100):
        one, other = ("".join(generator.choice("가나다라") for _ in range(generator.randint(1, 25))) for _ in "ab")
        table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
        for i, a in enumerate(one):
            for j, b in enumerate(other):
                table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
        assert rouge_l(one, other) == pytest.approx(2 * table[-1][-1] / (len(one) + len(other)))


def test_chrf_forgives_a_particle_and_no_more() -> None:
    same = chrf(["임대차 계약은 등기해야 합니다"], ["임대차 계약은 등기해야 합니다"])
    particle = chrf(["임대차 계약을 등기해야 합니다"], ["임대차 계약은 등기해야 합니다"])
    other = chrf(["오늘 날씨가 참 좋네요"], ["임대차 계약은 등기해야 합니다"])
    assert same == pytest.approx(100)
    assert 60 < particle < 100
    assert other < 10


def test_sameness() -> None:
    assert distinct(["a b c", "d e f"], 2) == 1
    assert distinct(["a b c", "a b c"], 2) == 0.5
    assert distinct(["", "a"], 2) == 0
    # The same answer to the same question is no fault.
    assert identical([prediction("q", "a"), prediction("q", "a"), prediction("r", "b")]) == 0
    assert identical([prediction("q", "a"), prediction("r", "a"), prediction("s", "b")]) == pytest.approx(2 / 3)


def test_all_of_them() -> None:
    scores = score_answers([prediction("q", "정답"), prediction("r", "", stopped=False)])
    assert scores["empty"] == 0.5
    assert scores["stopped_by_itself"] == 0.5
    assert scores["rouge_l"] == 0.5


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("오늘은 KTX를 타고 가요! 3시에요 ㅎㅎ", False),
        ("", False),
        ("?!", False),
        ("Hello, 안녕", True),
        ("오늘は 좋아요", True),
        ("我很好 네", True),
        ("안녕 привет", True),
    ],
)
def test_foreign_sentences(answer: str, expected: bool) -> None:
    assert foreign(answer) == expected
