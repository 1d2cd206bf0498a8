"""Unsloth compiles layers, on a CPU where it is told to. Answers, each of another shape, are not to wait for that."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from conftest import found_under, need, ready_to_compare, recipe

NAMES = ("gemma3_12b_opercode", "llama_1b_civil")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    need("unsloth", NAMES[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNSLOTH_CPU_COMPILE", "1")
        patch.setenv("UNSLOTH_COMPILE_LOCATION", str(tmp_path_factory.mktemp("compiled")))
        return found_under("unsloth", __file__)


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_is_compiled(found: dict[str, dict[str, int]], name: str) -> None:
    assert found[name]["trained"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_not(found: dict[str, dict[str, int]], name: str) -> None:
    assert {what: frames for what, frames in found[name].items() if what != "trained"} == {
        "scored" if recipe(name).closed else "generated": 0,
        "answer loss": 0,
    }


def compiled_frames(name: str) -> dict[str, int]:
    """What was compiled in a training step, and then by each way of looking at answers."""
    model = ready_to_compare(name, "unsloth", "none")
    import torch
    from torch._dynamo.utils import counters

    from recipes.samples.payments import payments
    from recipes.stages.generation import generate
    from recipes.stages.likelihood import answer_loss
    from recipes.stages.recipe import Example, Message
    from recipes.stages.scoring import Codes, score

    here = recipe(name)
    asked = [here.ask(text) for text, _ in payments(3, 2, seed=0)]
    items = [Example((*prompt, Message("assistant", "10101"))) for prompt in asked]
    found: dict[str, int] = {}

    def count(what: str, do: Callable[[], Any]) -> None:
        counters.clear()
        do()
        found[what] = counters["frames"]["total"]

    ids = torch.tensor([model.renderer.prompt(asked[0])])
    count("trained", lambda: model.network(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward())
    model.network.eval()
    if here.closed:
        codes = Codes(model.renderer, {"10101": 5, "10102": 3, "20201": 2})
        count("scored", lambda: score(model, codes, asked, 256))
    else:
        count("generated", lambda: generate(model, asked, here.sampling, here.stop, 256))
    count("answer loss", lambda: answer_loss(model, items, 256))
    return found


if __name__ == "__main__":
    print(json.dumps({name: compiled_frames(name) for name in NAMES}))
