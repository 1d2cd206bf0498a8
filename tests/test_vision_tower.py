"""The published Gemma 3 12B has a vision tower; its text must train all the same, and nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, need

from fallback.choose import BACKENDS

MAKE = """
import sys, torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration
from recipes.gemma3_12b_opercode import RECIPE
from recipes.stages.base_model import ensure_files, load_tokenizer, settle
chosen = settle(RECIPE, "tiny")
ensure_files(RECIPE, chosen)
tokenizer = load_tokenizer(RECIPE, chosen.source)
torch.manual_seed(0)
text = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=32, vocab_size=len(tokenizer), initializer_range=0.1)
vision = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28,
              patch_size=14)
model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, image_token_index=7))
model.save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
"""


PARTS = """
import sys
from transformers import AutoModelForCausalLM
from recipes.stages import last_layer
network = AutoModelForCausalLM.from_pretrained(sys.argv[1])
names = {module: name for name, module in network.named_modules()}
for part in last_layer.parts(network):
    assert ".1." in names[part] and "language_model" in names[part], names[part]
    print(names[part].rpartition(".")[2])
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tower") / "model"
    subprocess.run([sys.executable, "-c", MAKE, str(folder)], cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
def test_text_trains_and_the_tower_does_not(backend: str, checkpoint: Path, tmp_path: Path) -> None:
    need(backend, "gemma3_12b_opercode")
    done = subprocess.run(
        [
            sys.executable, "-m", "recipes.gemma3_12b_opercode", "--size", "full", "--model", str(checkpoint),
            "--backend", backend, "--run", str(tmp_path / "run"), "--max-steps", "12", "--learning-rate", "0.01",
            "--batch-size", "8", "--accumulation", "1", "--dtype", "float32",
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]
    from safetensors import safe_open

    with safe_open(tmp_path / "run" / "adapter" / "adapter_model.safetensors", "pt") as adapter:
        names = list(adapter.keys())
    assert any("language_model" in name for name in names)
    assert not any("vision" in name for name in names)
    if backend != "peft":
        return
    asked = subprocess.run(
        [sys.executable, "-c", PARTS, str(checkpoint)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    # The last layer that is spared work is the text's.
    assert asked.stdout.split() == ["q_proj", "o_proj", "mlp"], asked.stderr
    merged = subprocess.run(
        [
            sys.executable, "-m", "recipes.gemma3_12b_opercode", "export", "merged", "--run", str(tmp_path / "run"),
            "--out", str(tmp_path / "model"),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert merged.returncode == 0, merged.stdout + merged.stderr
    with (
        safe_open(checkpoint / "model.safetensors", "pt") as before,
        safe_open(tmp_path / "model" / "model.safetensors", "pt") as after,
    ):
        assert set(before.keys()) == set(after.keys())
        tower = [name for name in before.keys() if "vision" in name]  # noqa: SIM118
        assert tower
        assert all(before.get_tensor(name).equal(after.get_tensor(name)) for name in tower)
