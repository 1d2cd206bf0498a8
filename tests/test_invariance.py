"""What must not change a result: how a step is cut into batches, which rows stand beside each other, and on which side
they are padded. Through the commands that users give, with everything random turned off."""

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, need
from safetensors.numpy import load_file

from bench.warm import Warm
from fallback.choose import BackendName
from recipes.stages.run import read_json, read_jsonl, write_json

CODES, CIVIL = "gemma3_12b_opercode", "llama_1b_civil"
STEPS = 6
# The same four rows a step, of different lengths: side by side with padding, in twos, one by one without any, and in as
# few parts as keep within so many tokens.
CUTS = {
    "whole": ("--batch-size", "4", "--accumulation", "1"),
    "in-twos": ("--batch-size", "2", "--accumulation", "2", "--batch-tokens", "0"),
    "one-by-one": ("--batch-size", "1", "--accumulation", "4", "--batch-tokens", "0"),
    "by-tokens": ("--batch-size", "4", "--accumulation", "1", "--batch-tokens", "200"),
}
FIXED = ("--max-steps", str(STEPS), "--lora-dropout", "0", "--neftune-alpha", "0", "--max-length", "192")


class Folder:
    """Commands under one backend. Each is a process of its own; their libraries are loaded once."""

    def __init__(self, backend: BackendName, path: Path):
        self.path, self.backend = path, backend
        self.warm = Warm(backend, {**os.environ, "PYTHONPATH": str(ROOT)})

    def run(self, name: str, *arguments: str) -> None:
        said = self.path / "said"
        code = self.warm.start(f"recipes.{name}", list(arguments), self.path, self.path / "out", said).wait()
        assert code == 0, said.read_text()

    def trained(self, name: str, cut: str = "whole") -> Path:
        run = self.path / f"{name}-{cut}"
        if not run.exists():
            quiet = ("--early-stopping", "off") if name == CIVIL else ("--eval-rows", "24")
            self.run(name, "train", "--backend", self.backend, *FIXED, *quiet, *CUTS[cut], "--run", run.name)
        return run

    def coded(self, *flags: str) -> list[dict[str, str]]:
        """Forty payments and their codes."""
        run = self.trained(CODES)
        few, out = self.path / "few.csv", self.path / "coded.csv"
        few.write_bytes(b"".join((run / "data" / "test.csv").read_bytes().splitlines(keepends=True)[:41]))
        self.run(
            CODES, "predict", "--run", run.name, "--file", few.name, "--text-column", "text", "--out", out.name, *flags
        )
        return rows_of(out)

    def evaluated(self, name: str, *flags: str) -> tuple[list[dict[str, str]], dict[str, Any]]:
        run = self.trained(name)
        self.run(name, "evaluate", "--run", run.name, *flags)
        return rows_of(run / "predictions.csv"), read_json(run / "evaluation_results.json")


@pytest.fixture(scope="module", params=["peft", "unsloth"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folder]:
    need(request.param, CODES)
    made = Folder(request.param, tmp_path_factory.mktemp("invariance"))
    yield made
    made.warm.close()


@pytest.mark.parametrize("name", [CODES, CIVIL])
def test_a_step_may_be_cut_into_batches(name: str, folder: Folder) -> None:
    """A mean of means, or padding that is seen, would show: the rows of a step differ in length and in the number of
    their answer tokens."""
    whole, *others = (folder.trained(name, cut) for cut in CUTS)
    steps = list(read_jsonl(whole / "steps.jsonl"))
    assert len(steps) == STEPS
    passes = [read_json(run / "metrics.json")["train"]["forward_passes"] for run in (whole, *others)]
    assert passes[:3] == [STEPS, 2 * STEPS, 4 * STEPS]
    assert STEPS < passes[3] < 4 * STEPS
    learned = adapter(whole)
    for other in others:
        for one, two in zip(steps, read_jsonl(other / "steps.jsonl"), strict=True):
            assert one["supervised_tokens"] == two["supervised_tokens"]
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
        there = adapter(other)
        # Rounding alone: it comes to 1e-6 of what was learned.
        assert norm({key: there[key] - value for key, value in learned.items()}) < 1e-4 * norm(learned)


def test_codes_are_scored_alike_alone_and_side_by_side(folder: Folder) -> None:
    """One after the other nothing is padded, and every branch of the tree is read by itself."""
    together, alone = folder.coded(), folder.coded("--batch-tokens", "1")
    assert len({len(row["text"]) for row in together}) > 10
    same_codes(together, alone)


def test_free_text_is_answered_alike_alone_and_side_by_side(folder: Folder) -> None:
    """Greedily: side by side what all begin with is read once, and who is done leaves the others."""
    short = ("--temperature", "0", "--max-new-tokens", "12")
    together, measured = folder.evaluated(CIVIL, *short, "--batch-size", "8")
    alone, again = folder.evaluated(CIVIL, *short, "--batch-size", "1")
    assert len({len(row["text"]) for row in together}) > 3
    assert together == alone
    assert {k: v for k, v in measured.items() if k != "seconds"} == {k: v for k, v in again.items() if k != "seconds"}


def test_the_side_that_a_tokenizer_pads_on_is_no_matter(folder: Folder) -> None:
    """Padding is put where the computation wants it, whatever the files of the tokenizer say."""

    def answers() -> list[list[dict[str, str]]]:
        return [folder.coded(), folder.evaluated(CIVIL, "--temperature", "0", "--max-new-tokens", "12")[0]]

    found = []
    for side in ("left", "right"):
        for name in (CODES, CIVIL):
            path = folder.trained(name) / "adapter" / "tokenizer_config.json"
            write_json(path, {**read_json(path), "padding_side": side})
        found.append(answers())
    (left, written), (right, again) = found
    same_codes(left, right)
    assert written == again


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def adapter(run: Path) -> dict[str, Any]:
    """The second matrices, which begin at zero: all of them is learned."""
    found = load_file(run / "adapter" / "adapter_model.safetensors")
    return {name: value for name, value in found.items() if "lora_B" in name}


def norm(tensors: dict[str, Any]) -> float:
    return sum(float((tensor.astype("float64") ** 2).sum()) for tensor in tensors.values()) ** 0.5


def same_codes(one: list[dict[str, str]], other: list[dict[str, str]]) -> None:
    for row, again in zip(one, other, strict=True):
        assert row["predicted"] == again["predicted"]
        assert float(row["confidence"]) == pytest.approx(float(again["confidence"]), abs=2e-4)
