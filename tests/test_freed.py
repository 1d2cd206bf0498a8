"""When a model is loaded to answer with, the one that was trained is gone: many a card has room for one."""

import gc
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, found_under

from fallback import leave_out

NAME = "gemma3_12b_opercode"
FLAGS = ("--size", "tiny", "--backend", "peft", "--max-steps", "5", "--eval-rows", "12", "--early-stopping", "off")


@pytest.mark.parametrize("way", ["command", "compare", "classify"])
def test_one_model_at_a_time(way: str) -> None:
    assert found_under(way, __file__) == {"passed over": True, "while training": 1, "before answering": 0}


def test_nobody_else_s_objects_are_passed_over() -> None:
    """In a notebook the collector is not ours to speak to."""
    for ours in (False, True):
        said = "leave_out.the_process_is_ours()" if ours else "pass"
        code = f"import gc; from fallback import leave_out; {said}\nwith leave_out.without(): import torch\n"
        done = subprocess.run(
            [sys.executable, "-c", code + "print(gc.get_freeze_count())"], cwd=ROOT, capture_output=True, text=True
        )
        assert (int(done.stdout) > 0) == ours, done.stderr


def models_seen(way: str, folder: Path) -> dict[str, int]:
    """How many trainable models are there, when steps are taken and when another is about to be loaded."""
    from recipes.stages import loading, tokens

    found: dict[str, int] = {}

    def count() -> int:
        from peft import PeftModel

        # What is passed over is not listed.
        gc.unfreeze()
        return sum(isinstance(one, PeftModel) for one in gc.get_objects())

    def before(when: str, do: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            found.setdefault("passed over", gc.get_freeze_count() > 0)
            found[when] = count()
            return do(*args, **kwargs)

        return counted

    loading.load_to_answer = before("before answering", loading.load_to_answer)
    tokens.tokens_of = before("while training", tokens.tokens_of)
    recipe = importlib.import_module(f"recipes.{NAME}").RECIPE
    if way == "command":
        from recipes.stages.cli import main

        with pytest.raises(SystemExit):
            main(recipe, [*FLAGS, "--run", str(folder)])
    elif way == "classify":
        leave_out.the_process_is_ours()
        from bench.classify import main as classify

        classify(["--size", "tiny", "--steps", "5", "--classes", "4", "--texts", "8", "--repeats", "1"])
    else:
        leave_out.the_process_is_ours()
        from bench.case import Case
        from bench.turns import Turns
        from bench.worker import measure

        measure(Case(NAME, "peft", "peft", 0, FLAGS, warmup=1), recipe, folder, Turns())
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as where:
        seen = models_seen(sys.argv[1], Path(where))
    print(json.dumps(seen))
