"""Best-first over the tree of codes against scoring every code in a full forward pass of its own.

Run as a program it compares under one backend, in a process of its own, and prints what it found.
"""

import importlib
import json
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from conftest import found_under, need

from fallback.choose import BACKENDS, choose
from recipes.stages.recipe import Message

# Gemma 3 (two kinds of attention), Llama and GPT-NeoX; Gemma 2 with capped logits and eager attention on top.
FAMILIES = ["gemma3_12b_opercode", "llama_1b_civil", "polyglot_1_3b_ohlora", "gemma2_2b_ohlora"]


@cache
def of_backend(backend: str) -> dict[str, Any]:
    """All families under one backend, whose libraries take longest to load."""
    return found_under(backend, __file__)


@pytest.fixture(scope="module", params=[(name, backend) for name in FAMILIES for backend in BACKENDS], ids="-".join)
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    name, backend = request.param
    need(backend, name)
    return of_backend(backend)[name]


def test_exact(found: dict[str, Any]) -> None:
    assert found["longest"] > 64, "shorter than the sliding window: nothing would be shown"
    assert len(found["pieces"]) > 1, "all texts in one piece: nothing would be shown"
    assert max(found["pieces"]) > 1, "no piece has any padding: nothing would be shown"
    assert found["exhaustive"]["difference"] < 1e-4
    assert found["exhaustive"]["best"] == found["texts"]
    assert found["exhaustive"]["missing"] == 0


def test_no_padding_goes_through_the_network(found: dict[str, Any]) -> None:
    assert found["packed"]["given"] == found["packed"]["real"]
    # And where attention cannot be told, with padding:
    assert found["packed"]["padded"] > found["packed"]["real"]
    assert found["packed"]["difference"] < 1e-4


def test_best_first_is_right_to_the_tolerance(found: dict[str, Any]) -> None:
    assert found["best_first"]["difference"] < 1e-4
    assert found["best_first"]["best"] == found["texts"]
    assert found["best_first"]["left"] < 1e-4
    assert found["best_first"]["expansions"] < found["exhaustive"]["expansions"]


def test_what_must_be_included(found: dict[str, Any]) -> None:
    assert found["rough"]["missing_included"] > 0, "looked at anyway: nothing would be shown"
    assert found["including"]["missing_included"] == 0
    assert found["including"]["difference"] < 1e-4


def test_batches_do_not_matter(found: dict[str, Any]) -> None:
    assert found["one_by_one"] < 1e-4


def test_identical_texts_are_scored_once(found: dict[str, Any]) -> None:
    assert found["twice"]["equal"]
    assert found["twice"]["tokens"] == found["once"]["tokens"]


@pytest.mark.parametrize("answers", [[[1, 2, 9], [1, 2, 3, 9], [4, 9]], [[7, 9]], [[1, 9], [2, 9], [3, 9]]])
def test_the_tree_holds_every_answer(answers: list[list[int]]) -> None:
    from recipes.stages.scoring import Branch, grow

    root = grow(answers, [1] * len(answers))
    got: dict[int, list[int]] = {}

    def walk(branch: Branch, before: tuple[int, ...]) -> None:
        here = before + branch.tokens
        assert branch is root or branch.code is not None or len(branch.children) > 1, "an unbranching stretch"
        if branch.code is not None:
            got[branch.code] = list(here)
        for child in branch.children:
            walk(child, here)

    walk(root, ())
    assert [got[i] for i in range(len(answers))] == answers


def test_an_end_is_read_only_where_it_tells_codes_apart() -> None:
    from recipes.stages.scoring import distinguishing

    assert distinguishing([([1, 2], [9]), ([1, 3], [9])]) == [[1, 2], [1, 3]]
    assert distinguishing([([1], [9]), ([1, 3], [9]), ([2], [9])]) == [[1, 9], [1, 3], [2]]


def test_texts_of_like_length_are_read_in_one_pass() -> None:
    from recipes.stages.contexts import slices

    texts = [[0] * length for length in (70, 68, 60, 41, 40, 40, 22, 9, 8)]
    assert [(rows.start, rows.stop) for rows in slices(texts, 140)] == [(0, 2), (2, 4), (4, 7), (7, 9)]
    assert [(rows.start, rows.stop) for rows in slices(texts, 1)] == [(i, i + 1) for i in range(9)]


def test_rows_are_no_more_than_logits_can_be_held_of() -> None:
    from types import SimpleNamespace

    import torch

    from recipes.stages import scoring

    def rows(vocabulary: int, longest: int) -> int:
        config = SimpleNamespace(vocab_size=vocabulary)
        network = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config), dtype=torch.float32)
        return scoring._most_rows(network, SimpleNamespace(answers=[[0] * longest, [0]]))  # type: ignore[arg-type]

    for longest in (5, 30):
        assert 0.5 * 2**29 < rows(262_144, longest) * (longest + 2) * 262_144 * 4 <= 2**29
    assert rows(10**12, 5) == 1
    many = [(tuple(range(10)), -1)] * 50
    assert [len(b) for b in scoring._batches(many, 10, 10_000, 20)] == [20, 20, 10]
    assert [len(b) for b in scoring._batches(many, 10, 300, 20)] == [15, 15, 15, 5]


def test_keys_and_values_go_with_their_batch() -> None:
    """Not when Python next looks for circles of references: there would be a gigabyte for every batch till then."""
    import gc
    import weakref

    from transformers import LlamaConfig, LlamaForCausalLM

    from recipes.stages.contexts import Context

    shape = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=8,
        attn_implementation="sdpa",
    )  # fmt: skip
    context = Context(LlamaForCausalLM(shape).eval(), 2, 4)
    context.read_texts([[1, 2, 3], [4]])
    held = [weakref.ref(layer) for layer in context.cache.layers]
    gc.disable()
    try:
        del context
        assert [one() for one in held] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize(("texts", "filled"), [([10, 8, 5], 32), ([35, 35], 80), ([9, 8], 32), ([9, 7], 16)])
def test_few_lengths_go_through_a_network_of_bfloat16(
    texts: list[int], filled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN writes code for each of them. Tokens that fill a pass up belong to nobody: nothing else changes."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from recipes.stages import contexts

    shape = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=50,
        attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    network = LlamaForCausalLM(shape).eval()
    seen: list[int] = []
    network.model.embed_tokens.register_forward_hook(lambda _, args, made: seen.append(args[0].numel()))
    network.model.layers[-1].mlp.gate_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2]))
    network.lm_head.register_forward_hook(lambda _, args, made: seen.append(made.shape[-2]))

    def read() -> Any:
        seen.clear()
        context = contexts.Context(network, len(texts), 20)
        with torch.inference_mode():
            first = context.read_texts(
                [[(3 * row + i) % 50 for i in range(length)] for row, length in enumerate(texts)]
            )
            where = np.full((len(texts), 1), -1)
            after = np.arange(len(texts))[:, None]
            where[:, 0] = texts
            path = context.positions[:, None] >= 0
            then = context.read(after, where, path, np.zeros_like(after), np.ones_like(after, dtype=bool))
        return torch.cat([first, then])

    exact, rows = read(), len(texts)
    # What reads the texts, and what goes on from there: all tokens, those that are asked for, their logits.
    assert seen == [sum(texts), rows, rows] + [rows] * 3
    network.bfloat16()
    narrow, few = read(), 16 if filled > sum(texts) else rows
    assert seen == [filled, few, few] + [rows] * 3
    assert narrow.shape == exact.shape
    assert (narrow.float() - exact).abs().max() < 0.03 * exact.abs().max()
    monkeypatch.setattr(contexts, "_FEW", 10**6)
    assert (narrow - read()).abs().max() < 0.02 * exact.abs().max()
    assert seen[0] == sum(texts)


def check(name: str, backend: str) -> dict[str, Any]:
    from recipes.samples.payments import OPERATIONS, payments
    from recipes.stages import loading
    from recipes.stages.base_model import model_type, settle

    recipe = importlib.import_module(f"recipes.{name}").RECIPE
    chosen = settle(recipe, "tiny")
    choice = choose(model_type(recipe, chosen), backend, "none")  # type: ignore[arg-type]
    model = loading.load_for_training(recipe, chosen, replace(recipe.settings, **recipe.miniature), choice)
    import numpy as np
    import torch

    from recipes.stages import contexts, scoring

    torch.manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.network.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.02)
    network = model.network.eval()
    rows = {operation.code: 90 - i for i, operation in enumerate(OPERATIONS[:40])}
    # The last is the beginning of another, and only its end marker tells.
    codes = scoring.Codes(model.renderer, {**rows, OPERATIONS[0].code[:4]: 3})
    comments = [text for text, _ in payments(10, 10, seed=3)]
    instruction = "Answer with the operation code of this bank payment. " * 3
    prompts = [(Message("user", instruction + text),) for text in comments]
    answers = codes.answers
    encoded = [model.renderer.prompt(prompt) for prompt in prompts]

    # A random model finds every code about as likely as any other; one that has learned a little does not.
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=5e-3)
    for step in range(160):
        i = step % len(prompts)
        tokens = torch.tensor([encoded[i] + answers[i % 7]])
        logits = network(input_ids=tokens).logits[0, len(encoded[i]) - 1 : -1]
        torch.nn.functional.cross_entropy(logits, tokens[0, len(encoded[i]) :]).backward()
        optimizer.step()
        optimizer.zero_grad()

    reference = np.zeros((len(prompts), len(answers)))
    with torch.no_grad():
        for i, ids in enumerate(encoded):
            for j, answer in enumerate(answers):
                logits = network(input_ids=torch.tensor([ids + answer])).logits[0].log_softmax(-1)
                reference[i, j] = sum(logits[len(ids) - 1 + k, token].item() for k, token in enumerate(answer))

    calls: list[int] = []
    forward = contexts.Context._pass

    def counted(self: Any, rows: Any, tokens: Any, positions: Any, *rest: Any) -> Any:
        calls.append(int((positions >= 0).sum()))
        return forward(self, rows, tokens, positions, *rest)

    contexts.Context._pass = counted  # type: ignore[method-assign]
    # So that so few texts take several passes, some of them of more than one length.
    contexts.PLACES_AT_ONCE["cpu"] = 250
    lengths = sorted(map(len, encoded), reverse=True)
    start = contexts.shared_start(encoded)
    own = [[0] * (length - start) for length in lengths]
    pieces = [len({len(text) for text in own[rows]}) for rows in contexts.slices(own, contexts.PLACES_AT_ONCE["cpu"])]
    try:
        return {**compared(model, codes, prompts, reference, encoded, calls), "pieces": pieces}
    finally:
        contexts.Context._pass = forward  # type: ignore[method-assign]


def compared(model: Any, codes: Any, prompts: Any, reference: Any, encoded: Any, calls: list[int]) -> dict[str, Any]:
    import numpy as np

    from recipes.stages import contexts, scoring

    def scored(some: Any = prompts, **how: Any) -> tuple[Any, dict[str, Any]]:
        calls.clear()
        scores = scoring.score(model, codes, some, **how)
        known = np.isfinite(scores.log_p)
        expected = reference if len(some) == len(prompts) else np.concatenate([reference, reference])
        return scores.log_p, {
            "difference": float(np.abs(scores.log_p - expected)[known].max()),
            "best": int((scores.log_p.argmax(1) == expected.argmax(1)).sum()),
            "missing": int((~known).sum()),
            "left": float(((np.exp(expected) * ~known).sum(1) / np.exp(expected).sum(1)).max()),
            "expansions": scores.expansions,
            "tokens": sum(calls),
        }

    given: list[int] = []
    hook = model.network.get_input_embeddings().register_forward_pre_hook(lambda _, x: given.append(x[0].numel()))
    exhaustive_p, exhaustive = scored(tolerance=0.0)
    packed = {"given": sum(given), "real": sum(calls)}
    given.clear()
    packs, contexts.Context._packs = contexts.Context._packs, lambda _: False  # type: ignore[method-assign]
    padded_p, _ = scored(tolerance=0.0)
    contexts.Context._packs = packs  # type: ignore[method-assign]
    hook.remove()
    packed["padded"] = sum(given)
    _, best_first = scored()
    wanted = [codes.names[-1 - i] for i in range(len(prompts))]
    rough_p, _ = scored(tolerance=0.5)
    including_p, including = scored(tolerance=0.5, include=wanted)
    singly, _ = scored(tolerance=0.0, batch_tokens=1)
    twice_p, twice = scored([*prompts, *prompts], tolerance=0.0)
    columns = [codes.index[code] for code in wanted]

    def missing(log_p: Any) -> int:
        return int((~np.isfinite(log_p[np.arange(len(prompts)), columns])).sum())

    return {
        "texts": len(prompts),
        "longest": max(map(len, encoded)),
        "exhaustive": exhaustive,
        "packed": {**packed, "difference": float(np.abs(padded_p - exhaustive_p).max())},
        "best_first": best_first,
        "rough": {"missing_included": missing(rough_p)},
        "including": {**including, "missing_included": missing(including_p)},
        "one_by_one": float(np.abs(singly - exhaustive_p).max()),
        "twice": {**twice, "equal": bool((twice_p[: len(prompts)] == twice_p[len(prompts) :]).all())},
        "once": exhaustive,
    }


if __name__ == "__main__":
    print(json.dumps({name: check(name, sys.argv[1]) for name in FAMILIES}))
