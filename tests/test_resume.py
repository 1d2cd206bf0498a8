"""Nothing that was paid for is lost: a training that was killed goes on, to the last bit where it would have been."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, recipe

from fallback.choose import Choice
from recipes.stages import checkpoint, crash, resume
from recipes.stages import run as runs
from recipes.stages.fine_tune import backends_that_died, offer_to_resume
from recipes.stages.prepare import SAMPLES
from recipes.stages.recipe import UserError
from recipes.stages.run import Run, read_json, read_jsonl, replacing_folder, write_json

Command = Callable[..., subprocess.CompletedProcess[str]]
# Everything that could make a difference: a sampler, a rule to stop by, noise from a random generator.
HARD = {
    "gemma3_12b_opercode": (
        "unsloth", "--sampler", "weighted", "--neftune-alpha", "5", "--max-steps", "60", "--eval-rows", "24",
        "--early-stopping", "patience=1,min_delta=0.01,watch=validation",
    ),
    "gemma3_1b_counsel": ("peft", "--max-steps", "8"),
    "llama_1b_civil": ("unsloth", "--max-steps", "8", "--neftune-alpha", "5"),
    "polyglot_1_3b_ohlora": ("unsloth", "--max-steps", "8"),
    "gemma2_2b_ohlora": (
        "peft", "--max-steps", "8", "--early-stopping", "patience=3,min_delta=9,watch=train", "--log-every", "1",
    ),
}  # fmt: skip
# A process that kills itself with SIGKILL when the function is called for the n-th time, as a power cut would.
KILL = """
import importlib, os, signal
module, name, count = os.environ["KILL_AT"].split(":")
module = importlib.import_module(module)
owner, _, last = name.rpartition(".")
owner = getattr(module, owner) if owner else module
real, left = getattr(owner, last), [int(count)]
def deadly(*args, **kwargs):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(owner, last, deadly)
"""


def weights(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def learned(run: Path) -> list[Any]:
    return [(step["loss"], step["grad_norm"], step["learning_rate"]) for step in read_jsonl(run / "steps.jsonl")]


def killed_at(command: Command, tmp_path: Path, where: str, *arguments: str) -> None:
    (tmp_path / "deadly").mkdir(exist_ok=True)
    (tmp_path / "deadly" / "sitecustomize.py").write_text(KILL)
    done = command(*arguments, env={"KILL_AT": where, "PYTHONPATH": f"{tmp_path / 'deadly'}:{ROOT}"})
    assert done.returncode == -signal.SIGKILL, (where, done.stdout, done.stderr)


@pytest.mark.parametrize("name", HARD)
def test_killed_and_resumed_is_never_killed(name: str, command: Command, tmp_path: Path) -> None:
    backend, *flags = HARD[name]
    begin = (f"recipes.{name}", "train", "--backend", backend, "--checkpoint-minutes", "0", *flags)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert command(*begin, "--run", str(whole)).returncode == 0

    go_on = (f"recipes.{name}", "train", "--resume", "--run", str(cut))
    # In the writing of a checkpoint, which flushes six times: the second of the third step's.
    killed_at(command, tmp_path, "recipes.stages.checkpoint:_flush:14", *begin, "--run", str(cut))
    assert checkpoint.step_of(checkpoint.newest(Run(cut))[0]) == 2
    if name == "gemma3_12b_opercode":
        killed_at(command, tmp_path, "recipes.stages.validation:ClassValidation.__call__:1", *go_on)
        # While the best adapter so far is being replaced by a better one.
        killed_at(command, tmp_path, "recipes.stages.run:_exchange:1", *go_on)
        assert (cut / "adapter" / "adapter_config.json").is_file()
    if name == "llama_1b_civil":
        # In the final save.
        killed_at(command, tmp_path, "recipes.stages.train:save_adapter:1", *go_on)

    done = command(*go_on)
    assert done.returncode == 0, done.stderr
    assert learned(cut) == learned(whole)
    assert weights(cut) == weights(whole)
    assert not (cut / "checkpoints").exists()
    same = ("optimizer_steps", "supervised_tokens", "final_loss", "kept_step", "stopped_early_at")
    one, other = (read_json(run / "metrics.json")["train"] for run in (whole, cut))
    assert {key: one[key] for key in same} == {key: other[key] for key in same}
    assert other["resumed_from_step"] > 0
    if name != "gemma3_12b_opercode":
        answers = [(run / "logs" / "answers.jsonl").read_text() for run in (whole, cut)]
        assert answers[0]
        assert answers[0] == answers[1]
    steps = [line["step"] for line in read_jsonl(cut / "validation.jsonl")]
    assert steps == sorted(set(steps)) == [line["step"] for line in read_jsonl(whole / "validation.jsonl")]


CIVIL = ("recipes.llama_1b_civil", "train")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """A training that was asked to stop after a few steps: its folder, its exit code, what it said."""
    folder = tmp_path_factory.mktemp("stopped")
    process = subprocess.Popen(
        [sys.executable, "-m", *CIVIL, "--backend", "peft", "--max-steps", "400", "--checkpoint-minutes", "0",
         "--early-stopping", "off", "--run", "run"],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    record = folder / "run" / "steps.jsonl"
    deadline = time.monotonic() + 120
    while not (record.is_file() and record.read_text().count("\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.02)
    second = subprocess.run(
        [sys.executable, "-m", *CIVIL, "--resume", "--run", "run"],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert second.returncode == 2
    assert f"process {process.pid} is training there" in second.stderr
    data = folder / "run" / "data" / "train.jsonl"
    before = data.stat().st_ino, data.read_bytes()
    for others in (["prepare", "--seed", "7"], ["train", "--backend", "peft", "--source", SAMPLES / "civil.csv"]):
        other = subprocess.run(
            [sys.executable, "-m", CIVIL[0], *others, "--run", "run"],
            cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert other.returncode == 2, other.stdout
        assert f"process {process.pid} is training there" in other.stderr
    assert (data.stat().st_ino, data.read_bytes()) == before
    assert not list((folder / "run").glob(".data.making*"))
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    return folder, process.returncode, said


def test_sigterm_keeps_a_checkpoint_and_says_how_to_go_on(stopped: tuple[Path, int, str]) -> None:
    folder, code, said = stopped
    assert code == 128 + signal.SIGTERM
    assert "python -m recipes.llama_1b_civil train --resume --run run" in said
    assert "Traceback" not in said
    newest, _ = checkpoint.newest(Run(folder / "run"))
    assert checkpoint.step_of(newest) == len(learned(folder / "run"))
    assert not (folder / "run" / "metrics.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_asks_is_heard_and_a_second_time_at_once(number: signal.Signals) -> None:
    from recipes.stages.callbacks import Safekeeping

    if signal.getsignal(number) is signal.SIG_IGN:
        # A shell has SIGINT ignored in what it runs in the background, and Safekeeping leaves that as it is.
        signal.signal(number, signal.default_int_handler)
    safe, before = Safekeeping(minutes=10, bad_steps=3), signal.getsignal(number)
    control = SimpleNamespace(should_training_stop=False, should_save=False)

    def interrupted() -> None:
        with safe.listening():
            signal.raise_signal(number)
            assert safe.asked == number
            safe.on_step_end(None, SimpleNamespace(global_step=1, max_steps=2), control)
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert control.should_training_stop
    assert control.should_save
    assert signal.getsignal(number) is before


def test_a_changed_training_is_refused_and_says_what_changed(
    stopped: tuple[Path, int, str], tmp_path: Path, command: Command
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped[0] / "run", run)
    again = (*CIVIL, "--resume", "--run", "run")
    done = command(*again, "--learning-rate", "0.001", "--lora-rank", "8")
    assert done.returncode == 2
    assert "learning_rate: " in done.stderr
    assert "-> 0.001" in done.stderr
    assert "lora_rank" in done.stderr
    assert "--accept-changes" in done.stderr
    with (run / "data" / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write((run / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()[0] + "\n")
    assert "training data" in command(*again).stderr
    reached = len(learned(run))
    done = command(*again, "--max-steps", str(reached + 2), "--accept-changes")
    assert done.returncode == 0, done.stderr
    assert len(learned(run)) == reached + 2
    assert any("max_steps: 400" in change for change in read_json(run / "training_config.json")["changes"])
    assert "came to its end" in command(*again).stderr


def test_a_setting_that_was_not_there_yet_is_what_it_is_by_default(
    stopped: tuple[Path, int, str], tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(stopped[0] / "run", run.path)
    now = read_json(run.config)
    older = read_json(run.config)
    del older["settings"]["compile"]
    write_json(run.config, older)
    begun = resume.begun(recipe("llama_1b_civil"), run.path)
    choice = Choice(**begun.choice)
    assert begun.changes(now, choice) == []
    now["settings"]["compile"] = True
    assert begun.changes(now, choice) == ["compile: False -> True"]


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(
    stopped: tuple[Path, int, str], tmp_path: Path, command: Command
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped[0] / "run", run)
    newest, _ = checkpoint.newest(Run(run))
    assert newest is not None
    tensors = newest / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    reached = checkpoint.step_of(newest)
    done = command(*CIVIL, "--resume", "--run", "run", "--max-steps", str(reached + 1), "--accept-changes")
    assert done.returncode == 0, done.stderr
    assert "tensors.safetensors is not what was written" in done.stdout
    assert f"after step {reached - 1}" in done.stdout
    # Taking the lost step again leads to where it had led.
    assert learned(run)[:reached] == learned(stopped[0] / "run")


def test_an_unfinished_run_is_pointed_out(stopped: tuple[Path, int, str], tmp_path: Path, command: Command) -> None:
    shutil.copytree(stopped[0] / "run", tmp_path / "runs" / "llama_1b_civil" / "20200101-000000-aaaa")
    done = command(*CIVIL, "--backend", "peft", "--max-steps", "1", "--max-length", "8")
    assert "this is a new run, and that one goes on with python -m recipes.llama_1b_civil train --resume" in done.stdout


def test_diverging_stops_and_keeps_the_last_good_state(command: Command, tmp_path: Path) -> None:
    done = command(
        *CIVIL, "--backend", "peft", "--max-steps", "60", "--learning-rate", "1e36", "--max-grad-norm", "1e30",
        "--checkpoint-minutes", "0", "--early-stopping", "off", "--warmup-ratio", "0", "--run", "run",
    )  # fmt: skip
    assert done.returncode == 2, done.stdout
    assert "were not finite" in done.stderr
    assert "--learning-rate" in done.stderr
    steps = list(read_jsonl(tmp_path / "run" / "steps.jsonl"))
    assert len(steps) < 60
    newest, _ = checkpoint.newest(Run(tmp_path / "run"))
    assert newest is not None
    assert checkpoint.step_of(newest) <= len(steps) - 3
    assert not (tmp_path / "run" / "adapter").exists()


STEP_DOWN = """
import fallback.choose
import fallback.with_unsloth as backend
# As with a GPU, Unsloth comes first.
fallback.choose.SLOWER_WITHOUT_A_GPU.clear()
real = backend.add_lora
def add_lora(*args, **kwargs):
    model = real(*args, **kwargs)
    def die(*args, **kwargs):
        raise RuntimeError("no kernel image is available for execution on the device")
    model.register_forward_pre_hook(die)
    return model
backend.add_lora = add_lora
"""
FAULT = "import ctypes; ctypes.string_at(0)"


def test_a_backend_that_dies_in_its_first_step_is_stepped_down_from(command: Command, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sitecustomize.py").write_text(STEP_DOWN)
    env = {"PYTHONPATH": f"{tmp_path / 'broken'}:{ROOT}"}
    few = ("--max-steps", "2", "--early-stopping", "off")
    done = command(*CIVIL, *few, "--run", "down", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "unsloth: it died before its first step was done (RuntimeError: no kernel image" in done.stdout
    choice = read_json(tmp_path / "down" / "choice.json")
    assert choice["backend"] == "peft"
    assert "no kernel image is available" in choice["reasons"]["backend"]
    assert "in die" in (tmp_path / "down" / "logs" / "libraries.log").read_text()
    assert command(*CIVIL, *few, "--backend", "peft", "--run", "plain").returncode == 0
    assert weights(tmp_path / "down") == weights(tmp_path / "plain")
    # What is begun anew tries it again, in the same folder too; what goes on does not.
    asked = SimpleNamespace(run=tmp_path / "down", resume=True, backend="auto")
    assert set(backends_that_died(asked)) == {"unsloth"}
    assert backends_that_died(SimpleNamespace(**{**vars(asked), "resume": False})) == {}
    (tmp_path / "broken" / "sitecustomize.py").write_text(STEP_DOWN.replace("raise", "return; raise"))
    assert command(*CIVIL, *few, "--run", "down", env=env).returncode == 0
    assert read_json(tmp_path / "down" / "choice.json")["backend"] == "unsloth"
    assert backends_that_died(asked) == {}
    # Who names a backend means it.
    (tmp_path / "broken" / "sitecustomize.py").write_text(STEP_DOWN)
    done = command(*CIVIL, *few, "--backend", "unsloth", "--run", "named", env=env)
    assert done.returncode not in (0, 2)
    assert "no kernel image" in done.stderr


def test_a_backend_that_dies_of_native_code_is_stepped_down_from_by_resuming(command: Command, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    # What an instruction or an address does that is none.
    fault = STEP_DOWN.replace('raise RuntimeError("no kernel image is available for execution on the device")', FAULT)
    (tmp_path / "broken" / "sitecustomize.py").write_text(fault)
    env = {"PYTHONPATH": f"{tmp_path / 'broken'}:{ROOT}"}
    few = ("--max-steps", "2", "--early-stopping", "off")
    run = tmp_path / "runs" / "llama_1b_civil" / "20200101-000000-aaaa"
    done = command(*CIVIL, *few, "--run", str(run), env=env)
    assert done.returncode == -signal.SIGSEGV, done.stderr
    assert "in die" in (run / "logs" / "crash.txt").read_text()
    done = command(*CIVIL, "--resume", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "unsloth: it died before its first step was done (Segmentation fault" in done.stdout
    choice = read_json(run / "choice.json")
    assert choice["backend"] == "peft"
    assert "Segmentation fault" in choice["reasons"]["backend"]
    assert len(learned(run)) == 2
    assert not (run / "logs" / "crash.txt").exists()


def test_who_named_the_backend_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    run = Run(tmp_path / "llama_1b_civil" / "20200101-000000-aaaa")
    run.logs.mkdir(parents=True)
    (run.logs / "crash.txt").write_text("Fatal Python error: Illegal instruction\n\n  File ...\n")
    for reason, expected in (("--backend unsloth", "unsloth"), ("Unsloth imports and runs here", "auto")):
        choice = {"backend": "unsloth", "reasons": {"backend": reason}}
        write_json(run.path / "choice.json", choice)
        assert resume.Begun(run, {}, choice).backend == expected
    assert crash.before_first_step(run) == "Illegal instruction"
    # Whoever gives the command again without --resume is told.
    write_json(run.config, {})
    offer_to_resume(recipe("llama_1b_civil"))
    assert "died before its first step was done (Illegal instruction)" in capsys.readouterr().out
    (run.path / "steps.jsonl").write_text('{"step": 1}\n')
    assert crash.before_first_step(run) is None


def test_what_a_checkpoint_holds_comes_back_as_it_was(tmp_path: Path) -> None:
    import torch

    shared = torch.arange(4)
    state = {
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "map": shared}, 1: {"map": shared}}, "groups": [{}]},
        "random": (3, (1, 2, 3), None),
        "half": torch.tensor([0.1], dtype=torch.bfloat16),
        "rate": 0.1 + 0.2,
        "none": [],
    }
    run = Run(tmp_path)
    checkpoint.save(run, 7, state, "{}")
    path, complaints = checkpoint.newest(run)
    assert path is not None
    assert not complaints
    back = checkpoint.load(path)
    assert back["optimizer"]["state"][1]["map"].equal(shared)
    assert back["optimizer"]["state"][0]["step"].item() == 3
    assert back["half"].equal(state["half"])
    assert (back["random"], back["rate"], back["none"]) == (state["random"], state["rate"], [])


@pytest.mark.parametrize("harm", ["tensors.safetensors", "state.json", "trainer_state.json", "checksums.json", "gone"])
def test_every_damage_is_noticed(harm: str, tmp_path: Path) -> None:
    import torch

    run = Run(tmp_path)
    for step in (1, 2, 3):
        checkpoint.save(run, step, {"w": torch.full((8,), float(step))}, "{}")
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-2", "step-3"]
    newest = run.checkpoints / "step-3"
    if harm == "gone":
        (newest / "state.json").unlink()
    elif harm == "checksums.json":
        (newest / harm).write_text("{}")
    else:
        data = bytearray((newest / harm).read_bytes())
        data[-1] ^= 1
        (newest / harm).write_bytes(bytes(data))
    path, complaints = checkpoint.newest(run)
    assert path is not None
    assert path.name == "step-2"
    assert len(complaints) == 1
    assert "step-3" in complaints[0]


def test_a_folder_is_exchanged_whole(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with replacing_folder(tmp_path / "it") as beside:
            (beside / "file").write_text(text)
    assert (tmp_path / "it" / "file").read_text() == "two"

    def fail() -> None:
        with replacing_folder(tmp_path / "it") as beside:
            (beside / "file").write_text("three")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (tmp_path / "it" / "file").read_text() == "two"


def test_a_lock_dies_with_its_owner(tmp_path: Path) -> None:
    run = Run(tmp_path)
    owner = subprocess.Popen(
        [sys.executable, "-c", f"import sys, time\nsys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\n"
         f"from recipes.stages.run import Run\nwith Run(Path({str(tmp_path)!r})).locked():\n"
         "    print('held', flush=True); time.sleep(600)"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert owner.stdout is not None
    assert owner.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {owner.pid} is training there"), run.locked():
        pass
    owner.kill()
    owner.wait()
    with run.locked():
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_a_torn_line_at_the_end_of_a_log_is_taken_away(tmp_path: Path) -> None:
    from recipes.stages.train import kept_lines

    log = tmp_path / "steps.jsonl"
    log.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    assert [line["step"] for line in kept_lines(log, 2)] == [1, 2]
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert kept_lines(tmp_path / "absent.jsonl", 5) == []


def test_what_a_log_keeps_stays_as_it_was_written(tmp_path: Path) -> None:
    """Answers are Korean, and may hold what Unicode calls an end of a line."""
    from recipes.stages.train import kept_lines

    log = tmp_path / "answers.jsonl"
    lines = [json.dumps({"step": n, "answer": "네,\u2028그렇죠\x85"}, ensure_ascii=False) + "\n" for n in (1, 2, 3)]
    log.write_text("".join(lines), encoding="utf-8")
    assert [line["step"] for line in kept_lines(log, 2)] == [1, 2]
    assert log.read_text(encoding="utf-8") == "".join(lines[:2])


# From its first step on the process gets no more than so much memory on top of what it has.
NO_ROOM = """
import resource
from contextlib import contextmanager
import recipes.stages.train as train
real = train.closing_logs
@contextmanager
def limited(trainer):
    pages = int(open("/proc/self/statm").read().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 1000 * 2**20, hard))
    with real(trainer):
        yield
train.closing_logs = limited
"""


def test_out_of_memory_ends_in_advice_or_in_smaller_batches(command: Command, tmp_path: Path) -> None:
    (tmp_path / "narrow").mkdir()
    (tmp_path / "narrow" / "sitecustomize.py").write_text(NO_ROOM)
    env = {"PYTHONPATH": f"{tmp_path / 'narrow'}:{ROOT}"}
    large = ("recipes.gemma3_12b_opercode", "train", "--backend", "peft", "--batch-size", "512", "--max-steps", "2",
             "--no-checkpointing", "--eval-rows", "24")  # fmt: skip
    done = command(*large, "--run", "advised", env=env)
    assert done.returncode == 2
    assert "of 512 examples at once, batch 512 x 1" in done.stderr
    assert "take --batch-tokens " in done.stderr
    assert "Traceback" not in done.stderr
    done = command(*large, "--auto-batch", "--run", "smaller", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    fewer = re.findall(r"of \d+ examples at once: going on with at most ([\d,]+)", done.stdout)
    config = read_json(tmp_path / "smaller" / "training_config.json")
    assert (config["settings"]["batch_size"], config["settings"]["accumulation"]) == (512, 1)
    assert config["settings"]["batch_tokens"] == int(fewer[-1].replace(",", ""))
    assert config["changes"][0] == f"batch_tokens: None -> {fewer[0].replace(',', '')}"
    assert len(learned(tmp_path / "smaller")) == 2
