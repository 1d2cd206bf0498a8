"""The plain path, whole commands, on a machine whose Triton is broken or missing."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

Command = Callable[..., subprocess.CompletedProcess[str]]
BROKEN = {"triton/__init__.py": "raise RuntimeError('this Triton was built for another machine')\n"}
# Loads, and fails at the first kernel: as below compute capability 7.0.
USELESS = {
    "sitecustomize.py": """
import triton.runtime.jit
def launch(*given, **named):
    raise RuntimeError("a Triton kernel was launched")
triton.runtime.jit.JITFunction.run = launch
"""
}
MISSING = {
    "sitecustomize.py": """
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "triton" else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""
}


@pytest.mark.parametrize("files", [BROKEN, USELESS, MISSING], ids=["broken", "useless", "missing"])
def test_plain_peft_trains_without_triton(files: dict[str, str], command: Command, tmp_path: Path) -> None:
    for name, code in files.items():
        path = tmp_path / "first" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    done = command(
        "recipes.llama_1b_civil", "train", "--backend", "peft", "--size", "tiny", "--max-steps", "4", "--run", "r",
        env={"PYTHONPATH": f"{tmp_path / 'first'}:{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "r" / "steps.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    choice = json.loads((tmp_path / "r" / "choice.json").read_text())
    assert (choice["backend"], choice["triton"]) == ("peft", False)
    assert (tmp_path / "r" / "adapter" / "adapter_model.safetensors").is_file()
