"""What a user types, right and wrong."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import RECIPES

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


@pytest.mark.parametrize("name", RECIPES)
def test_help(name: str, command: Command) -> None:
    done = command(f"recipes.{name}", "--help")
    assert done.returncode == 0
    for stage in ("prepare", "train", "evaluate", "predict", "chat"):
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
