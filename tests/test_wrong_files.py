"""Every command with a file that is not what it wants: one line that names it, exit code 2, no traceback."""

import os
import shutil
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT, recipe

from bench.__main__ import dispatch
from recipes.stages import run as runs
from recipes.stages.cli import as_command, main
from recipes.stages.memory import read_items
from recipes.stages.predict import to_file
from recipes.stages.recipe import UserError
from recipes.stages.run import write_json

WRONG = ["directory", "picture", "missing", "empty", "nul", "pipe"]
OPERCODE, COUNSEL, CIVIL, PERSONA = map(
    recipe, ("gemma3_12b_opercode", "gemma3_1b_counsel", "llama_1b_civil", "polyglot_1_3b_ohlora")
)


@pytest.fixture
def wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    monkeypatch.setattr(runs, "ROOT", tmp_path / "runs")
    path = tmp_path / "wrong file"
    if request.param == "directory":
        path.mkdir()
    elif request.param == "picture":
        shutil.copy(ROOT / "results" / "balance" / "balance.png", path)
    elif request.param == "pipe":
        os.mkfifo(path)
    elif request.param != "missing":
        path.write_bytes({"empty": b"", "nul": b"\0" * 4096}[request.param])
    return path


def refused(capsys: pytest.CaptureFixture[str], path: Path, *arguments: str, of: object = OPERCODE) -> None:
    do = partial(as_command, dispatch) if of == "bench" else partial(main, of)
    with pytest.raises(SystemExit) as ended:
        do(arguments)  # type: ignore[operator]
    said = capsys.readouterr().err.strip()
    assert ended.value.code == 2
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1, said
    assert str(path) in said


@pytest.mark.parametrize("wrong", WRONG, indirect=True)
def test_wrong_files(wrong: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for one in (OPERCODE, COUNSEL, CIVIL, PERSONA):
        refused(capsys, wrong, "prepare", "--source", str(wrong), of=one)
    refused(capsys, wrong, "train", "--source", str(wrong), "--backend", "peft", "--size", "tiny", of=COUNSEL)
    refused(capsys, wrong, "train", "--model", str(wrong), "--size", "full")
    if not wrong.is_fifo():
        refused(capsys, wrong, "memory", "--memory", str(wrong), of=PERSONA)
    for stage in ("evaluate", "predict", "chat"):
        refused(capsys, wrong, stage, "--run", str(wrong), *(("text",) * (stage == "predict")), of=CIVIL)
    refused(capsys, wrong, "report", str(wrong), of="bench")
    refused(capsys, wrong, "diff", str(wrong), str(wrong), of="bench")
    refused(capsys, wrong, "compare", "--resume", str(wrong), of="bench")
    with pytest.raises(UserError, match="wrong file"):
        to_file(wrong, tmp_path / "out.csv", "text", ["answer"], lambda texts: [], {})
    if not wrong.is_dir() and wrong.exists():
        refused(capsys, wrong, "prepare", "--run", str(wrong))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("out", ["nowhere/out.csv", "."])
def test_a_place_where_no_answers_can_go_is_refused_before_anything_is_answered(out: str, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("text\na\n")
    with pytest.raises(UserError, match=r"--out .*: no file can be there"):
        to_file(tmp_path / "in.csv", tmp_path / out, "text", ["answer"], lambda texts: 1 / 0, {})  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\x89PNG\r\n\x1a\n\xff", b"[" * 100_000])
def test_a_run_whose_files_are_broken(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = tmp_path / "run" / "adapter"
    adapter.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_bytes(b"{}")
    base = {"name": "x", "size": "tiny", "weights": "random", "source": "x"}
    whole = {
        "training_config.json": {"base_model": base, "settings": {}},
        "choice.json": {"backend": "peft", "dtype": "float32"},
    }
    for broken in whole:
        for name, value in whole.items():
            write_json(tmp_path / "run" / name, value)
        (tmp_path / "run" / broken).write_bytes(content)
        refused(capsys, Path("run"), "evaluate", "--run", "run", of=CIVIL)


@pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not bind root")
def test_a_file_that_may_not_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.csv"
    path.write_text("x")
    path.chmod(0)
    refused(capsys, path, "prepare", "--source", str(path))
    with pytest.raises(UserError, match="Permission denied"):
        read_items(path)
