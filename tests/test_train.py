"""Steps, starts, batches, and the shape of a run."""

from itertools import pairwise

import pytest
import torch
from conftest import recipe

from recipes.stages.loading import start_lora
from recipes.stages.recipe import Settings
from recipes.stages.train import optimizer_steps
from recipes.stages.validation import answers_due, evaluations


def test_steps_as_published() -> None:
    assert optimizer_steps(5046, recipe("gemma3_1b_counsel").settings) == 6310
    assert optimizer_steps(272_066, recipe("gemma3_12b_opercode").settings) == 51_015
    assert optimizer_steps(100, Settings(max_steps=7)) == 7
    # More than the epochs come to: the Trainer begins another one.
    assert optimizer_steps(100, Settings(max_steps=7_000)) == 7_000


class Layers(torch.nn.Module):
    """Two LoRA layers whose parameters are made in an order of one's choice."""

    def __init__(self, names: list[str]):
        super().__init__()
        for name in names:
            layer = torch.nn.Module()
            layer.lora_A = torch.nn.Linear(8, 4, bias=False)
            layer.lora_B = torch.nn.Linear(4, 8, bias=False)
            self.add_module(name, layer)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_the_start_depends_on_names_and_seed_not_on_order(init: str) -> None:
    one, two, other = Layers(["q", "k"]), Layers(["k", "q"]), Layers(["q", "k"])
    torch.manual_seed(7)
    start_lora(one, Settings(lora_init=init, lora_rank=4))  # type: ignore[arg-type]
    torch.manual_seed(8)
    start_lora(two, Settings(lora_init=init, lora_rank=4))  # type: ignore[arg-type]
    start_lora(other, Settings(lora_init=init, lora_rank=4, seed=1))  # type: ignore[arg-type]
    for name in ("q", "k"):
        assert torch.equal(one.get_submodule(name).lora_A.weight, two.get_submodule(name).lora_A.weight)
        assert not torch.equal(one.get_submodule(name).lora_A.weight, other.get_submodule(name).lora_A.weight)
        assert not one.get_submodule(name).lora_B.weight.any()
    assert not torch.equal(one.q.lora_A.weight, one.k.lora_A.weight)
    spread = one.q.lora_A.weight.std().item()
    assert 0.1 < spread < 0.4


def test_validation_is_a_small_part_of_a_training() -> None:
    """A row of it costs about half of a trained one; it may come to a twentieth of them."""
    assert evaluations(9_120, 389) == 2
    assert evaluations(816_000, 400) == 20
    assert evaluations(240, 200) == 1
    for trained in (2_000, 9_000, 70_000):
        assert evaluations(trained, 80) * 80 * 0.5 <= 0.05 * trained


@pytest.mark.parametrize(
    ("steps", "every", "expected"),
    [
        (30, 30, [30]),
        (120, 18, [120]),
        (160, 20, [80, 160]),
        (400, 20, [80, 160, 240, 320, 400]),
        (1000, 400, [400, 800, 1000]),
    ],
)
def test_a_few_answers_are_written_rarely_and_at_the_end(steps: int, every: int, expected: list[int]) -> None:
    """They take as long as two steps, however few validation rows there are."""
    looked = [*range(every, steps, every), steps]
    assert [b for a, b in pairwise([0, *looked]) if answers_due(a, b, steps)] == expected
