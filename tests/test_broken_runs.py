"""A run whose files were damaged, or come from anybody: every command names the file in one line, and nothing is taken
for what it is not."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, recipe
from test_wrong_files import refused

from recipes.stages import run as runs
from recipes.stages import train
from recipes.stages.cli import main
from recipes.stages.recipe import UserError
from recipes.stages.run import Run, read_json, write_json

Command = Callable[..., subprocess.CompletedProcess[str]]
CODES, CIVIL = "gemma3_12b_opercode", "llama_1b_civil"
JUNK = [b"", b"{", b"[]", b"{}", b"null", b"\x89PNG\r\n\x1a\n\xff", b"[" * 100_000]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of codes and one of free text."""
    folder = tmp_path_factory.mktemp("trained")
    for name in (CODES, CIVIL):
        done = subprocess.run(
            [sys.executable, "-m", f"recipes.{name}", "train", "--backend", "peft", "--max-steps", "2", "--run", name],
            cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Such a run, to be broken."""
    monkeypatch.chdir(tmp_path)

    def made(name: str) -> Path:
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree(trained / name, "run")
        return Path("run")

    return made


def answering(name: str) -> list[tuple[str, ...]]:
    return [("predict", "hello"), ("evaluate",), *([("chat",)] if name == CIVIL else [])]


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "classes.json"])
def test_what_is_no_adapter(file: str, copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    for name in (CODES, CIVIL) if file != "classes.json" else (CODES,):
        run = copy(name)
        path = run / "adapter" / file
        whole = path.read_bytes()
        # tokenizer.json and adapter_config.json that are JSON and mean nothing need the libraries to be found out.
        late = (b"{}",) if file in ("tokenizer.json", "adapter_config.json") else ()
        for content in [*(junk for junk in JUNK if junk not in late), whole[: len(whole) // 2]]:
            path.write_bytes(content)
            for stage in answering(name):
                refused(capsys, path, *stage, "--run", "run", of=recipe(name))
        path.unlink()
        if file == "adapter_config.json":
            refused(capsys, run, "predict", "hello", "--run", "run", of=recipe(name))
        else:
            refused(capsys, path, "predict", "hello", "--run", "run", of=recipe(name))


@pytest.mark.parametrize(
    "classes",
    [{"train_rows": {}, "temperature": 1.0}, {"train_rows": {"1": 2}}, {"train_rows": ["1"], "temperature": 1.0},
     {"train_rows": {"1": "x"}, "temperature": 1.0}, {"train_rows": {"1": 2}, "temperature": 0},
     {"train_rows": {"1": 2}, "temperature": "warm"}],
)  # fmt: skip
def test_classes_that_are_none(classes: Any, copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = copy(CODES) / "adapter" / "classes.json"
    write_json(path, classes)
    refused(capsys, path, "predict", "hello", "--run", "run", of=recipe(CODES))


@pytest.mark.parametrize(
    ("file", "change"),
    [("choice.json", {"backend": "warp"}), ("choice.json", {"backend": None}), ("choice.json", {"backend": ["peft"]}),
     ("choice.json", {"dtype": "warp"}), ("choice.json", {"dtype": "auto"}), ("choice.json", {"dtype": None}),
     ("training_config.json", {"settings": None}), ("training_config.json", {"settings": []}),
     ("training_config.json", {"settings": {"max_length": "long"}}),
     ("training_config.json", {"settings": {"quantization": "2bit"}}),
     ("training_config.json", {"settings": {"dtype": True}}),
     ("training_config.json", {"settings": {"lora_targets": [1]}}),
     ("training_config.json", {"base_model": "gemma"}),
     ("training_config.json", {"base_model": {"name": "x", "size": "huge", "weights": "random", "source": "x"}})],
)  # fmt: skip
def test_decisions_that_are_none(
    file: str, change: dict[str, Any], copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(CIVIL)
    write_json(run / file, {**read_json(run / file), **change})
    for stage in answering(CIVIL):
        refused(capsys, run / file, *stage, "--run", "run", of=recipe(CIVIL))
    (run / "metrics.json").unlink()
    refused(capsys, run, "train", "--resume", "--run", "run", of=recipe(CIVIL))


def test_what_only_the_libraries_find_out(copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.numpy import load_file, save_file

    def broken(path: Path, stage: tuple[str, ...], *said: str) -> None:
        with pytest.raises(SystemExit) as ended:
            main(recipe(CIVIL), [*stage, "--run", "run"])
        out = capsys.readouterr().err.strip().splitlines()
        assert ended.value.code == 2, out
        assert out[-1].startswith(f"error: {path}: "), out
        assert all(part in out[-1] for part in said), out

    predict, evaluate, talk = answering(CIVIL)
    weights = copy(CIVIL) / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = min(tensors)
    save_file({key: value for key, value in tensors.items() if key != name}, weights)
    broken(weights, predict, "1 of its", name)
    save_file({**tensors, name: tensors[name][:, :3].copy()}, weights)
    broken(weights, evaluate, "size mismatch")
    tokenizer = copy(CIVIL) / "adapter" / "tokenizer.json"
    tokenizer.write_text("{}")
    broken(tokenizer, talk)
    template = copy(CIVIL) / "adapter" / "chat_template.jinja"
    template.write_text("{% if messages")
    broken(template, predict, "TemplateSyntaxError")
    template.write_text("Hello!")
    broken(template, predict, "it leaves out what users say")


@pytest.mark.parametrize(
    ("line", "what"),
    [(b'{"text": "half', "not what was written there"), (b"[1]", "a JSON object is wanted"), (b"\xff\xfe", "codec"),
     (b"{}", "not a row of"), (b'{"text": 5, "label": null}', "not a row of"), (b"[" * 9999, "not what was written")],
)  # fmt: skip
def test_a_broken_row_is_named(line: bytes, what: str, copy: Callable[[str], Path]) -> None:
    for name in (CODES, CIVIL):
        path = copy(name) / "data" / "train.jsonl"
        lines = path.read_bytes().splitlines()
        path.write_bytes(b"\n".join([*lines[:2], line, *lines[3:]]))
        with pytest.raises(UserError, match=rf"train\.jsonl, line 3: .*{what}"):
            train.examples(recipe(name), Run(Path("run")), "train")


def test_broken_runs_through_the_commands(copy: Callable[[str], Path], command: Command) -> None:
    """`copy` and `command` share a folder."""

    def one_line(*arguments: str) -> str:
        done = command(f"recipes.{CIVIL}", *arguments, "--run", "run")
        assert done.returncode == 2, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: run/")
        return done.stderr.splitlines()[-1]

    run = copy(CIVIL)
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "adapter_model.safetensors: cannot be read" in one_line("predict", "hello")
    (run / "data" / "metadata.json").write_text('{"rows": 3}')
    assert "data/metadata.json: not what was written there" in one_line("train", "--backend", "peft")
    run = copy(CIVIL)
    with (run / "data" / "val.jsonl").open("a") as file:
        file.write('{"question": "half')
    number = len((run / "data" / "val.jsonl").read_text().splitlines())
    told = one_line("train", "--backend", "peft", "--max-steps", "1")
    assert f"data/val.jsonl, line {number}: not what was written there" in told
    # It has begun anew, and nothing of what was there before is taken for its own.
    assert not (run / "checkpoints").exists()
    told = one_line("train", "--resume", "--accept-changes")
    assert f"data/val.jsonl, line {number}: not what was written there" in told


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"settings": 3, "test": [], "train": "x"}', b"\xff"])
def test_a_table_of_runs_has_a_line_for_broken_ones(
    content: bytes, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    for file in ("training_config.json", "metrics.json", "choice.json"):
        folder = tmp_path / CIVIL / file
        folder.mkdir(parents=True)
        for other in ("training_config.json", "metrics.json", "choice.json"):
            shutil.copy(trained / CIVIL / other, folder / other)
        (folder / file).write_bytes(content)
    shutil.copytree(trained / CIVIL, tmp_path / CIVIL / "whole", ignore=shutil.ignore_patterns("data", "adapter"))
    with pytest.raises(SystemExit) as ended:
        main(recipe(CIVIL), ["runs", "--json"])
    assert ended.value.code == 0
    lines = {line["run"]: line for line in json.loads(capsys.readouterr().out)}
    assert len(lines) == 4
    assert lines["whole"]["state"] == "trained"
