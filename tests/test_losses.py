"""Weights, focal loss, logit adjustment and samplers, against a plain reference and in the real trainer.

Run as a program it does the part that needs a backend, in a process of its own, and prints what it found.
"""

import json
import math
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import found_under, need

from fallback import cpu
from fallback.choose import BACKENDS, choose
from recipes.stages.recipe import Balance

SIZES = [40, 12, 5, 3]
WAYS = {
    "plain": Balance(),
    "balanced": Balance(class_weights="balanced"),
    "capped": Balance(class_weights="balanced", weight_cap=1.5),
    "effective": Balance(class_weights="effective"),
    "focal": Balance(focal_gamma=2.0),
    "soft focal": Balance(focal_gamma=0.5),
    "adjusted": Balance(logit_adjustment=1.0),
    "sampled": Balance(sampler="sqrt", class_weights="balanced"),
    "everything": Balance(
        class_weights="balanced", focal_gamma=2.0, logit_adjustment=0.5, sampler="sqrt", oversample_to=6
    ),
}

# A real training is made with these; the others differ from them only in what `Objective` computes.
TRAINED = ["plain", "balanced", "everything"]


def reference(log_p: torch.Tensor, tokens: torch.Tensor, classes: list[int], balance: Balance) -> torch.Tensor:
    """The same losses once more, spelled out row by row in float64."""
    wanted = [max(size, balance.oversample_to) for size in SIZES]
    if balance.sampler == "sqrt":
        roots = [math.sqrt(size) for size in wanted]
        drawn = [sum(wanted) * root / sum(roots) for root in roots]
        drawn = [float(count) for count in _rounded(drawn, sum(wanted))]
    else:
        drawn = [float(size) for size in wanted]
    share = [count / sum(drawn) for count in drawn]
    if balance.class_weights == "balanced":
        weight = [min(1 / (len(SIZES) * s), balance.weight_cap) for s in share]
    elif balance.class_weights == "effective":
        raw = [(1 - 0.999) / (1 - 0.999**count) for count in drawn]
        average = sum(r * s for r, s in zip(raw, share, strict=True))
        weight = [min(r / average, balance.weight_cap) for r in raw]
    else:
        weight = [1.0] * len(SIZES)
    total = torch.zeros((), dtype=torch.float64)
    mass = 0.0
    for row, c in enumerate(classes):
        p = log_p[row].exp()
        if balance.logit_adjustment:
            t = balance.logit_adjustment
            others = sum(share[k] / (1 - share[c]) * share[k] ** t for k in range(len(SIZES)) if k != c)
            p = p * share[c] ** t / (p * share[c] ** t + (1 - p) * others)
        total = total + weight[c] * (1 - p) ** balance.focal_gamma * -p.log()
        mass += weight[c] * float(tokens[row])
    return total / mass


def _rounded(exact: list[float], total: int) -> list[int]:
    counts = [max(1, math.floor(x)) for x in exact]
    for c in sorted(range(len(exact)), key=lambda c: counts[c] - exact[c])[: total - sum(counts)]:
        counts[c] += 1
    return counts


@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients_against_float64(way: str) -> None:
    from recipes.stages.losses import Objective

    classes = [0, 1, 2, 3, 0, 0, 3, 1]
    tokens = torch.tensor([6, 6, 7, 6, 5, 6, 7, 6])
    # From hopeless to as good as certain.
    log_p = torch.tensor([-25.0, -3.0, -0.7, -0.05, -1e-3, -1e-5, -9.0, -0.2], requires_grad=True)
    exact = log_p.detach().double().requires_grad_()
    objective = Objective.of(SIZES, WAYS[way])
    index = torch.tensor(classes)
    loss = objective.loss(log_p, index, objective.mass(tokens, index))
    loss.backward()
    expected = reference(exact, tokens, classes, WAYS[way])
    expected.backward()
    assert log_p.grad is not None
    assert exact.grad is not None
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(log_p.grad.double(), exact.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_certain_answer_gives_no_nan(way: str) -> None:
    from recipes.stages.losses import Objective

    objective = Objective.of(SIZES, WAYS[way])
    log_p = torch.zeros(2, requires_grad=True)
    objective.loss(log_p, torch.tensor([0, 3]), torch.tensor(12.0)).backward()
    assert log_p.grad is not None
    assert log_p.grad.isfinite().all()


def test_weights_as_scikit_learn_has_them_and_capped() -> None:
    import numpy as np
    from sklearn.utils.class_weight import compute_class_weight

    from recipes.stages.losses import class_weights

    labels = np.repeat(np.arange(4), SIZES)
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    assert class_weights(SIZES, Balance(class_weights="balanced")) == pytest.approx(expected.tolist())
    assert max(class_weights([100_000, 100, 7], Balance(class_weights="balanced"))) == 10.0
    # Drawn alike, there is nothing left to weigh.
    assert class_weights([9, 9, 9], Balance(class_weights="balanced", sampler="weighted")) == [1.0, 1.0, 1.0]
    effective = class_weights([100_000, 20_000, 7], Balance(class_weights="effective", weight_cap=1e9))
    assert effective[0] == pytest.approx(effective[1], rel=1e-3)
    assert effective[2] > 50 * effective[0]


@pytest.mark.parametrize(
    ("balance", "expected"),
    [
        (Balance(), [40, 12, 5, 3]),
        (Balance(sampler="weighted"), [15, 15, 15, 15]),
        (Balance(sampler="sqrt"), [28, 15, 10, 7]),
        (Balance(oversample_to=10), [40, 12, 10, 10]),
        (Balance(oversample_to=10, sampler="weighted"), [18, 18, 18, 18]),
    ],
)
def test_how_often_a_class_is_drawn(balance: Balance, expected: list[int]) -> None:
    from recipes.stages.batches import Drawn
    from recipes.stages.losses import draws

    counts = draws(SIZES, balance)
    assert sorted(counts) == sorted(expected)
    assert sum(counts) == sum(max(size, balance.oversample_to) for size in SIZES)
    classes = [c for c, size in enumerate(SIZES) for _ in range(size)]
    sampler = Drawn(classes, counts, seed=3)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        drawn = list(sampler)
        assert len(drawn) == len(sampler) == sum(counts)
        assert [Counter(classes[row] for row in drawn)[c] for c in range(4)] == counts
        # Nothing comes up a second time before all of its class came up once.
        for c, (count, size) in enumerate(zip(counts, SIZES, strict=True)):
            times = Counter(row for row in drawn if classes[row] == c)
            assert set(times.values()) <= {count // size, -(-count // size)}


def test_the_order_is_decided_by_seed_and_epoch() -> None:
    from recipes.stages.batches import Drawn

    classes = [0] * 30 + [1] * 20
    sampler = Drawn(classes, [30, 30], seed=1)
    first = list(sampler)
    torch.manual_seed(99)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(Drawn(classes, [30, 30], seed=2)) != first


@pytest.fixture(scope="module", params=BACKENDS)
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    need(request.param, "gemma3_12b_opercode")
    return found_under(request.param, __file__)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_the_model(way: str, found: dict[str, Any]) -> None:
    """From the fused head's log-probabilities, against float64 over materialised logits."""
    assert found["gradients"][way]["largest"] > 1e-4
    assert found["gradients"][way]["difference"] < 1e-4 * found["gradients"][way]["largest"] + 1e-7


@pytest.mark.parametrize("way", TRAINED)
def test_eight_at_once_and_four_times_two_are_one_update(way: str, found: dict[str, Any]) -> None:
    assert found["updates"][way]["moved"] > 1e-5
    assert found["updates"][way]["difference"] < 1e-3 * found["updates"][way]["moved"]


def test_plain_is_the_loss_of_trl(found: dict[str, Any]) -> None:
    assert found["plain"] == pytest.approx(found["trl"], rel=1e-6)
    # TRL was given our count, which is the one that the Trainer would make.
    ours, theirs = found["counts"]["trl"]
    assert ours == theirs > 0


def test_a_head_that_takes_means_of_parts_loses_no_weight(found: dict[str, Any]) -> None:
    """The parts of a step differ in their tokens, and such a head is not told how many the others have."""
    assert found["means"] == pytest.approx(found["plain"], rel=1e-5)


def test_the_last_layer_is_told_of_few_lengths(found: dict[str, Any]) -> None:
    exact, few, asked = (found["served"][name] for name in ("exact", "few", "asked"))
    if found["backend"] == "unsloth":
        pytest.skip("under Unsloth the last layer serves every token")
    assert exact == asked
    assert few == cpu.rounded(asked) > asked


def check(backend: str) -> dict[str, Any]:
    from recipes.gemma3_12b_opercode import RECIPE
    from recipes.samples.payments import OPERATIONS
    from recipes.stages import loading, train
    from recipes.stages.base_model import model_type, settle
    from recipes.stages.run import Run

    chosen = settle(RECIPE, "tiny")
    choice = choose(model_type(RECIPE, chosen), backend, "none")  # type: ignore[arg-type]
    settings = replace(
        RECIPE.settings, **{**RECIPE.miniature, "scheduler": "constant", "warmup_ratio": 0.0, "learning_rate": 0.1}
    )
    model = loading.load_for_training(RECIPE, chosen, settings, choice)
    from transformers import Trainer

    from recipes.stages.batches import Batches, Drawn, Steps, dataset
    from recipes.stages.losses import Objective, draws
    from recipes.stages.processes import Team
    from recipes.stages.tokens import table_of
    from recipes.stages.trainer import RecipeTrainer
    from recipes.stages.validation import AnswerValidation

    learned = {name: p for name, p in model.network.named_parameters() if p.requires_grad}
    torch.manual_seed(0)
    start = {name: p.detach() + 0.02 * torch.randn_like(p) for name, p in learned.items()}

    def reset() -> None:
        with torch.no_grad():
            for name, p in learned.items():
                p.copy_(start[name])
        model.network.zero_grad()

    names = [operation.code for operation in OPERATIONS[:4]]
    classes = [c for c, size in enumerate(SIZES) for _ in range(size)]
    rendered = [
        model.renderer.example(RECIPE.to_example({"text": f"payment {i} " * (1 + i % 5), "label": names[c]}))
        for i, c in enumerate(classes)
    ]
    collate = Batches(model.tokenizer.pad_token_id)

    def trainer(balance: Balance, batch_size: int, accumulation: int, objective: bool = True) -> Any:
        reset()
        mine = replace(settings, batch_size=batch_size, accumulation=accumulation, batch_tokens=0, max_steps=1)
        watched = AnswerValidation(model, [None], 512, RECIPE.sampling, (), Path())  # type: ignore[list-item]
        run = Run(Path(tempfile.mkdtemp()))
        arguments = train.sft_arguments(mine, choice, run, 1, watched)
        arguments.eval_strategy = "no"
        arguments.optim, arguments.max_grad_norm, arguments.report_to = "sgd", 0.0, []
        arguments.weight_decay = 0.0
        return RecipeTrainer(
            run=run,
            steps=Steps(
                Drawn(classes, draws(SIZES, balance), 0), [len(r.input_ids) for r in rendered], mine, Team(0, 1), -1
            ),
            objective=Objective.of(SIZES, balance) if objective else None,
            model=model.network,
            args=arguments,
            train_dataset=dataset(table_of(rendered), classes if objective else None),
            processing_class=model.tokenizer,
            data_collator=collate,
            # The reference is TRL's own way through its loss.
            own_loss=objective,
        )

    gradients: dict[str, Any] = {}
    rows = [0, 41, 53, 58, 1, 2, 59, 42]
    for way, balance in WAYS.items():
        here = trainer(balance, 8, 1)
        batch = collate([here.train_dataset[row] for row in rows])
        tokens = (batch["labels"][:, 1:] != -100).sum(-1)
        objective = here.objective
        loss = here.compute_loss(model.network, batch, num_items_in_batch=objective.mass(tokens, batch["class"]))
        loss.backward()
        got = {name: p.grad.clone() for name, p in learned.items()}
        reset()
        logits = model.network(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
        labels = batch["labels"][:, 1:]
        chosen_logits = logits.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        per_token = (chosen_logits - logits.logsumexp(-1)) * (labels != -100)
        reference(per_token.sum(-1), tokens, batch["class"].tolist(), balance).backward()
        gradients[way] = {
            "largest": max(p.grad.abs().max().item() for p in learned.values()),
            "difference": max((p.grad - got[name]).abs().max().item() for name, p in learned.items()),
        }
    updates: dict[str, Any] = {}
    for way in TRAINED:
        balance = WAYS[way]
        after = []
        for batch_size, accumulation in ((8, 1), (2, 4)):
            trainer(balance, batch_size, accumulation).train()
            after.append({name: p.detach().clone() for name, p in learned.items()})
        updates[way] = {
            "moved": max((after[0][name] - start[name]).abs().max().item() for name in learned),
            "difference": max((after[0][name] - after[1][name]).abs().max().item() for name in learned),
        }
    losses, counts = {}, {}
    for label, ours in (("plain", True), ("trl", False), ("means", False)):
        here = trainer(Balance(), 2, 4, ours)
        if label == "means":
            # As of a head that is not told how many tokens a step has.
            here.model_accepts_loss_kwargs = False
            told = here.compute_loss
            here.compute_loss = lambda model, inputs, *_, told=told, **__: told(model, inputs)
        if label == "trl":
            (parts,), count = here.get_batch_samples(iter(here.get_train_dataloader()), 1, here.args.device)
            counts[label] = [float(count), float(Trainer._get_num_items_in_batch(here, parts, here.args.device))]
        here.train()
        losses[label] = next(log["loss"] for log in here.state.log_history if "loss" in log)
    served: dict[str, int] = {}
    down = [module for name, module in model.network.named_modules() if name.endswith("mlp.down_proj")][-1]
    for name in ("exact", "few"):
        collate.few_lengths = name == "few"
        # Of six tokens each: with eight of them nothing would be left to round.
        here = trainer(Balance(), 7, 1)
        (parts,), _ = here.get_batch_samples(iter(here.get_train_dataloader()), 1, here.args.device)
        served["asked"] = int((parts[0]["labels"][:, 1:] != -100).sum())
        hook = down.register_forward_pre_hook(
            lambda _, given, name=name: served.update({name: given[0].flatten(0, -2).shape[0]})
        )
        here.train()
        hook.remove()
    found = {"gradients": gradients, "updates": updates, "counts": counts, "served": served}
    return {"backend": backend, **found, **losses}


if __name__ == "__main__":
    print(json.dumps(check(sys.argv[1])))
