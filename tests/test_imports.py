"""What may be imported when, and by whom."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RECIPES, ROOT

HEAVY = {
    "torch", "transformers", "trl", "peft", "unsloth", "datasets", "sklearn", "matplotlib", "numpy", "pyarrow",
    "pandas",
}  # fmt: skip


def imported_modules(source: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("name", RECIPES)
def test_importing_a_recipe_loads_no_heavy_library(name: str) -> None:
    code = f"import recipes.{name}, sys; print(sorted(set({sorted(HEAVY)!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_recipes_know_neither_each_other_nor_do_stages_know_recipes() -> None:
    recipes = {f"recipes.{name}" for name in RECIPES}
    for name in RECIPES:
        known = imported_modules((ROOT / "recipes" / f"{name}.py").read_text(encoding="utf-8"))
        assert not known & recipes, name
    for path in (ROOT / "recipes" / "stages").glob("*.py"):
        assert not imported_modules(path.read_text(encoding="utf-8")) & recipes, path.name


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_short_enough_to_read(name: str) -> None:
    assert len((ROOT / "recipes" / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 200


def test_what_nobody_asks_for_is_left_out_and_comes_back() -> None:
    code = """
import sys
from fallback import leave_out
import torch
compile = torch.compile
leave_out.the_compiler()
with leave_out.without(*leave_out.BY_TRANSFORMERS):
    from transformers import AutoModelForCausalLM
    import transformers.generation.utils, transformers.models.gemma3.modeling_gemma3, peft
print([name for name in ("sklearn", "scipy", "torchao", "torch._inductor.compile_fx") if name in sys.modules])
assert "bitsandbytes" in sys.modules and torch.compile is compile
import sklearn, scipy, torchao
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize("error", ["ImportError", "RuntimeError"])
def test_a_broken_bitsandbytes_is_the_matter_of_those_who_need_it(error: str, tmp_path: Path) -> None:
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").write_text(f"raise {error}('broken')")
    code = "import torch; kept = torch.compile; from fallback import leave_out; leave_out.the_compiler()"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; assert torch.compile is kept"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
