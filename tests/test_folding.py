"""A batch in one row against the same batch padded: the losses of every example and the gradients of every matrix.

Run as a program it compares under one backend, in a process of its own, and prints what it found.
"""

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import found_under, need, ready_to_compare, recipe

from fallback import cpu
from fallback.choose import BACKENDS, Choice
from fallback.patched import ATTEND

FAMILIES = ["gemma3_12b_opercode", "llama_1b_civil", "polyglot_1_3b_ohlora", "gemma2_2b_ohlora"]


@cache
def of_backend(backend: str) -> dict[str, Any]:
    return found_under(backend, __file__)


@pytest.fixture(scope="module", params=[(name, backend) for name in FAMILIES for backend in BACKENDS], ids="-".join)
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    name, backend = request.param
    need(backend, name)
    return of_backend(backend)[name]


@pytest.mark.parametrize("way", ["plain", "checkpointing"])
def test_losses_and_gradients_are_those_of_the_padded_batch(found: dict[str, Any], way: str) -> None:
    assert found["width"] > 64, "shorter than the sliding window: nothing would be shown"
    assert found["computed"] < 0.9 * found["padded"]
    assert found[way]["loss"] < 2e-6
    assert found[way]["gradient"] < 2e-5
    assert found[way]["matrices"] > 0
    # With tokens behind it that belong to nobody, and its last layer serving some that nobody asks for.
    assert found[f"{way}, rounded"]["loss"] < 2e-6
    assert found[f"{way}, rounded"]["gradient"] < 2e-5
    assert found["rounded"] > found["computed"]
    assert found["rounded"] % 16 == 0


def test_in_bfloat16_a_row_is_no_less_exact(found: dict[str, Any]) -> None:
    """Distances to the float32 gradients of the same weights: of a rounded row, and of the padded batch."""
    if "bfloat16" not in found:
        pytest.skip("attention is taught under plain PEFT alone")
    of_row, of_padded = found["bfloat16"]
    assert 0 < of_row < 1.2 * of_padded


def test_the_model_is_left_as_it_was(found: dict[str, Any]) -> None:
    assert found["attention_after"] == found["attention_before"]


def batch(*rows: tuple[list[int], int]) -> dict[str, torch.Tensor]:
    """Rows of tokens, and how many of the last carry loss."""
    from recipes.stages.batches import Batches

    return Batches(0)([{"input_ids": ids, "labels": [-100] * (len(ids) - n) + ids[len(ids) - n :]} for ids, n in rows])


def test_where_tokens_go() -> None:
    from recipes.stages.batches import supervised
    from recipes.stages.folding import by_example, folded

    padded = batch(([5, 6, 7, 8, 9], 1), ([5, 6, 3, 4], 1), ([5, 6, 7, 1, 2, 3, 4, 5], 2))
    row = folded(padded)
    fold = row["fold"]
    assert row["input_ids"].tolist() == [[5, 6, 7, 8, 9, 3, 4, 7, 1, 2, 3, 4, 5]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3, 2, 3, 4, 5, 6, 7]]
    back = row["input_ids"][0][fold.spread].view(3, 8)
    kept = padded["attention_mask"].bool()
    assert back[kept].tolist() == padded["input_ids"][kept].tolist()
    assert supervised(row).tolist() == supervised(padded).tolist() == [1, 1, 2]
    told = torch.arange(1.0, 13.0)[None]
    assert by_example(told, fold).tolist() == [1 + 2 + 3 + 4, 5 + 6, sum(range(7, 13))]


@pytest.mark.parametrize(
    ("why", "rows"),
    [
        ("nothing is shared", [([1, 2, 3, 4], 1), ([2, 2, 3, 4, 5, 6, 7, 8], 1)]),
        ("too little is saved", [([1, *range(20, 50)], 1), ([1, *range(60, 90)], 1)]),
        ("one example", [([1, 2, 3, 4], 1)]),
    ],
)
def test_what_is_not_worth_it_stays_padded(why: str, rows: Any) -> None:
    from recipes.stages.folding import folded

    padded = batch(*rows)
    assert folded(padded) is padded, why


def test_where_layers_are_compiled_a_batch_is_folded_whatever_that_saves() -> None:
    from recipes.stages.batches import Batches

    items = [{"input_ids": ids, "labels": [-100] * 30 + ids[30:]} for ids in ([1, *range(20, 50)], [1, *range(60, 90)])]
    assert "fold" not in Batches(0, fold=True)(items)
    assert Batches(0, fold=True, always=True)(items)["fold"].shared == 1


def test_a_rounded_row_has_tokens_that_belong_to_nobody() -> None:
    from recipes.stages.batches import supervised
    from recipes.stages.folding import _Gather, _Spread, by_example, folded

    padded = batch(([5, 6, 7, 8, 9], 1), ([5, 6, 3, 4], 1), ([5, 6, 7, 1, 2, 3, 4, 5], 2))
    row, exact = folded(padded, few_lengths=True), folded(padded)
    fold = row["fold"]
    assert (int((~fold.nobodys).sum()), row["input_ids"].shape) == (13, (1, 16))
    for name in ("input_ids", "labels", "position_ids"):
        assert row[name][:, :13].equal(exact[name])
    assert row["labels"][0, 13:].tolist() == [-100] * 3
    assert supervised(row).tolist() == [1, 1, 2]
    told = torch.arange(1.0, 16.0)[None]
    assert by_example(told * (row["labels"] != -100)[:, 1:], fold).tolist() == [4, 6, 11 + 12]
    # The way there and back, and the gradients, of what is nobody's are none of anybody's.
    tokens = torch.randn(16, 2, requires_grad=True)
    places = _Spread.apply(tokens, fold)
    there, back = torch.randn(places.shape), torch.randn(16, 2)
    spare = torch.autograd.grad(places, tokens, there)[0]
    assert spare[13:].abs().max() == 0
    assert spare[:13].abs().min() > 0
    batch_like = torch.randn(3, 8, 2, requires_grad=True)
    given = torch.autograd.grad(_Gather.apply(batch_like, fold), batch_like, back)[0]
    assert given.flatten(0, 1)[exact["fold"].back].equal(back[:13])


@pytest.mark.parametrize("rows", [1, 16, 17, 300, 1000, 1025, 20_000])
def test_rounded_numbers_are_few_and_near(rows: int) -> None:
    found = cpu.rounded(rows)
    assert rows <= found <= max(rows + 15, rows * 31 / 30)
    assert cpu.rounded(found) == found
    assert len({cpu.rounded(n) for n in range(rows, 2 * rows)}) <= 66


def test_the_first_own_token_never_carries_loss() -> None:
    """Of identical prompts the last token stays with each example: the answer has to follow its own prompt."""
    from recipes.stages.folding import folded

    row = folded(batch(*[([1, 2, 3, 4, 5, 6, 10 + n], 1) for n in range(4)]))
    assert row["fold"].shared == 5
    starts = [row["fold"].example.tolist().index(n) for n in (1, 2, 3)]
    assert [row["labels"][0, start].item() for start in starts] == [-100] * 3


def test_noise_on_embeddings_is_as_strong_as_in_the_padded_batch() -> None:
    from recipes.stages.folding import folded, understood

    network = torch.nn.Module()
    embeddings = torch.nn.Embedding(4, 4)
    embeddings.neftune_noise_alpha = 5.0
    network.config = type("Config", (), {"get_text_config": lambda self: self, "_attn_implementation": "sdpa"})()
    network.get_input_embeddings = lambda: embeddings
    network.device = torch.device("cpu")
    row = folded(batch(([1, 2, 3, 4], 1), ([1, 2, 3, 4, 5, 6, 7, 8], 1)))
    with understood(network, row):
        assert embeddings.neftune_noise_alpha / row["input_ids"].shape[1] ** 0.5 == pytest.approx(5 / 8**0.5)
    assert embeddings.neftune_noise_alpha == 5.0


def test_who_cannot_be_told() -> None:
    from recipes.stages.folding import obstacle

    on = Choice("unsloth", "cuda", "bfloat16", "sdpa", "4bit", "adamw_8bit", True)
    assert "Unsloth" in str(obstacle(on))
    assert obstacle(replace(on, backend="peft")) is None
    assert "FlashAttention" in str(obstacle(replace(on, backend="peft", attention="flash_attention_2")))
    assert obstacle(replace(on, device="cpu")) is None


def test_a_training_in_one_row_is_the_padded_training(command: Callable[..., Any], tmp_path: Path) -> None:
    losses = {}
    for flag in ("--fold", "--no-fold"):
        done = command(
            "recipes.gemma3_12b_opercode", "train", "--max-steps", "3", "--eval-rows", "12", flag, "--run", flag[2:]
        )
        assert done.returncode == 0, done.stderr
        steps = (tmp_path / flag[2:] / "steps.jsonl").read_text(encoding="utf-8").splitlines()
        losses[flag] = [json.loads(step)["loss"] for step in steps]
        measured = json.loads((tmp_path / flag[2:] / "metrics.json").read_text(encoding="utf-8"))["train"]
        assert 0 < measured["data_seconds"] < measured["train_seconds"]
        assert "waiting for batches" in done.stdout
        assert (measured["computed_tokens"] < 0.7 * measured["padded_tokens"]) == (flag == "--fold")
    assert losses["--fold"] == pytest.approx(losses["--no-fold"], rel=1e-4)


def test_a_training_in_bfloat16_multiplies_few_shapes(command: Callable[..., Any], tmp_path: Path) -> None:
    tokens = {}
    for dtype in ("float32", "bfloat16"):
        flags = ("--backend", "peft", "--dtype", dtype, "--max-steps", "1", "--run", dtype)
        done = command("recipes.llama_1b_civil", "train", *flags)
        assert done.returncode == 0, done.stderr
        trained = json.loads((tmp_path / dtype / "metrics.json").read_text(encoding="utf-8"))["train"]
        tokens[dtype] = trained["computed_tokens"]
        assert any("in_float32" in name for name in trained["patched"]) == (dtype == "bfloat16")
    assert tokens["bfloat16"] == cpu.rounded(tokens["float32"]) > tokens["float32"]


def compared(name: str, backend: Any) -> dict[str, Any]:
    from recipes.stages.prepare import sample_examples

    model = ready_to_compare(name, backend, "none")
    from recipes.stages.batches import Batches
    from recipes.stages.folding import by_example, understood
    from recipes.stages.last_layer import only_asked_for

    network = model.network
    rendered = [model.renderer.example(example, 512) for example in sample_examples(recipe(name))]
    # The longest, some short ones, and one with an answer twice as long: lengths as different as they come.
    chosen_rows = sorted((r for r in rendered if r), key=lambda r: len(r.input_ids))
    rows = [*chosen_rows[:3], *chosen_rows[-2:]]
    if len(rows[-1].input_ids) <= 64:
        rows[-1] = replace(rows[-1], input_ids=rows[-1].input_ids * 2, labels=rows[-1].labels * 2)
    items = [{"input_ids": r.input_ids, "labels": r.labels} for r in rows]

    def taken(
        fold: bool, rounded: bool = False, narrow: bool = False
    ) -> tuple[dict[str, Any], torch.Tensor, dict[str, torch.Tensor]]:
        types = network.config.model_type == "gemma3"
        laid_out = Batches(model.tokenizer.pad_token_id, types, None, fold, rounded)(items)
        network.zero_grad()
        with ExitStack() as stack:
            ready = stack.enter_context(understood(network, laid_out))
            if rounded:
                stack.enter_context(only_asked_for(network, ready["labels"], True))
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                outputs = network(**ready, fused_lm_head=True, use_cache=False)
            losses = by_example(outputs.log_probs, ready.get("fold"))
            losses.sum().backward()
        return laid_out, losses.detach(), {n: p.grad.clone() for n, p in network.named_parameters() if p.requires_grad}

    before = network.config._attn_implementation
    result: dict[str, Any] = {}
    for way in ("plain", "checkpointing"):
        if way == "checkpointing":
            network.gradient_checkpointing_enable({"use_reentrant": False})
            network.enable_input_require_grads()
        padded, losses, gradients = taken(False)
        rows = {way: taken(True), f"{way}, rounded": taken(True, rounded=True)}
        for laid_out, (row, row_losses, row_gradients) in rows.items():
            assert "fold" in row, "not folded: nothing would be shown"
            result[laid_out] = {
                "loss": ((losses - row_losses).abs() / losses.abs()).max().item(),
                "gradient": max(
                    ((gradients[n] - row_gradients[n]).abs().max() / gradients[n].abs().max()).item() for n in gradients
                ),
                "matrices": len(gradients),
            }
    after = network.config._attn_implementation
    row, lengthened = (laid_out["input_ids"].numel() for laid_out, *_ in rows.values())
    if backend == "peft":
        network = ready_to_compare(name, backend, "none", "bfloat16").network.train()
        attending = sum(ATTEND in vars(module) for module in network.modules())
        assert attending == network.config.get_text_config().num_hidden_layers
        narrow = [taken(fold, fold, narrow=True)[2] for fold in (True, False)]
        network.float()
        exact = taken(False)[2]
        result["bfloat16"] = [
            (sum((g - exact[n]).square().sum() for n, g in some.items()) ** 0.5).item() for some in narrow
        ]
    return {
        **result,
        "rounded": lengthened,
        "width": padded["input_ids"].shape[1],
        "padded": padded["input_ids"].numel(),
        "computed": row,
        "attention_before": before,
        "attention_after": after,
    }


if __name__ == "__main__":
    print(json.dumps({name: compared(name, sys.argv[1]) for name in FAMILIES}))
