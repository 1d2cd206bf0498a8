"""The rung between Unsloth and plain PEFT, and the proof of what a backend replaced."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT, recipe

from fallback import components
from fallback.choose import CannotRun, choose
from fallback.gpu import Gpu

T4 = Gpu("T4", (7, 5), 16 * 2**30)


@pytest.fixture
def without_unsloth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(components, "probe_unsloth", lambda gpu: "it does not import: a test says so")


@pytest.mark.usefixtures("without_unsloth")
def test_auto_takes_it_where_unsloth_cannot_run() -> None:
    choice = choose("llama", gpu=T4)
    assert choice.backend == "peft+liger"
    assert "a test says so" in choice.reasons["backend"]


@pytest.mark.usefixtures("without_unsloth")
@pytest.mark.parametrize(
    ("gpu", "model_type", "reason"),
    [
        (None, "llama", "need a GPU"),
        (Gpu("GTX 1080", (6, 1), 8 * 2**30), "llama", r"7\.0, and GTX 1080 has 6\.1"),
        (T4, "gpt_neox", "no kernels for gpt_neox"),
    ],
)
def test_where_it_cannot_run_it_says_why(gpu: Gpu | None, model_type: str, reason: str) -> None:
    with pytest.raises(CannotRun, match=reason):
        choose(model_type, "peft+liger", gpu=gpu)
    stepped_down = choose(model_type, gpu=gpu)
    assert stepped_down.backend == "peft"
    assert "not peft+liger" in stepped_down.reasons["backend"]


def test_the_architectures_are_those_of_the_installed_liger() -> None:
    asked = "from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as m; print(*m)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert components.liger_types() == set(done.stdout.split())


@pytest.mark.parametrize("name", ["gemma3_1b_counsel", "llama_1b_civil", "gemma2_2b_ohlora"])
def test_liger_replaces_the_layers_of_this_model_alone(name: str) -> None:
    """The kernels need a GPU to run; that they stand in the right places shows on any machine."""
    done = subprocess.run(
        [sys.executable, __file__, name], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # The model was loaded by the backend without Liger.
    assert all(": fallback." in key for key in found["before"])
    counts = {
        kind: sum(n for key, n in found["after"].items() if kind in key) for kind in ("MLP:", "RMSNorm:", "rotary")
    }
    assert counts == {"MLP:": found["layers"], "RMSNorm:": found["norms"], "rotary": 1}
    assert found["adapted"] > 0


def check(name: str) -> None:
    from fallback import peft_liger
    from fallback.patched import patched
    from recipes.stages import loading
    from recipes.stages.base_model import model_type, settle

    chosen = settle(recipe(name), "tiny")
    choice = choose(model_type(recipe(name), chosen), "peft")
    settings = replace(recipe(name).settings, **recipe(name).miniature)
    network = loading.load_for_training(recipe(name), chosen, settings, choice).network
    before = patched(network)
    peft_liger.patch(network.get_base_model())
    modules = list(network.modules())
    print(
        json.dumps(
            {
                "before": before,
                "after": patched(network),
                "layers": network.config.num_hidden_layers,
                "norms": sum("RMSNorm" in type(module).__name__ for module in modules),
                "adapted": sum(hasattr(module, "lora_A") for module in modules),
            }
        )
    )


if __name__ == "__main__":
    check(sys.argv[1])
