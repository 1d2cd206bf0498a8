"""Prompts' tokens -> answers' tokens, one token of every answer at a time.

What all prompts begin with is read once, rows that are done leave the batch, and keys and values stay where they were
put: transformers' generate() copies all of them for every token, and computes on for rows that are done until the last
one is.

On CPUs. On a GPU nobody measured it, and generate() answers there.

Import this after a backend has loaded its libraries.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from recipes.stages.contexts import Context
from recipes.stages.recipe import Sampling

# A batch's keys and values are copied when so many of its rows are done.
_DONE = 0.25


def decode(
    network: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    ended: Callable[[Sequence[int]], bool],
    prefix: Context,
    made: Callable[[Sequence[int]], None] = lambda tokens: None,
) -> list[list[int]]:
    """Of prompts, longest first, the tokens that follow each, up to where they have `ended`. `prefix` has read what
    all begin with; `made` is told the tokens of each round."""
    start = prefix.positions.shape[1]
    context = Context(network, len(prompts), len(prompts[0]) + sampling.max_new_tokens)
    context.begin_with(prefix)
    answers: list[list[int]] = [[] for _ in prompts]
    here = list(range(len(prompts)))
    going = set(here)
    chosen = _chooser(sampling)
    with torch.inference_mode():
        logits = context.read_texts([prompt[start:] for prompt in prompts])
        while True:
            tokens = chosen(logits)
            made(tokens)
            for row, token in zip(here, tokens, strict=True):
                if row in going:
                    answers[row].append(token)
                    if len(answers[row]) >= sampling.max_new_tokens or ended(answers[row]):
                        going.remove(row)
            if not going:
                return answers
            if len(going) <= (1 - _DONE) * len(here):
                kept = [place for place, row in enumerate(here) if row in going]
                context.keep(kept)
                here, tokens = [here[place] for place in kept], [tokens[place] for place in kept]
            before = context.positions
            logits = context.read(
                np.array(tokens)[:, None],
                before.max(1, keepdims=True) + 1,
                (before >= 0)[:, None],
                np.zeros((len(here), 1), dtype=np.int64),
                np.ones((len(here), 1), dtype=bool),
            )


def _chooser(sampling: Sampling) -> Callable[[torch.Tensor], list[int]]:
    """Logits -> tokens: the likeliest, or drawn."""
    if sampling.temperature <= 0:
        return lambda logits: logits.argmax(-1).tolist()
    warped = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_p < 1:
        warped.append(TopPLogitsWarper(sampling.top_p))

    def drawn(logits: torch.Tensor) -> list[int]:
        return torch.multinomial(warped(None, logits.float()).softmax(-1), 1)[:, 0].tolist()

    return drawn
