"""Whole commands: every recipe under every backend, from data to answer, judged by the files they leave."""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import RECIPES, ROOT, need
from safetensors import safe_open

from fallback.choose import BACKENDS, BackendName
from fallback.torch_build import usable_gpu

LEARNS = "gemma3_12b_opercode"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("e2e")


def python(folder: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=900,
    )


@cache
def finished(folder: Path, name: str, backend: BackendName) -> tuple[Path, str]:
    """The run of one recipe under one backend, made once: its folder and what it printed."""
    need(backend, name)
    run = folder / f"{name}-{backend}"
    # All of it where something is asserted about what was learned, else enough steps to see the loss fall.
    short = () if name == LEARNS else ("--max-steps", "40")
    done = python(folder, f"recipes.{name}", "--backend", backend, "--size", "tiny", "--run", str(run), *short)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return run, done.stdout


def steps(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_saves_reloads_and_answers(name: str, backend: str, folder: Path) -> None:
    run, printed = finished(folder, name, backend)
    first_line = printed.splitlines()[0]
    assert "size tiny" in first_line
    assert "NOT" in first_line

    record = steps(run)
    assert [step["step"] for step in record] == list(range(1, len(record) + 1))
    for step in record:
        assert math.isfinite(step["loss"])
        assert step["supervised_tokens"] > 0
        assert set(step) >= {"grad_norm", "learning_rate", "seconds"}
    assert sum(s["loss"] for s in record[-5:]) < 0.9 * sum(s["loss"] for s in record[:5])

    for file in (
        "training_config.json", "environment.json", "choice.json", "metrics.json", "evaluation_results.json",
        "predictions.csv", "data/metadata.json", "data/train.jsonl", "data/val.csv", "data/test.jsonl",
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/tokenizer.json",
    ):  # fmt: skip
        assert (run / file).is_file(), file
    assert list((run / "logs").glob("events.out.tfevents.*"))
    assert not [p for p in run.rglob("*") if ".making" in p.name or p.name == "checkpoints"]

    # TRL rounds the matrices of quantised models to bfloat16; ours stay what the optimiser made of them.
    with safe_open(run / "adapter" / "adapter_model.safetensors", "pt") as adapter:
        assert {adapter.get_slice(name).get_dtype() for name in adapter.keys()} == {"F32"}  # noqa: SIM118

    choice = json.loads((run / "choice.json").read_text())
    assert choice["backend"] == backend
    assert "NOT" in json.loads((run / "training_config.json").read_text())["notice"]
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["train"]["optimizer_steps"] == len(record)
    if name != LEARNS:
        # Not at every evaluation: they take as long as steps.
        answers = (run / "logs" / "answers.jsonl").read_text(encoding="utf-8").split("\n")
        assert [json.loads(line)["step"] for line in answers if line] == [len(record)] * 3
    with (run / "predictions.csv").open(encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == metrics["test"]["rows"]


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "peft"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_backend_learns_the_same(name: str, backend: str, folder: Path) -> None:
    ours, theirs = (steps(finished(folder, name, one)[0])[:20] for one in (backend, "peft"))
    for one, other in zip(ours, theirs, strict=True):
        assert one["supervised_tokens"] == other["supervised_tokens"]
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02), f"step {one['step']}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_opercode_learns(backend: str, folder: Path) -> None:
    run, _ = finished(folder, LEARNS, backend)
    assert json.loads((run / "evaluation_results.json").read_text())["accuracy"] >= 0.85


def test_confidence_is_calibrated_on_what_answering_computes(folder: Path) -> None:
    """The temperature of the training against one fitted to the probabilities of predict."""
    run, _ = finished(folder, LEARNS, "peft")
    code = f"""
from pathlib import Path
from recipes.gemma3_12b_opercode import RECIPE, OperCodeClassifier
from recipes.stages import train
from recipes.stages.confidence import fit_temperature
from recipes.stages.run import Run
run = Path({str(run)!r})
items = train.examples(RECIPE, Run(run), "val")
log_p, known = OperCodeClassifier(run).log_probabilities([item.prompt for item in items])
names = list(known.train_rows)
right = [names[best] == item.answer for best, item in zip(log_p.argmax(1), items)]
print(fit_temperature(log_p, right), known.temperature)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    again, saved = map(float, done.stdout.split())
    assert again == pytest.approx(saved, rel=0.05)


def test_the_losses_of_a_backend_are_its_own(folder: Path) -> None:
    """What makes the comparison above worth something: the processes really differ."""
    need("unsloth", "llama_1b_civil")
    patched = {}
    for backend in ("unsloth", "peft"):
        run, _ = finished(folder, "llama_1b_civil", backend)
        log = (run / "logs" / "libraries.log").read_text(errors="replace")
        assert ("Unsloth" in log) == (backend == "unsloth")
        patched[backend] = json.loads((run / "metrics.json").read_text())["train"]["patched"]
    assert any("unsloth" in name for name in patched["unsloth"])
    assert not any("unsloth" in name for name in patched["peft"])
    assert any("NEFTune" in name for name in patched["peft"]), "the recipe asks for it"


def test_predict_evaluate_and_chat_read_the_run(folder: Path) -> None:
    run, _ = finished(folder, LEARNS, "peft")
    payment = "Advance payment for goods, import contract 17"
    one = python(folder, f"recipes.{LEARNS}", "predict", payment, "--run", str(run))
    assert one.returncode == 0, one.stderr
    code, confidence = one.stdout.split()
    assert code in json.loads((run / "adapter" / "classes.json").read_text())["train_rows"]
    assert 0 < float(confidence) <= 1
    assert "NOT google/gemma-3-12b-it" in one.stderr
    several = python(folder, f"recipes.{LEARNS}", "predict", "--run", str(run), stdin=f"{payment}\n\n{payment}\n")
    assert several.stdout.splitlines() == [one.stdout.strip()] * 2

    before = json.loads((run / "evaluation_results.json").read_text())
    assert python(folder, f"recipes.{LEARNS}", "evaluate", "--run", str(run)).returncode == 0
    after = json.loads((run / "evaluation_results.json").read_text())
    assert {k: v for k, v in after.items() if k != "seconds"} == {k: v for k, v in before.items() if k != "seconds"}

    run, _ = finished(folder, "polyglot_1_3b_ohlora", "peft")
    talk = python(
        folder, "recipes.polyglot_1_3b_ohlora", "chat", "--run", str(run), stdin="안녕\n/reset\n뭐 해?\n/exit\n"
    )
    assert talk.returncode == 0, talk.stderr
    assert talk.stdout.count("> ") >= 4
    assert "forgotten" in talk.stdout
    assert "답변 종료" not in talk.stdout


def test_the_best_checkpoint_is_kept_and_curves_are_drawn(folder: Path) -> None:
    run, printed = finished(folder, LEARNS, "peft")
    evaluations = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    metrics = json.loads((run / "metrics.json").read_text())["train"]
    assert len(evaluations) >= 2
    assert evaluations[-1]["step"] == metrics["optimizer_steps"]
    best = max(evaluations, key=lambda e: e["eval_f1_macro"])
    assert (metrics["kept_step"], metrics["best_eval_f1_macro"]) == (best["step"], best["eval_f1_macro"])
    assert f"kept the adapter of step {best['step']}" in printed

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "logs"))
    events.Reload()
    drawn = set(events.Tags()["scalars"])
    wanted = {"train/loss", "eval/loss", "eval/f1_macro", "eval/f1_micro", "eval/accuracy"}
    assert wanted <= drawn, drawn
    assert [event.step for event in events.Scalars("eval/f1_macro")] == [e["step"] for e in evaluations]


def test_an_evaluation_says_how_good_how_sure_and_where_it_fails(folder: Path) -> None:
    run, _ = finished(folder, LEARNS, "peft")
    results = json.loads((run / "evaluation_results.json").read_text())
    for name in ("accuracy", "f1_macro", "f1_micro", "f1_weighted", "precision_macro", "recall_macro"):
        low, high = results["intervals_95"][name]
        assert low <= results[name] <= high
        assert high > low
    assert len(results["by_class"]) == 12
    assert [line["class"] for line in results["problem_classes"]] == [
        line["class"] for line in results["by_class"] if line["f1"] < 0.5
    ]
    known = json.loads((run / "adapter" / "classes.json").read_text())
    assert results["temperature"] == known["temperature"]
    coverage = results["coverage"]
    assert coverage[0]["accuracy"] == pytest.approx(results["accuracy"])
    assert coverage[len(coverage) // 2]["accuracy"] > coverage[0]["accuracy"]
    with (run / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["predicted"] for row in rows} <= set(known["train_rows"])
    assert sum(row["predicted"] == row["true"] for row in rows) / len(rows) == pytest.approx(results["accuracy"])
    assert not any(row["text"].startswith("Answer with") for row in rows)
    for picture in ("confusion.png", "f1_by_class_size.png", "coverage.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")


def test_predict_a_file_and_with_a_least_confidence(folder: Path) -> None:
    run, _ = finished(folder, LEARNS, "peft")
    source, out = run / "data" / "test.csv", folder / "answers.csv"
    arguments = (f"recipes.{LEARNS}", "predict", "--run", str(run), "--file", str(source), "--text-column", "text")
    done = python(folder, *arguments, "--out", str(out), "--min-confidence", "0.9")
    assert done.returncode == 0, done.stderr
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    with (run / "predictions.csv").open(encoding="utf-8", newline="") as file:
        expected = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == [row["text"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert float(row["confidence"]) == pytest.approx(float(other["confidence"]), abs=2e-3)
        assert row["predicted"] == ("unsure" if float(row["confidence"]) < 0.9 else other["predicted"])
    assert any(row["predicted"] == "unsure" for row in rows)
    missing = python(folder, *arguments)
    assert missing.returncode == 2
    assert "--file and --out go together" in missing.stderr


@pytest.mark.parametrize("name", RECIPES)
def test_it_answers_in_bfloat16_as_in_float32(folder: Path, name: str) -> None:
    """As a run that was trained in it."""
    if usable_gpu():
        pytest.skip("a GPU answers in bfloat16 as it is, and this is about CPUs")
    trained, _ = finished(folder, name, "peft")
    run = folder / f"{name}-bfloat16"
    if not run.exists():
        shutil.copytree(trained, run)
        config, choice = (json.loads((run / file).read_text()) for file in ("training_config.json", "choice.json"))
        config["settings"]["dtype"] = choice["dtype"] = "bfloat16"
        (run / "training_config.json").write_text(json.dumps(config))
        (run / "choice.json").write_text(json.dumps(choice))
    done = python(folder, f"recipes.{name}", "evaluate", "--run", str(run))
    assert done.returncode == 0, done.stderr
    exact, narrow = (json.loads((one / "evaluation_results.json").read_text()) for one in (trained, run))
    if name == LEARNS:
        assert narrow["accuracy"] == pytest.approx(exact["accuracy"], abs=0.02)
        rows = [list(csv.DictReader((one / "predictions.csv").open(encoding="utf-8"))) for one in (trained, run)]
        apart = [abs(float(a["confidence"]) - float(b["confidence"])) for a, b in zip(*rows, strict=True)]
        assert 0 < sum(apart) / len(apart) < 0.02
    else:
        assert 0 < abs(narrow["validation_perplexity"] / exact["validation_perplexity"] - 1) < 0.05
        assert narrow["rows"] == exact["rows"]


def test_the_example_of_the_readme(folder: Path) -> None:
    """The Python example runs as it stands, with the newest run in its place."""
    run, _ = finished(folder, LEARNS, "peft")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", readme, re.S)
    assert example is not None
    code = re.sub(r'"runs/[^"]*"', repr(str(run)), example.group(1))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4, lines
    known = json.loads((run / "adapter" / "classes.json").read_text())["train_rows"]
    assert lines[0] in known


def test_train_continues_from_prepare(folder: Path) -> None:
    run = folder / "prepared"
    name = "recipes.llama_1b_civil"
    assert python(folder, name, "prepare", "--run", str(run)).returncode == 0
    before = (run / "data" / "train.jsonl").read_bytes()
    done = python(folder, name, "train", "--run", str(run), "--max-steps", "2", "--backend", "peft", "--size", "tiny")
    assert done.returncode == 0, done.stderr
    assert (run / "data" / "train.jsonl").read_bytes() == before
    assert len(steps(run)) == 2
