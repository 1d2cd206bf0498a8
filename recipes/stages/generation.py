"""Prompts -> answers: batched by length, or streamed piece by piece, ending at an end token or a stop string.

On CPUs tokens are chosen by `decoding`; on GPUs, and where attention is not transformers' own, by its generate().
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from fallback.patched import uncompiled
from recipes.stages.contexts import Context, beginning
from recipes.stages.decoding import decode
from recipes.stages.loading import Model
from recipes.stages.processes import ALONE, Team
from recipes.stages.recipe import Message, Sampling
from recipes.stages.scoring import affordable_tokens

# A character may be spread over several tokens; until the last has come it decodes to this.
_INCOMPLETE = "\ufffd"


@dataclass(frozen=True)
class Answer:
    text: str
    stopped: bool
    """By itself, at an end token or stop string; False: at the length limit."""
    tokens: int


def before_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text up to the first stop string, and whether there was one."""
    found = [at for at in (text.find(phrase) for phrase in stop) if at >= 0]
    return (text[: min(found)], True) if found else (text, False)


class StopString:
    """Whether an answer's tokens have come to a stop string, however the tokenizer cut it."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]):
        self.tokenizer, self.stop = tokenizer, stop
        # A token spells at least one byte, a Hangul syllable is three.
        self.reach = max((len(phrase.encode()) for phrase in stop), default=0) + 8

    def __call__(self, answer: Sequence[int]) -> bool:
        if not self.stop:
            return False
        text = self.tokenizer.decode(answer[-self.reach :], skip_special_tokens=True)
        return before_stop(text, self.stop)[1]


class StopAt(StoppingCriteria):
    """Ends each row by its own text, for generate()."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt_length: int):
        self.stopped, self.prompt_length = StopString(tokenizer, stop), prompt_length
        self.done: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self.done is None:
            self.done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for row in (~self.done).nonzero().flatten().tolist():
            self.done[row] = self.stopped(input_ids[row, self.prompt_length :].tolist())
        return self.done


class Pieces(BaseStreamer):
    """Hands on text as soon as it is certain: never half a syllable, never the beginning of a stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], emit: Callable[[str], None]):
        self.tokenizer, self.stop, self.emit = tokenizer, stop, emit
        self.ids: list[int] = []
        self.shown = 0
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self.prompt:
            self.prompt = False
            return
        self.ids += value.flatten().tolist()
        text, stopped = before_stop(self.tokenizer.decode(self.ids, skip_special_tokens=True), self.stop)
        self._show(text if stopped else text[: len(text) - self._uncertain(text)])

    def end(self) -> None:
        text, _ = before_stop(self.tokenizer.decode(self.ids, skip_special_tokens=True), self.stop)
        self._show(text.rstrip())

    def _uncertain(self, text: str) -> int:
        """Characters at the end that a later token may still change or take back."""
        certain = text.rstrip(_INCOMPLETE)
        for phrase in self.stop:
            for length in range(min(len(phrase), len(certain)), 0, -1):
                if certain.endswith(phrase[:length]):
                    return len(text) - len(certain[: len(certain) - length].rstrip())
        return len(text) - len(certain.rstrip())

    def _show(self, text: str) -> None:
        if self.shown == 0:
            text = text.lstrip() if not text.strip() else text
        if len(text) > self.shown:
            self.emit(text[self.shown :])
            self.shown = len(text)


def end_ids(model: Model) -> list[int]:
    """Every token after which there is nothing more to say: the model's own, and the end marker of its template."""
    configured = model.network.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured]) - {None}
    ids.add(model.tokenizer.eos_token_id)
    ids.add(model.renderer.end_marker_id)
    return sorted(ids)


def configuration(model: Model, sampling: Sampling) -> GenerationConfig:
    drawn: dict[str, Any] = (
        dict(do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0)
        if sampling.temperature > 0
        else dict(do_sample=False)
    )
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=end_ids(model),
        pad_token_id=model.tokenizer.pad_token_id,
        use_cache=True,
        # What is not said here would be the base model's own.
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        **drawn,
    )


def generate(
    model: Model,
    prompts: Sequence[Sequence[Message]],
    sampling: Sampling,
    stop: Sequence[str] = (),
    max_length: int | None = None,
    done: Callable[[int], None] = lambda count: None,
    team: Team = ALONE,
) -> list[Answer]:
    """Answers in the order of the prompts. Computed in batches of like length, so that they end about together."""
    encoded = model.renderer.prompts(prompts, max_length)
    if not encoded:
        return []
    prefix = beginning(model.network, encoded) if by_ourselves(model) else None
    found: list[tuple[int, Answer]] = []
    for _, batch in team.mine(list(batches(encoded, sampling, affordable_tokens(model.network, sys.maxsize)))):
        found += zip(batch, _answer(model, [encoded[i] for i in batch], sampling, stop, prefix), strict=True)
        done(len(batch))
    return team.together(found)


def batches(prompts: Sequence[Sequence[int]], sampling: Sampling, tokens: int) -> Iterator[list[int]]:
    """The longest first; as many at one time as there may be tokens, the answers' own among them."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    while order:
        rows = tokens // (len(prompts[order[0]]) + sampling.max_new_tokens)
        rows = max(1, min(sampling.batch_size, rows))
        yield order[:rows]
        order = order[rows:]


def several(
    model: Model,
    prompts: Sequence[Sequence[Message]],
    sampling: Sampling,
    stop: Sequence[str] = (),
    max_length: int | None = None,
) -> list[list[Answer]]:
    """sampling.answers answers to each prompt; empty ones are drawn again."""
    repeated = [prompt for prompt in prompts for _ in range(sampling.answers)]
    answers = generate(model, repeated, sampling, stop, max_length)
    for _ in range(sampling.max_trials if sampling.temperature > 0 else 0):
        empty = [i for i, answer in enumerate(answers) if not answer.text]
        if not empty:
            break
        again = generate(model, [repeated[i] for i in empty], sampling, stop, max_length)
        for i, answer in zip(empty, again, strict=True):
            answers[i] = answer
    return [answers[i : i + sampling.answers] for i in range(0, len(answers), sampling.answers)]


@dataclass(frozen=True)
class Speed:
    prompt_tokens: int
    new_tokens: int
    """Tokens decoded after the first."""
    prefill_seconds: float
    """Until the first new token."""
    decode_seconds: float


def speed(model: Model, messages: Sequence[Message], sampling: Sampling, max_length: int | None = None) -> Speed:
    """How long one answer takes. No token ends it, so that as many are decoded as are counted."""
    ids = model.renderer.prompt(messages, max_length)

    def seconds(new: int) -> float:
        began = time.perf_counter()
        _tokens(model, [ids], replace(sampling, max_new_tokens=new), (), endless=True)
        if model.network.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    new = max(2, sampling.max_new_tokens)
    seconds(2)
    first, whole = seconds(1), seconds(new)
    return Speed(len(ids), new - 1, first, max(1e-9, whole - first))


def stream(
    model: Model,
    messages: Sequence[Message],
    sampling: Sampling,
    emit: Callable[[str], None],
    stop: Sequence[str] = (),
    max_length: int | None = None,
) -> Answer:
    """One answer, shown while it is made."""
    streamer = Pieces(model.tokenizer, stop, emit)
    return _answer(model, [model.renderer.prompt(messages, max_length)], sampling, stop, streamer=streamer)[0]


def _answer(
    model: Model,
    prompts: list[list[int]],
    sampling: Sampling,
    stop: Sequence[str],
    prefix: Context | None = None,
    streamer: BaseStreamer | None = None,
) -> list[Answer]:
    ends = set(end_ids(model))
    answers = []
    for row in _tokens(model, prompts, sampling, stop, prefix, streamer):
        cut = next((i for i, token in enumerate(row) if token in ends), None)
        kept = row if cut is None else row[:cut]
        kept = [token for token in kept if token != model.tokenizer.pad_token_id]
        text, at_stop = before_stop(model.tokenizer.decode(kept, skip_special_tokens=True), stop)
        answers.append(Answer(text.strip(), cut is not None or at_stop, len(kept)))
    return answers


def _tokens(
    model: Model,
    prompts: list[list[int]],
    sampling: Sampling,
    stop: Sequence[str],
    prefix: Context | None = None,
    streamer: BaseStreamer | None = None,
    endless: bool = False,
) -> list[list[int]]:
    """What follows each prompt; `endless` goes on to the length limit."""
    if not by_ourselves(model):
        return by_library(model, prompts, sampling, stop, streamer, endless)
    ends, stopped = set(end_ids(model)), StopString(model.tokenizer, stop)

    def ended(answer: Sequence[int]) -> bool:
        return not endless and (answer[-1] in ends or stopped(answer))

    def stream_on(tokens: Sequence[int]) -> None:
        if streamer is not None:
            streamer.put(torch.tensor(tokens))

    stream_on(prompts[0])
    found = decode(model.network, prompts, sampling, ended, prefix or beginning(model.network, prompts), stream_on)
    if streamer is not None:
        streamer.end()
    return found


def by_ourselves(model: Model) -> bool:
    """`decoding` was measured on CPUs alone, and tells attention what a token may look at: that has to be looked up
    where transformers keeps it, and all that a model remembers has to be keys and values."""
    base = model.network.get_base_model() if hasattr(model.network, "get_base_model") else model.network
    return model.network.device.type == "cpu" and base._supports_attention_backend and not base._is_stateful


def by_library(
    model: Model,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop: Sequence[str],
    streamer: BaseStreamer | None = None,
    endless: bool = False,
) -> list[list[int]]:
    """The same by transformers' generate(), which for `endless` takes no token that ends an answer."""
    width, pad, device = max(map(len, prompts)), model.tokenizer.pad_token_id, model.network.device
    how = configuration(model, sampling)
    if endless:
        how.min_new_tokens = sampling.max_new_tokens
    with torch.inference_mode(), uncompiled(model.network):
        output = model.network.generate(
            input_ids=torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device),
            attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device),
            generation_config=how,
            stopping_criteria=StoppingCriteriaList([StopAt(model.tokenizer, stop, width)] if stop else []),
            streamer=streamer,
        )
    return output[:, width:].tolist()
