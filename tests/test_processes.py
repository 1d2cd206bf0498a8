"""Several processes, through torchrun as users start it: they learn and answer what one process does."""

import json
import os
import shutil
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
from conftest import RECIPES, ROOT, need, recipe

from fallback.choose import BackendName
from recipes.stages import resume
from recipes.stages.prepare import prepare
from recipes.stages.recipe import Settings, UserError
from recipes.stages.run import read_json, read_jsonl

# Each thing that could make a difference somewhere: accumulation, checkpointing, a sampler with weights and a prior.
LEARNED: dict[str, tuple[BackendName, tuple[str, ...]]] = {
    "gemma3_12b_opercode": (
        "peft", ("--sampler", "weighted", "--class-weights", "balanced", "--logit-adjustment", "1",
                      "--focal-gamma", "1", "--eval-rows", "24", "--batch-tokens", "240"),
    ),
    "gemma3_1b_counsel": ("unsloth", ()),
    "llama_1b_civil": ("unsloth", ("--accumulation", "2", "--batch-tokens", "0")),
    "polyglot_1_3b_ohlora": ("peft", ("--batch-tokens", "400")),
    "gemma2_2b_ohlora": ("unsloth", ("--checkpointing",)),
}  # fmt: skip
# Writes down where the second process writes, and whatever it says.
WATCHED = """
import os, sys
if os.environ.get("RANK") == "1":
    place, report = os.environ["WATCHED"], os.open(os.environ["WATCHED"] + "-report", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    def look(event, args):
        writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
        if event == "open":
            writes = bool(args[2] and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes and isinstance(args[0], str) and os.path.abspath(args[0]).startswith(place):
            os.write(report, f"{event} {args[0]}\\n".encode())
    sys.addaudithook(look)
"""  # noqa: E501
# Chunks so small that both processes get some.
SMALL_CHUNKS = "import recipes.stages.predict as predict\npredict.CHUNK = 8\n"

Start = Callable[..., subprocess.CompletedProcess[str]]


def command_of(processes: int, *arguments: str, file: str = "") -> list[str]:
    """By torchrun, or by accelerate with one of our files."""
    launcher = [sys.executable, "-m"]
    if processes > 1 and file:
        launcher += ["accelerate.commands.launch", "--config_file", str(ROOT / "recipes" / "accelerate" / file)]
        launcher += ["--num_processes", str(processes), "-m"]
    elif processes > 1:
        # Without the two dashes torchrun takes --run for the beginning of an option of its own.
        launcher += ["torch.distributed.run", "--nproc_per_node", str(processes), "--standalone", "-m", "--"]
    return [*launcher, *arguments]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def start(place: Path) -> Start:
    def run(
        processes: int, *arguments: str, file: str = "", patch: str = "", **environ: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command_of(processes, *arguments, file=file), cwd=place, env=environment(place, patch, **environ),
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip

    return run


def environment(place: Path, patch: str = "", **environ: str) -> dict[str, str]:
    paths = str(ROOT)
    if patch:
        folder = place / f"patch-{abs(hash(patch))}"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(patch)
        paths = f"{folder}:{ROOT}"
    # As torchrun sets it: what is added up in other pieces is rounded in other places.
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environ}


ROWS = 17


def small_run(name: str, path: Path) -> Path:
    """A prepared run whose training split has all classes, and so many rows that the third step of an epoch has one."""
    made = prepare(recipe(name), None, recipe(name).options, 42, path, quiet=True)
    rows = (made.data / "train.jsonl").read_text(encoding="utf-8").splitlines(True)
    first = {json.loads(row).get("label"): row for row in reversed(rows)}
    kept = [*first.values(), *(row for row in rows if row not in first.values())][:ROWS]
    (made.data / "train.jsonl").write_text("".join(kept), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def learned(place: Path, start: Start) -> Callable[[str], list[tuple[Path, subprocess.CompletedProcess[str]]]]:
    """Recipe -> the same training by one process and by two, with half the batch each."""
    known: dict[str, Any] = {}

    def of(name: str) -> list[tuple[Path, subprocess.CompletedProcess[str]]]:
        if name not in known:
            backend, flags = LEARNED[name]
            need(backend, name)
            one = small_run(name, place / f"{name}-1")
            two = place / f"{name}-2"
            shutil.copytree(one, two)
            known[name] = [
                (path, start(
                    number, f"recipes.{name}", "train", "--backend", backend, "--max-steps", "4", "--lora-dropout", "0",
                    "--neftune-alpha", "0", "--log-every", "1", "--early-stopping", "off", "--batch-size",
                    str(8 // number // (1 + ("--accumulation" in flags))), *flags, "--run", str(path), patch=WATCHED,
                    WATCHED=str(path), file="ddp.yaml" * (name == "polyglot_1_3b_ohlora"),
                ))
                for number, path in ((1, one), (2, two))
            ]  # fmt: skip
        return known[name]

    return of


def adapter(run: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(run / "adapter" / "adapter_model.safetensors")


def apart(one: Path, other: Path) -> float:
    """How far the trained matrices lie apart, as a share of their size. Those that began at zero alone: the others
    hardly moved."""
    a, b = ({k: v for k, v in adapter(run).items() if "lora_B" in k} for run in (one, other))
    assert a.keys() == b.keys()
    return float(sum(((a[k] - b[k]) ** 2).sum() for k in a) / sum((a[k] ** 2).sum() for k in a)) ** 0.5


def test_every_recipe_is_tried() -> None:
    assert set(LEARNED) == set(RECIPES)


@pytest.mark.parametrize("name", LEARNED)
def test_two_processes_learn_what_one_learns(name: str, learned: Any) -> None:
    (one, alone), (two, shared) = learned(name)
    assert alone.returncode == 0, alone.stderr
    assert shared.returncode == 0, shared.stderr
    steps = [list(read_jsonl(run / "steps.jsonl")) for run in (one, two)]
    assert len(steps[0]) == len(steps[1]) == 4
    for a, b in zip(*steps, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-3)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
        assert b["supervised_tokens"] == a["supervised_tokens"]
        assert b["learning_rate"] == a["learning_rate"]
        assert b.get("cross_entropy", 0) == pytest.approx(a.get("cross_entropy", 0), abs=1e-3)
    assert apart(one, two) < 1e-3
    # The last step of an epoch has one row, and the second process none.
    assert steps[0][2]["supervised_tokens"] < min(steps[0][n]["supervised_tokens"] for n in (0, 1, 3))
    (a,), (b,) = (read_jsonl(run / "validation.jsonl") for run in (one, two))
    assert b["eval_loss"] == pytest.approx(a["eval_loss"], abs=1e-3)
    for metric in ("eval_f1_macro", "eval_accuracy", "eval_temperature"):
        assert b.get(metric) == a.get(metric)
    assert [read_json(run / "metrics.json")["train"]["processes"] for run in (one, two)] == [1, 2]


def test_the_first_process_writes_and_speaks_for_all(learned: Any) -> None:
    (one, _), (two, shared) = learned("gemma3_12b_opercode")
    files = [
        {path.relative_to(run) for path in run.rglob("*") if "tfevents" not in path.name} for run in (one, two)
    ]  # fmt: skip
    assert files[0] == files[1]
    assert Path(f"{two}-report").read_text() == ""
    assert len(list((two / "logs").glob("events.*"))) == 1
    lines = shared.stdout.splitlines()
    assert len(lines) == len(set(lines))
    assert sum(line.startswith("step ") for line in lines) == 4
    assert "of 4 x 1 on each of 2 processes" in shared.stdout
    assert shared.stderr == ""


@pytest.mark.parametrize("name", ["gemma3_12b_opercode", "gemma3_1b_counsel"])
def test_scoring_is_shared_and_gives_the_same_to_the_last_digit(
    name: str, learned: Any, start: Start, place: Path
) -> None:
    trained = learned(name)[0][0]
    found = []
    # Greedy: what is drawn is drawn from another generator in each process.
    flags = ("--temperature", "0", "--max-new-tokens", "8", "--batch-size", "2") if "counsel" in name else ()
    for number in (1, 2):
        run = place / f"{name}-scored-{number}"
        shutil.copytree(trained, run)
        done = start(number, f"recipes.{name}", "evaluate", *flags, "--run", str(run), patch=WATCHED, WATCHED=str(run))
        assert done.returncode == 0, done.stderr
        results = read_json(run / "evaluation_results.json")
        assert results.pop("seconds") > 0
        found.append((results, (run / "predictions.csv").read_bytes()))
    assert found[0] == found[1]
    assert Path(f"{place / name}-scored-2-report").read_text() == ""


def test_the_rows_of_a_file_are_shared(learned: Any, start: Start, place: Path) -> None:
    trained = learned("gemma3_12b_opercode")[0][0]
    rows = list(read_jsonl(trained / "data" / "test.jsonl"))[:43]
    (place / "in.csv").write_text(
        "PaymentComment\n" + "".join('"' + row["text"].replace('"', '""') + '"\n' for row in rows)
    )
    ask = ("recipes.gemma3_12b_opercode", "predict", "--file", "in.csv", "--run", str(trained), "--out")
    for number in (1, 2):
        done = start(number, *ask, f"out-{number}.csv", patch=SMALL_CHUNKS)
        assert done.returncode == 0, done.stderr
        assert "43 rows" in done.stdout
    assert (place / "out-1.csv").read_bytes() == (place / "out-2.csv").read_bytes()
    assert len((place / "out-2.csv").read_text().splitlines()) == 44
    assert not list(place.glob("*.part*"))


def processes_of(launcher: int) -> dict[int, psutil.Process]:
    """Rank -> process."""
    found = {}
    for child in psutil.Process(launcher).children():
        with suppress(psutil.Error):
            found[int(child.environ().get("RANK", -1))] = child
    return found


def interrupted(
    place: Path, number: int, run: Path, steps: int, which: int | None, *flags: str
) -> tuple[int, str, float]:
    """Start a training, wait until it has taken so many steps, and kill a process or ask the launcher to stop: the exit
    code, what was said, and how long it took to end."""
    process = subprocess.Popen(
        command_of(number, "recipes.llama_1b_civil", "train", *flags, "--run", str(run)), cwd=place,
        env=environment(place), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    record, deadline = run / "steps.jsonl", time.monotonic() + 180
    while not (record.is_file() and record.read_text().count("\n") >= steps):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if which is None:
        process.send_signal(signal.SIGTERM)
    else:
        processes_of(process.pid)[which].kill()
    began = time.monotonic()
    _, said = process.communicate(timeout=120)
    return process.returncode, said, time.monotonic() - began


def test_killed_stopped_and_resumed_with_other_numbers_of_processes(place: Path, start: Start) -> None:
    steady = (
        "--backend", "peft", "--scheduler", "constant", "--warmup-ratio", "0", "--learning-rate", "0.0001",
        "--lora-dropout", "0", "--neftune-alpha", "0", "--early-stopping", "off", "--checkpoint-minutes", "0",
    )  # fmt: skip
    run, whole = place / "civil", place / "civil-whole"
    code, said, seconds = interrupted(
        place, 2, run, 3, 1, *steady, "--batch-size", "2", "--accumulation", "2", "--batch-tokens", "0",
        "--max-steps", "2000",
    )  # fmt: skip
    assert code != 0
    assert seconds < 20
    ours = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(ours) == 1, said
    assert "another process of this training was lost" in ours[0]
    assert "torchrun --nproc_per_node 2 -m -- recipes.llama_1b_civil train --resume" in ours[0]

    # In one process, which is asked to stop.
    reached = len(list(read_jsonl(run / "steps.jsonl")))
    code, said, _ = interrupted(place, 1, run, reached + 3, None, "--resume")
    assert code == 128 + signal.SIGTERM, said
    settings = read_json(run / "training_config.json")["settings"]
    assert (settings["batch_size"], settings["accumulation"]) == (2, 4)
    assert any(change.startswith("processes: 2 -> 1") for change in read_json(run / "training_config.json")["changes"])

    # In two again, whose launcher is asked to stop: both at the same step, with a checkpoint.
    reached = len(list(read_jsonl(run / "steps.jsonl")))
    code, said, seconds = interrupted(place, 2, run, reached + 3, None, "--resume")
    assert code != 0
    assert seconds < 25
    assert [line for line in said.splitlines() if line.startswith("stopped after step")], said
    steps = list(read_jsonl(run / "steps.jsonl"))
    assert (run / "checkpoints" / f"step-{len(steps)}").is_dir()

    last = len(steps) + 2
    done = start(
        1,
        "recipes.llama_1b_civil",
        "train",
        "--resume",
        "--max-steps",
        str(last),
        "--accept-changes",
        "--run",
        str(run),
    )
    assert done.returncode == 0, done.stderr
    done = start(1, "recipes.llama_1b_civil", "train", *steady, "--batch-size", "8", "--accumulation", "1",
                 "--max-steps", str(last), "--run", str(whole))  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = [[step["loss"] for step in read_jsonl(folder / "steps.jsonl")] for folder in (run, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    tokens = [read_json(folder / "metrics.json")["train"]["supervised_tokens"] for folder in (run, whole)]
    assert tokens[0] == tokens[1]


def test_scaling_is_measured_in_pairs_and_projected(learned: Any, start: Start) -> None:
    trained = learned("gemma3_12b_opercode")[0][0]
    done = start(1, "bench", "scaling", "--run", str(trained), "--rows", "24", "--repeats", "1", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["speedup_with_2"] == found["seconds"]["1"][0] / found["seconds"]["2"][0]
    times = list(found["projected_seconds"].values())
    assert times == sorted(times, reverse=True)
    assert times[0] == pytest.approx(388_706 / found["rows_per_second_of_one"])


def test_what_two_processes_do_not_halve_is_not_divided_by_eight() -> None:
    from bench.scaling import projected, undivided

    assert (undivided(2), undivided(1.6), undivided(1), undivided(2.1)) == (0, 0.25, 1, 0)
    # 380 chunks: 48 rounds for eight.
    assert projected(8, 100, 2) == pytest.approx(3887.06 * 48 / 380)
    assert projected(4, 100, 1.6) == pytest.approx(3887.06 * (0.25 + 0.75 / 4))


# accelerate shards nothing on CPUs: told that they are GPUs, it does. Everything else is as on GPUs.
CPUS_ARE_GPUS = """
import importlib.util, os, sys
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "accelerate.state":
            return None
        sys.meta_path.remove(Finder)
        spec = importlib.util.find_spec(name)
        real = spec.loader.exec_module
        def exec_module(module):
            real(module)
            kind = module.DistributedType.MULTI_GPU
            module.PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", kind)
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Finder)
if os.environ.get("DIES_AT"):
    import recipes.stages.checkpoint as checkpoint
    real = checkpoint.save
    def save(run, step, *args):
        real(run, step, *args)
        if step == int(os.environ["DIES_AT"]):
            os.kill(os.getpid(), 9)
    checkpoint.save = save
"""
FSDP2 = {
    "ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}  # fmt: skip


@pytest.mark.parametrize("name", ["gemma3_12b_opercode", "gemma3_1b_counsel"])
def test_weights_divided_by_fsdp2_learn_the_same(name: str, start: Start, place: Path, learned: Any) -> None:
    whole = learned(name)[0][0]
    divided = small_run(name, place / f"{name}-fsdp")
    flags = (
        "--max-steps", "4", "--lora-dropout", "0", "--neftune-alpha", "0", "--log-every", "1", "--early-stopping",
        "off", "--batch-size", "4", *LEARNED[name][1], "--checkpointing",
    )  # fmt: skip
    train = (f"recipes.{name}", "train", "--backend", "peft", *flags, "--run", str(divided))
    if name == "gemma3_12b_opercode":
        done = start(2, *train, "--checkpoint-minutes", "0", patch=CPUS_ARE_GPUS, DIES_AT="2", **FSDP2)
        assert done.returncode != 0
        train = (f"recipes.{name}", "train", "--resume", "--run", str(divided))
    done = start(2, *train, patch=CPUS_ARE_GPUS, **FSDP2)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [[step["loss"] for step in read_jsonl(run / "steps.jsonl")] for run in (divided, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert apart(divided, whole) < 5e-3
    ends = [list(read_jsonl(run / "validation.jsonl"))[-1] for run in (divided, whole)]
    assert ends[0]["eval_loss"] == pytest.approx(ends[1]["eval_loss"], abs=2e-3)


def test_weights_divided_by_deepspeed_learn_the_same(start: Start, place: Path, learned: Any) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install deepspeed hjson py-cpuinfo")
    whole = learned("polyglot_1_3b_ohlora")[0][0]
    divided = small_run("polyglot_1_3b_ohlora", place / "polyglot-zero3")
    done = start(
        2, "recipes.polyglot_1_3b_ohlora", "train", "--backend", "peft", "--max-steps", "4", "--lora-dropout", "0",
        "--neftune-alpha", "0", "--log-every", "1", "--early-stopping", "off", "--batch-size", "4", "--batch-tokens",
        "400", "--run", str(divided), file="zero3.yaml", DS_ACCELERATOR="cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [[step["loss"] for step in read_jsonl(run / "steps.jsonl")] for run in (divided, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert apart(divided, whole) < 1e-3


def test_the_same_steps_are_dealt_out_anew() -> None:
    settings = Settings(batch_size=4, accumulation=3)
    for before, now, batch, accumulation in ((1, 2, 3, 2), (1, 4, 3, 1), (2, 1, 4, 6), (1, 3, 4, 1), (1, 12, 1, 1)):
        changed = resume.dealt_out(settings, before, now)
        assert (changed.batch_size, changed.accumulation) == (batch, accumulation)
        assert batch * accumulation * now == 12 * before
    assert resume.dealt_out(settings, 3, 3) == settings
    with pytest.raises(UserError, match="12 examples, which 5 processes cannot share evenly; start 1, 2, 3, 4, 6, 12"):
        resume.dealt_out(settings, 1, 5)


def test_the_table_of_engines_is_what_plan_says() -> None:
    from recipes.stages import plan, plan_sharded

    page = (ROOT / "docs" / "several_gpus.md").read_text(encoding="utf-8")
    header, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith(("| recipe | weights", *(f"| {name} |" for name in RECIPES)))
    ]
    assert {line[0] for line in lines} == set(RECIPES)
    for name, quantization, *cells in lines:
        settings = replace(recipe(name).settings, quantization=quantization)
        for card, cell in zip(header[2:], cells, strict=True):
            takes = {
                n: plan_sharded.on_cards(recipe(name), settings, plan.card(card), n)["take"] for n in (2, 4, 8)
            }  # fmt: skip
            found = next((f"{take} from {n}".removesuffix(" from 2") for n, take in takes.items() if take), "none")
            assert found == cell, (name, quantization, card, takes)


def test_plan_tells_what_several_gpus_hold(start: Start) -> None:
    done = start(
        1, "recipes.gemma3_12b_opercode", "plan", "--gpus", "4", "--gpu", "RTX 4090", "--rows", "1000", "--json"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    several, one = found["several"], found["cards"]["RTX 4090"]
    assert several["examples_per_step"] == 64
    assert several["optimizer_steps"] == 16 * 3
    assert several["same_steps"] == {"batch_size": 2, "accumulation": 2}
    assert several["seconds"]["RTX 4090"] == found["seconds"]["RTX 4090"] / 4
    engines = several["cards"]["RTX 4090"]["engines"]
    assert several["cards"]["RTX 4090"]["take"] == "ddp"
    terms = engines["ddp"]["memory_bytes"]
    # The single card's, and the buckets in which gradients are averaged.
    assert engines["ddp"]["needed_bytes"] == pytest.approx(one["needed_bytes"] + 1.06 * terms["gradients"], abs=10)
    divided = engines["fsdp2"]["memory_bytes"]
    assert divided["optimizer"] == pytest.approx(terms["optimizer"] / 4, abs=1)
    base = sum(terms[name] for name in ("quantized_weights", "unquantized_weights", "embedding"))
    # A fourth of the numbers, and the 4-bit weights' scales, a 32nd of them, whole.
    assert base / 4 < divided["base_weights"] < base / 3
    assert engines["zero3"]["verdict"] == "cannot"
