"""Answers: stopped whole, streamed whole, the same alone and in a batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import recipe

from fallback.choose import choose
from recipes.stages.base_model import settle
from recipes.stages.generation import Pieces, StopAt, batches, before_stop, end_ids, generate, stream
from recipes.stages.loading import Model, load_for_training
from recipes.stages.recipe import Message, Sampling

STOP = "(답변 종료)"


@pytest.fixture(scope="module")
def model() -> Model:
    chosen = recipe("polyglot_1_3b_ohlora")
    choice = choose("gpt_neox", "peft")
    return load_for_training(chosen, settle(chosen, "tiny"), chosen.settings, choice)


def test_text_before_a_stop_string() -> None:
    assert before_stop("안녕 (답변 종료) 뒤", [STOP]) == ("안녕 ", True)
    assert before_stop("안녕", [STOP]) == ("안녕", False)
    assert before_stop("a b c", ["c", "b"]) == ("a ", True)


def pieces_of(tokenizer: Any, text: str, stop: tuple[str, ...]) -> list[str]:
    """The stream of a model that writes this text, a token at a time."""
    shown: list[str] = []
    streamer = Pieces(tokenizer, stop, shown.append)
    streamer.put(torch.tensor([[1, 2, 3]]))
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return shown


@pytest.mark.parametrize("text", ["반가워! 뷁뛟 같이 놀자", "a (답변 b", "끝"])
def test_streaming_never_breaks_a_syllable(text: str, tokenizers: Callable[[str], Any]) -> None:
    shown = pieces_of(tokenizers("polyglot_1_3b_ohlora"), text, (STOP,))
    assert "".join(shown) == text
    assert not any("\ufffd" in piece for piece in shown)


@pytest.mark.parametrize("before", ["반가워!", "반가워! (답변", ""])
def test_streaming_never_shows_a_stop_string(before: str, tokenizers: Callable[[str], Any]) -> None:
    shown = pieces_of(tokenizers("polyglot_1_3b_ohlora"), f"{before} {STOP} 더", (STOP,))
    assert "".join(shown).rstrip() == before


def test_a_stop_string_is_found_however_it_was_cut(tokenizers: Callable[[str], Any]) -> None:
    """Spelled a character at a time, which no tokenizer would do by itself but a model may."""
    tokenizer = tokenizers("polyglot_1_3b_ohlora")
    whole = tokenizer(f"좋아 {STOP}", add_special_tokens=False)["input_ids"]
    spelled = [i for letter in STOP for i in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    assert spelled != whole[-len(spelled) :]
    for ids in (whole, spelled):
        assert StopAt(tokenizer, (STOP,), prompt_length=2)(torch.tensor([[5, 5, *ids]]), None).tolist() == [True]
        assert StopAt(tokenizer, (STOP,), prompt_length=2)(torch.tensor([[5, 5, *ids[:-1]]]), None).tolist() == [False]


def test_the_prompt_does_not_stop_the_answer(tokenizers: Callable[[str], Any]) -> None:
    tokenizer = tokenizers("polyglot_1_3b_ohlora")
    ids = tokenizer(STOP, add_special_tokens=False)["input_ids"]
    assert StopAt(tokenizer, (STOP,), prompt_length=len(ids))(torch.tensor([[*ids, 9]]), None).tolist() == [False]


def test_a_batch_answers_as_each_question_alone(model: Model) -> None:
    prompts = [(Message("user", text),) for text in ("안녕", "오늘 날씨 어때? 산책하고 싶어", "배고파 죽겠다")]
    greedy = Sampling(max_new_tokens=12, batch_size=3)
    together = generate(model, prompts, greedy, (STOP,))
    alone = [generate(model, [prompt], greedy, (STOP,))[0] for prompt in prompts]
    assert together == alone


def test_batches_hold_as_many_tokens_as_there_may_be() -> None:
    prompts = [[0] * length for length in (5, 30, 10, 8, 90, 7)]
    sampling = Sampling(max_new_tokens=10, batch_size=3)
    assert list(batches(prompts, sampling, 80)) == [[4], [1, 2], [3, 5, 0]]
    assert list(batches(prompts, sampling, 10**9)) == [[4, 1, 2], [3, 5, 0]]
    assert list(batches([], sampling, 80)) == []


def test_streamed_and_whole_answers_are_the_same(model: Model) -> None:
    prompt = (Message("user", "안녕"),)
    shown: list[str] = []
    answer = stream(model, prompt, Sampling(max_new_tokens=16), shown.append, (STOP,))
    assert "".join(shown).strip() == answer.text
    assert answer == generate(model, [prompt], Sampling(max_new_tokens=16), (STOP,))[0]


def test_an_answer_at_the_limit_did_not_stop(model: Model) -> None:
    answer = generate(model, [(Message("user", "안녕"),)], Sampling(max_new_tokens=3), (STOP,))[0]
    assert answer.tokens <= 3
    assert answer.stopped == (answer.tokens < 3)


def test_both_the_models_and_the_templates_end_tokens_end_an_answer(model: Model) -> None:
    assert model.tokenizer.eos_token_id in end_ids(model)
    assert model.renderer.end_marker_id in end_ids(model)
