"""Shared by the tests: recipes found by themselves, tokenizers and commands as a user has them."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fallback.choose import BackendName, why_not
from fallback.torch_build import usable_gpu
from recipes.stages.recipe import Recipe

# Threads that spin while they wait make a training many times slower beside other tests. What Choice.module sees to for
# commands is too late in this process, where a test has loaded torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).parents[1]
RECIPES = sorted(p.stem for p in (ROOT / "recipes").glob("*.py") if p.stem != "__init__")


def recipe(name: str) -> Recipe:
    return importlib.import_module(f"recipes.{name}").RECIPE


def need(backend: BackendName, name: str) -> None:
    """Skip, and say why, where a backend cannot run a recipe here."""
    from recipes.stages.base_model import model_type, settle

    kind = model_type(recipe(name), settle(recipe(name), "tiny"))
    if obstacle := why_not(backend, usable_gpu(), kind):
        pytest.skip(f"{backend} cannot run {name} here: {obstacle}")


def found_under(backend: str, file: str) -> Any:
    """What a test's file, run as a program, prints as JSON: no two backends' libraries go into one process."""
    done = subprocess.run(
        [sys.executable, file, backend], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": "."},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def ready_to_compare(name: str, backend: Any, quantization: Any, dtype: Any = "auto", dropout: float = 0.0) -> Any:
    """A tiny model of a recipe in training, with the loss head that ours puts in, whose LoRA is not at its start: for
    comparing losses and gradients in this process, which must be the backend's own."""
    from fallback.choose import choose
    from recipes.stages import loading
    from recipes.stages.base_model import model_type, settle

    here = recipe(name)
    chosen = settle(here, "tiny")
    settings = replace(here.settings, lora_dropout=dropout, checkpointing=False, quantization=quantization)
    choice = choose(model_type(here, chosen), backend, quantization, settings.optimizer, dtype=dtype)
    model = loading.load_for_training(here, chosen, settings, choice)
    import torch
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model.network.get_base_model())
    model.network.train()
    torch.manual_seed(0)
    for which, weight in model.network.named_parameters():
        if weight.requires_grad:
            # As RecipeTrainer keeps them.
            weight.data = weight.data.float()
        if "lora_B" in which:
            torch.nn.init.normal_(weight.data, std=0.05)
    return model


@pytest.fixture(scope="session")
def tokenizers() -> Callable[[str], Any]:
    """Recipe name -> the tokenizer that its tiny runs use."""
    from recipes.stages.base_model import ensure_files, load_tokenizer, settle

    made: dict[str, Any] = {}

    def of(name: str) -> Any:
        if name not in made:
            chosen = settle(recipe(name), "tiny")
            ensure_files(recipe(name), chosen)
            made[name] = load_tokenizer(recipe(name), chosen.source)
        return made[name]

    return of


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a module as a user does, in an empty folder of its own."""

    def run(*arguments: str, stdin: str = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run
