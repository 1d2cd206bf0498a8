"""Answers: stopped whole, streamed whole, the same alone and in a batch."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import RECIPES, recipe

from fallback.choose import choose
from fallback.torch_build import usable_gpu
from recipes.stages.base_model import model_type, settle
from recipes.stages.contexts import beginning
from recipes.stages.decoding import _chooser, decode
from recipes.stages.generation import Pieces, StopAt, batches, before_stop, by_library, end_ids, generate, stream
from recipes.stages.loading import Model, load_for_training
from recipes.stages.prepare import sample_examples
from recipes.stages.recipe import Message, Sampling, UserError

STOP = "(답변 종료)"
by_ourselves = pytest.mark.skipif(usable_gpu() is not None, reason="on a GPU transformers' generate() chooses tokens")


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


@pytest.mark.parametrize("name", [name for name in RECIPES if not recipe(name).closed])
def test_tokens_are_those_of_generate_though_rows_leave_when_they_are_done(name: str) -> None:
    """Every third token ends an answer, so that they end one after the other."""
    chosen = settle(recipe(name), "tiny")
    settings = replace(recipe(name).settings, quantization="none")
    choice = choose(model_type(recipe(name), chosen), "peft", "none", attention=settings.attention, dtype="float32")
    model = load_for_training(recipe(name), chosen, settings, choice)
    model.network.eval()
    asked = [example.prompt for example in sample_examples(recipe(name))[:9]]
    prompts = sorted((model.renderer.prompt(messages) for messages in asked), key=len, reverse=True)
    greedy = Sampling(max_new_tokens=24, batch_size=9)
    whole = by_library(model, prompts, greedy, (), endless=True)
    assert len(prompts[0]) > len(prompts[-1])
    ends = [next((i for i, token in enumerate(row) if token % 3 == 0 and i > 2), 23) + 1 for row in whole]
    assert len(set(ends)) > 2
    rows: list[int] = []
    found = decode(
        model.network, prompts, greedy, lambda answer: len(answer) > 3 and answer[-1] % 3 == 0,
        beginning(model.network, prompts), lambda tokens: rows.append(len(tokens)),
    )  # fmt: skip
    assert found == [row[:end] for row, end in zip(whole, ends, strict=True)]
    assert len(rows) == max(ends)
    assert rows[0] == 9 > rows[-1]


@by_ourselves
def test_what_all_questions_begin_with_is_read_once(model: Model) -> None:
    prompts = [(Message("user", f"오늘 하루는 어땠는지 이야기해 줘 {n}"),) for n in range(4)]
    lengths = [len(model.renderer.prompt(prompt)) for prompt in prompts]
    seen: list[int] = []
    embeddings = model.network.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _, given, __: seen.append(given[0].numel()))
    generate(model, prompts, Sampling(max_new_tokens=1), ())
    hook.remove()
    shared, own = seen
    assert shared > 5
    assert own == sum(lengths) - 4 * shared


def test_tokens_are_drawn_as_temperature_and_top_p_say() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, -9.0]]).repeat(4000, 1)
    torch.manual_seed(0)
    drawn = torch.tensor(_chooser(Sampling(temperature=2.0, top_p=0.9))(logits))
    expected = (logits[0, :3] / 2).softmax(-1)
    assert torch.stack([(drawn == token).float().mean() for token in range(3)]) == pytest.approx(expected, abs=0.03)
    assert (drawn != 3).all()
    assert set(_chooser(Sampling(temperature=1.0, top_p=0.5))(logits)) == {0}
    assert set(_chooser(Sampling(temperature=0.0))(logits)) == {0}


@by_ourselves
def test_where_attention_is_not_transformers_own_generate_answers(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [(Message("user", text),) for text in ("안녕", "오늘 날씨 어때?")]
    sampling = Sampling(max_new_tokens=8)
    asked: list[int] = []
    library = model.network.generate
    monkeypatch.setattr(model.network, "generate", lambda **how: asked.append(len(how["input_ids"])) or library(**how))
    ours = generate(model, prompts, sampling, (STOP,))
    assert asked == []
    monkeypatch.setattr(type(model.network.get_base_model()), "_supports_attention_backend", False)
    assert generate(model, prompts, sampling, (STOP,)) == ours
    assert asked == [2]


def test_the_base_models_own_way_of_drawing_is_not_mixed_in(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, how = [model.renderer.prompt((Message("user", "안녕"),))], Sampling(max_new_tokens=12)
    usual = by_library(model, prompts, how, (), endless=True)
    monkeypatch.setattr(model.network.generation_config, "repetition_penalty", 100.0)
    monkeypatch.setattr(model.network.generation_config, "no_repeat_ngram_size", 1)
    assert len(set(usual[0])) < len(usual[0]), "nothing that a penalty would change"
    assert by_library(model, prompts, how, (), endless=True) == usual


@by_ourselves
def test_one_prompt_asked_several_times_is_read_once(model: Model) -> None:
    prompt = (Message("user", "안녕"),)
    seen: list[int] = []
    embeddings = model.network.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _, given, __: seen.append(given[0].numel()))
    generate(model, [prompt] * 4, Sampling(max_new_tokens=1), ())
    hook.remove()
    assert seen == [len(model.renderer.prompt(prompt)) - 1, 4]


@pytest.mark.parametrize("name", ["max_new_tokens", "batch_size", "answers"])
def test_nothing_is_no_length_of_an_answer(name: str) -> None:
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} 0: one at least"):
        Sampling(**{name: 0})


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


def test_an_answer_interrupted_within_a_layer_leaves_nothing_behind(model: Model) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    def answered() -> Any:
        return stream(model, (Message("user", "안녕"),), Sampling(max_new_tokens=6), lambda piece: None, (STOP,))

    whole = answered()
    layer = next(m for m in model.network.modules() if isinstance(m, torch.nn.ModuleList))[-1]
    hook = layer.register_forward_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        answered()
    hook.remove()
    assert answered() == whole


def test_an_answer_at_the_limit_did_not_stop(model: Model) -> None:
    answer = generate(model, [(Message("user", "안녕"),)], Sampling(max_new_tokens=3), (STOP,))[0]
    assert answer.tokens <= 3
    assert answer.stopped == (answer.tokens < 3)


def test_both_the_models_and_the_templates_end_tokens_end_an_answer(model: Model) -> None:
    assert model.tokenizer.eos_token_id in end_ids(model)
    assert model.renderer.end_marker_id in end_ids(model)
