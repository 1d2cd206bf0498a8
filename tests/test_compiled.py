"""Layers are compiled by Unsloth, on a CPU where it is told to, and for plain PEFT where that is asked for. Answers,
each of another shape, are not to wait for that."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from conftest import found_under, need, ready_to_compare, recipe

from fallback import compiled
from fallback.components import torch_compile
from fallback.torch_build import usable_gpu

NAMES = ("gemma3_12b_opercode", "llama_1b_civil")


@pytest.fixture(scope="module", params=["unsloth", "peft"])
def found(request: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    need(request.param, NAMES[0])
    if obstacle := torch_compile(usable_gpu()).obstacle:
        pytest.skip(f"nothing can be compiled here: {obstacle}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNSLOTH_CPU_COMPILE", "1")
        patch.setenv("UNSLOTH_COMPILE_LOCATION", str(tmp_path_factory.mktemp("compiled")))
        return found_under(request.param, __file__)


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_is_compiled(found: dict[str, dict[str, Any]], name: str) -> None:
    assert found[name]["trained"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_not(found: dict[str, dict[str, Any]], name: str) -> None:
    ways = {"scored"} if recipe(name).closed else {"decoded", "generated"}
    assert found[name].keys() == {"trained", "stances", "answer loss", *ways}
    assert [found[name][what] for what in ("answer loss", *ways)] == [0] * (1 + len(ways))
    # In every pass, whatever Unsloth's generate() does as it begins; and none of it is left behind.
    assert found[name]["stances"] == ["force_eager", "default"]


def compiled_frames(name: str, backend: str) -> dict[str, Any]:
    """What was compiled in a training step, and then by each way of looking at answers."""
    model = ready_to_compare(name, backend, "none")
    import torch
    from torch._dynamo import eval_frame
    from torch._dynamo.utils import counters

    from recipes.samples.payments import payments
    from recipes.stages.generation import by_library, generate
    from recipes.stages.likelihood import answer_loss
    from recipes.stages.recipe import Example, Message
    from recipes.stages.scoring import Codes, score

    if backend == "peft":
        compiled.teach(model.network)
    here = recipe(name)
    asked = [here.ask(text) for text, _ in payments(3, 2, seed=0)]
    items = [Example((*prompt, Message("assistant", "10101"))) for prompt in asked]
    found: dict[str, Any] = {}

    def count(what: str, do: Callable[[], Any]) -> None:
        counters.clear()
        do()
        found[what] = counters["frames"]["total"]

    seen: set[str] = set()
    network, device = model.network, model.network.device
    generates = network.generate

    def begun_anew(**given: Any) -> Any:
        torch.compiler.set_stance("default")
        return generates(**given)

    network.generate = begun_anew
    ids = torch.tensor([model.renderer.prompt(asked[0])], device=device)
    count("trained", lambda: network(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward())
    network.eval()
    layers = network.get_base_model().base_model.layers
    layers[0].register_forward_pre_hook(lambda *_: seen.add(eval_frame._stance.stance))
    if here.closed:
        codes = Codes(model.renderer, {"10101": 5, "10102": 3, "20201": 2})
        count("scored", lambda: score(model, codes, asked, 256))
    else:
        few = replace(here.sampling, temperature=0.0, max_new_tokens=4)
        count("decoded", lambda: generate(model, asked, few, here.stop, 256))
        count("generated", lambda: by_library(model, ids.tolist(), few, here.stop))
    count("answer loss", lambda: answer_loss(model, items, 256))
    found["stances"] = [*seen, eval_frame._stance.stance]
    return found


if __name__ == "__main__":
    print(json.dumps({name: compiled_frames(name, sys.argv[1]) for name in NAMES}))
