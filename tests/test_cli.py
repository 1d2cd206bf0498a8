"""What a user types, right and wrong."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import RECIPES, ROOT, recipe

from fallback.cards import card
from fallback.gpu import Gpu
from recipes.stages.cli import preset_for, run_command
from recipes.stages.fine_tune import without
from recipes.stages.recipe import UserError

Command = Callable[..., subprocess.CompletedProcess[str]]
OPERCODE = "recipes.gemma3_12b_opercode"


def refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """One clear line on standard error, an exit code, no traceback."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize(
    "command", ["recipes.gemma3_12b_opercode runs", "recipes.gemma3_12b_opercode sample", "bench list", "fallback"]
)
def test_who_reads_no_further_is_told_nothing(command: str, tmp_path: Path) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        stdout=writes,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=env,
    )
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("name", RECIPES)
def test_help(name: str, command: Command) -> None:
    done = command(f"recipes.{name}", "--help")
    assert done.returncode == 0
    for stage in ("prepare", "train", "evaluate", "predict", *(() if recipe(name).closed else ("chat",))):
        assert f"recipes.{name} {stage}" in done.stdout


def test_help_of_a_stage_comes_from_the_docstrings(command: Command) -> None:
    done = command(OPERCODE, "train", "--help")
    assert done.returncode == 0
    text = " ".join(done.stdout.replace("│", " ").split())
    assert "Peak learning rate." in text
    assert "--text-column" in text


def test_presets_are_the_defaults_that_help_shows(command: Command) -> None:
    done = command("recipes.llama_1b_civil", "train", "--preset", "quality", "--size", "full", "--help")
    text = " ".join(done.stdout.replace("│", " ").split())
    assert "(default: 5e-05)" in text


def test_missing_file(command: Command, tmp_path: Path) -> None:
    refused(command(OPERCODE, "prepare", "--source", "none.csv"), "none.csv", "no such file", "--source")
    assert not (tmp_path / "runs").exists()


def test_missing_column_names_those_found(command: Command, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("Text,Code\nx,1\n")
    refused(command(OPERCODE, "prepare", "--source", "a.csv"), "PaymentComment", "'Text', 'Code'")


def test_columns_can_be_named(command: Command, tmp_path: Path) -> None:
    rows = "".join(f"{i} pay;{i % 2}\n" for i in range(60))
    (tmp_path / "a.csv").write_text("Text;Code\n" + rows)
    done = command(OPERCODE, "prepare", "--source", "a.csv", "--text-column", "Text", "--label-column", "Code")
    assert done.returncode == 0, done.stderr
    assert "60 rows" in done.stdout


def test_empty_file(command: Command, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("")
    refused(command(OPERCODE, "train", "--source", "a.csv"), "a.csv", "empty")
    assert not (tmp_path / "runs").exists()


def test_unknown_preset_and_stage(command: Command) -> None:
    refused(command("recipes.llama_1b_civil", "train", "--preset", "best"), "best", "balanced")
    refused(command(OPERCODE, "trian"), "trian", "train")


def test_a_backend_that_cannot_run(command: Command, tmp_path: Path) -> None:
    done = command(OPERCODE, "--backend", "unsloth", env={"UNSLOTH_DISABLE_CPU_FALLBACK": "1"})
    refused(done, "--backend unsloth cannot run here", "UNSLOTH_DISABLE_CPU_FALLBACK", "--backend peft")
    assert not (tmp_path / "runs").exists()


def test_a_card_that_stays_idle_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("fallback.torch_build", "fallback.choose", "recipes.stages.cli", "recipes.stages.fine_tune"):
        monkeypatch.setattr(f"{module}.read_gpu", lambda: card("Tesla K40:3.5:12"))
    with pytest.raises(UserError, match=r"none\.csv"):
        run_command(recipe("llama_1b_civil"), ["train", "--backend", "peft", "--source", "none.csv"])
    printed = capsys.readouterr().out
    assert "size tiny" in printed
    assert "everything runs on the CPU: torch" in printed
    assert "has no kernels for Tesla K40, compute capability 3.5" in printed


def test_answering_needs_a_trained_run(command: Command) -> None:
    refused(command(OPERCODE, "predict", "hello"), "no finished run", "train")
    refused(command(OPERCODE, "evaluate", "--run", "nowhere"), "nowhere", "no such folder")


def test_an_empty_question(command: Command) -> None:
    refused(command(OPERCODE, "predict", " "), "empty")


def test_show_prints_what_carries_loss(command: Command) -> None:
    done = command("recipes.gemma3_1b_counsel", "prepare", "--show", "1")
    assert done.returncode == 0, done.stderr
    assert "<start_of_turn>model\n「" in done.stdout
    assert "<end_of_turn>」" in done.stdout
    assert "of them carry loss" in done.stdout


def test_fallback_says_what_is_here(command: Command) -> None:
    done = command("fallback")
    assert done.returncode == 0, done.stderr
    assert "backend" in done.stdout
    assert "dtype" in done.stdout


def test_sample_is_the_same_bytes_for_the_same_seed(command: Command, tmp_path: Path) -> None:
    for out, seed in (("a.csv", "3"), ("b.csv", "3"), ("c.csv", "4")):
        done = command(OPERCODE, "sample", "--rows", "900", "--classes", "20", "--seed", seed, "--out", out)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert (tmp_path / "a.csv").read_bytes() != (tmp_path / "c.csv").read_bytes()
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == 900
    impossible = command(OPERCODE, "sample", "--classes", "99")
    assert impossible.returncode == 2
    assert "classes must lie between 1 and 86" in impossible.stderr


def test_inputs_that_will_be_cut_are_counted_before_training(command: Command, tmp_path: Path) -> None:
    long = "".join(f'"{"payment for goods " * 250}{i}",{i % 2}\n' for i in range(12))
    short = "".join(f"payment {i},{i % 2}\n" for i in range(60))
    (tmp_path / "pay.csv").write_text("PaymentComment,OperCode\n" + long + short, encoding="utf-8")
    # --show has the tokenizer made, by whose tokens is counted the second time.
    first = command(OPERCODE, "prepare", "--source", "pay.csv", "--size", "tiny", "--show", "1")
    assert first.returncode == 0, first.stderr
    second = command(OPERCODE, "prepare", "--source", "pay.csv", "--size", "tiny", "--run", "r")
    assert "12 inputs are longer than --max-length 512 and will be cut" in second.stdout
    cut = json.loads((tmp_path / "r" / "data" / "metadata.json").read_text())["cut"]
    assert cut["texts"] == 12
    assert cut["longest_over"] > 20


@pytest.mark.parametrize(
    ("memory", "preset"),
    [(8, "12gb"), (11.75, "12gb"), (12, "12gb"), (15.7, "16gb"), (16, "16gb"), (24, "24gb"), (80, "24gb")],
)
def test_the_preset_follows_from_the_memory(memory: float, preset: str) -> None:
    gpu = Gpu("some card", (8, 6), int(memory * 2**30))
    assert preset_for(recipe("gemma3_12b_opercode"), gpu) == preset
    assert preset_for(recipe("gemma3_12b_opercode"), None) is None
    assert preset_for(recipe("llama_1b_civil"), gpu) is None


def test_presets_of_the_payments() -> None:
    chosen = recipe("gemma3_12b_opercode")
    for name, expected in {"12gb": (1, 16, 384, 16), "16gb": (2, 8, 512, 16), "24gb": (4, 4, 512, 32)}.items():
        s = replace(chosen.settings, **chosen.presets[name])
        assert (s.batch_size, s.accumulation, s.max_length, s.lora_rank) == expected
        assert s.batch_size * s.accumulation == 16


def test_a_closed_set_has_no_chat(command: Command) -> None:
    done = command(OPERCODE, "chat")
    assert done.returncode == 2
    assert "has no stage 'chat'" in done.stderr


def test_a_command_given_again_keeps_what_is_not_replaced() -> None:
    given = [
        "train",
        "--source",
        "a.csv",
        "--batch_size=8",
        "--epochs",
        "2",
        "--no-checkpointing",
        "--run",
        "r",
        "--resume",
    ]
    assert without(given, ("--run", "--batch-size", "--resume")) == ["train", "--epochs", "2", "--no-checkpointing"]
