"""train --compile: the same training, told what it is worth, and where it cannot be had."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, need
from test_resume import killed_at, learned, weights

from fallback import compiled
from fallback.choose import Choice, choose
from fallback.components import cxx, torch_compile
from recipes.stages.run import read_json

Command = Callable[..., Any]
TRAIN = ("train", "--backend", "peft", "--size", "tiny", "--max-steps", "6", "--early-stopping", "off")


@pytest.fixture(scope="module", autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What is compiled here, and not before."""
    if obstacle := torch_compile(None).obstacle:
        pytest.skip(f"nothing can be compiled here: {obstacle}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        yield


@pytest.mark.parametrize(
    ("name", "more", "apart"),
    [
        ("gemma3_12b_opercode", ("--eval-rows", "12"), 1e-3),
        # With NEFTune, whose noise must be what it is without.
        ("llama_1b_civil", (), 1e-3),
        ("polyglot_1_3b_ohlora", (), 1e-3),
        ("gemma2_2b_ohlora", ("--dtype", "bfloat16", "--checkpointing"), 3e-2),
    ],
)
def test_it_is_the_same_training(
    name: str, more: tuple[str, ...], apart: float, command: Command, tmp_path: Path
) -> None:
    need("peft", name)
    runs = {flag: tmp_path / flag for flag in ("--compile", "--no-compile")}
    for flag, run in runs.items():
        done = command(f"recipes.{name}", *TRAIN, "--lora-dropout", "0", *more, flag, "--run", str(run))
        assert done.returncode == 0, done.stderr
        assert ("compiled and tried out in " in done.stdout) == (flag == "--compile")
        assert bool(re.search(r"patched: .*Layer: torch.compile \(1\)", done.stdout)) == (flag == "--compile")
    for one, other in zip(*map(learned, runs.values()), strict=True):
        assert one == pytest.approx(other, rel=apart)
    one, other = (read_json(run / "metrics.json")["train"] for run in runs.values())
    assert one["compiled"].keys() == {"seconds", "step_seconds", "step_seconds_as_written"}
    assert "compiled" not in other
    # Steps that were taken to see how long they take are none of the training's.
    for name in ("supervised_tokens", "padded_tokens", "forward_passes", "optimizer_steps"):
        assert one[name] == other[name]


def test_resumed_it_is_what_it_would_have_been(command: Command, tmp_path: Path) -> None:
    begin = ("recipes.llama_1b_civil", *TRAIN, "--compile", "--checkpoint-minutes", "0", "--neftune-alpha", "5")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert command(*begin, "--lora-dropout", "0.1", "--run", str(whole)).returncode == 0
    killed_at(
        command, tmp_path, "recipes.stages.checkpoint:_flush:14", *begin, "--lora-dropout", "0.1", "--run", str(cut)
    )
    go_on = ("recipes.llama_1b_civil", "train", "--resume", "--run", str(cut))
    refused = command(*go_on, "--no-compile")
    assert refused.returncode == 2
    assert "compile: True -> False" in refused.stderr
    # It cannot take what the others compiled, and has to compile the same.
    done = command(*go_on, env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "nothing")})
    assert done.returncode == 0, done.stderr
    assert learned(cut) == learned(whole)
    assert weights(cut) == weights(whole)


def test_a_compiler_that_fails_is_an_error_of_one_line(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "nothing"))
    monkeypatch.setenv("CXX", "/bin/false")
    done = command("recipes.llama_1b_civil", *TRAIN, "--compile", "--run", str(tmp_path / "run"))
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: --compile: the compiler failed (")
    assert last.endswith("libraries.log; train with --no-compile")
    assert "/bin/false" in (tmp_path / "run" / "logs" / "libraries.log").read_text()


def test_ctrl_c_while_it_compiles(tmp_path: Path) -> None:
    """A terminal sends it to the C++ compiler too."""
    process = subprocess.Popen(
        [sys.executable, "-m", "recipes.llama_1b_civil", *TRAIN, "--compile", "--run", "run"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # A shell has it ignored in what it runs in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1",
             "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while not any(map(compiles, psutil.Process(process.pid).children(recursive=True))):
            assert process.poll() is None, "it ended, and no C++ compiler was seen"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        said, complaints = process.communicate(timeout=300)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, complaints
    assert "stopped before step 1" in complaints or "stopped while layers were compiled" in complaints
    assert "Traceback" not in complaints + said


def compiles(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.name() in (Path(str(cxx())).resolve().name, "g++", "c++", "cc1plus", "clang++")
    return False


def choice(**others: Any) -> Choice:
    return replace(choose("llama", "peft", gpu=None), **others)


def test_without_a_cpp_compiler_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert "it needs a C++ compiler (apt-get install g++)" in str(compiled.obstacle(choice()))
    monkeypatch.delenv("CXX")
    assert compiled.obstacle(choice()) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "it needs a C++ compiler" in str(compiled.obstacle(choice()))


def test_every_kind_of_processor_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folders = []
    for flags in ("avx2", "avx2 avx512f"):
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
        monkeypatch.setattr("fallback.cpu.CPUINFO", tmp_path / "cpuinfo")
        for name in ("TORCHINDUCTOR_CACHE_DIR", "CXX"):
            # Set first, or what get_ready sets would stay.
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        compiled.get_ready()
        folders.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folders[0] != folders[1]
    assert {Path(folder).parent for folder in folders} == {compiled.CACHE}
    assert os.environ["CXX"] == cxx()


def test_where_it_cannot_be_had(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert compiled.obstacle(choice()) is None
    assert "take --backend peft" in str(compiled.obstacle(choice(backend="unsloth")))
    assert "on a GPU nobody has tried it" in str(compiled.obstacle(choice(backend="unsloth", device="cuda")))
    several = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    done = command(
        "recipes.llama_1b_civil",
        *TRAIN,
        "--compile",
        env=dict(zip(several, ("0", "0", "2", "localhost", "1"), strict=True)),
    )
    assert done.returncode == 2
    assert "--compile: nobody has tried it with several processes" in done.stderr
    need("unsloth", "llama_1b_civil")
    done = command("recipes.llama_1b_civil", "train", "--backend", "unsloth", "--compile", "--run", str(tmp_path / "r"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --compile: it is for plain PEFT, and this is unsloth")
    assert not (tmp_path / "r").exists()


def test_a_long_training_is_told_of_it() -> None:
    assert "--compile" in compiled.advice(choice(), 3600)
    assert compiled.advice(choice(), 600) == ""
    assert compiled.advice(choice(device="cuda"), 3600) == ""


def test_what_it_is_worth_is_said() -> None:
    need("peft", "llama_1b_civil")
    from recipes.stages.compiling import told

    assert told(30, 1.0, 0.9, 1000).endswith("paid back after 300 of 1,000 steps, and 70 s saved in all")
    assert told(30, 1.0, 0.9, 100).endswith("that would be paid back after 300 steps, and there are 100")
    assert told(30, 1.0, 1.1, 100).endswith("nothing is gained by --compile here")
