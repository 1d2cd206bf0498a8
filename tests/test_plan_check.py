"""The memory that plan calculates, held against what a training holds."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import RECIPES, recipe

from bench.held import most_allocated, storages
from recipes.stages import plan_report

Command = Callable[..., subprocess.CompletedProcess[str]]
# Of what is calculated for a training on a CPU.
ALLOWED = 0.05


@pytest.mark.parametrize("name", ["polyglot_1_3b_ohlora", "gemma2_2b_ohlora", "gemma3_12b_opercode"])
def test_every_term_is_within_five_percent_of_a_training(name: str, command: Command, tmp_path: Path) -> None:
    """Unquantised, with attention that is our own, and at 4 bits."""
    out = tmp_path / "check.json"
    done = command("bench", "plan", "--check", "--recipes", name, "--backends", "peft", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "activations and loss" in done.stdout
    cases = json.loads(out.read_text(encoding="utf-8"))["cases"]
    assert {(case["checkpointing"], case["rows"], case["length"]) for case in cases} == {
        (kept, rows, length) for kept in (True, False) for rows in (2, 4) for length in (64, 128)
    }
    for case in cases:
        terms = case["terms"]
        assert terms["activations_and_loss"]["measured"] > 2**20
        for name, term in terms.items():
            assert abs(term["error"]) < ALLOWED, (name, term)


@pytest.mark.parametrize("name", RECIPES)
def test_the_committed_check_is_within_it_too(name: str) -> None:
    without_a_gpu = plan_report.errors(recipe(name), plan_report.CHECKED[1:])
    for backend in ("peft", "unsloth"):
        error, where = without_a_gpu[backend]
        assert error is not None
        assert 0 < error < ALLOWED
        assert "size tiny" in where
        assert "CPU" in where
    assert without_a_gpu["peft+liger"] == (None, "never measured")


def test_what_a_gpu_said_counts_more_and_is_what_plan_prints() -> None:
    for name, backend, allowed in (
        ("llama_1b_civil", "peft", ALLOWED),
        ("llama_1b_civil", "peft+liger", ALLOWED),
        ("polyglot_1_3b_ohlora", "peft", 0.06),
        ("gemma2_2b_ohlora", "peft+liger", 0.07),
    ):
        error, where = plan_report.errors(recipe(name))[backend]
        assert error is not None
        assert error < allowed
        assert where == "size full on NVIDIA H200"
    assert "CPU" in plan_report.errors(recipe("gemma3_12b_opercode"))["peft"][1]


def test_without_a_check_there_is_no_error_to_print(tmp_path: Path) -> None:
    assert plan_report.errors(recipe(RECIPES[0]), [tmp_path / "absent.json"])["peft"] == (None, "never measured")


def test_the_allocator_s_record_is_summed_in_order_of_time() -> None:
    def event(name: str, when: int, size: int) -> SimpleNamespace:
        return SimpleNamespace(name=lambda: name, start_ns=lambda: when, nbytes=lambda: size)

    events = [
        event("[memory]", 3, -100),
        event("[memory]", 1, 100),
        event("aten::add", 2, 999),
        event("[memory]", 4, 60),
    ]
    results = SimpleNamespace(events=lambda: events)
    assert most_allocated(SimpleNamespace(profiler=SimpleNamespace(kineto_results=results))) == 100


def test_a_storage_counts_once_however_many_tensors_look_at_it() -> None:
    import torch

    a = torch.empty(256)
    assert storages([a, a[10:], a.view(16, 16)]) == 1024
    assert storages([a, a.clone()]) == 2048


def test_what_an_optimiser_pages_is_held_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes keeps it in memory that torch calls the host's, and that the GPU takes as its own."""
    import torch

    from bench.held import Held

    paged, on_host = torch.empty(1000), torch.empty(10)
    paged.is_paged = True
    held = Held([(1, 1)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    held._after_update(SimpleNamespace(state={"p": {"state1": paged, "step": on_host}}))
    assert held.terms["optimizer"] == held.paged == 4000
