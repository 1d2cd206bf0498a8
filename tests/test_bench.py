"""The measurements run, and what is committed under results/ says what README says."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, recipe

from bench.figures import FILES, TABLES, fill
from bench.statistics import mean_interval

Command = Callable[..., subprocess.CompletedProcess[str]]


def test_an_interval_is_student_s() -> None:
    mean, low, high = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3
    # t(0.975, 4) = 2.776, standard error = sqrt(2.5 / 5)
    assert (low, high) == (pytest.approx(3 - 2.776 * 0.7071, abs=1e-3), pytest.approx(3 + 2.776 * 0.7071, abs=1e-3))
    assert mean_interval([1.0])[1:] == (float("-inf"), float("inf"))


def test_prepare(command: Command) -> None:
    done = command("bench", "prepare", "--rows", "3000", "--classes", "12", "--repeats", "2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["rows"] == 3000
    assert found["output_bytes"] > found["source_bytes"]
    assert len(found["seconds"]["prepare"]) == 2
    for kind in ("write_text", "write_lines", "write_files"):
        assert len(found["seconds"][kind]) == 2
        assert found[f"ratio_to_{kind}"] > 0
    assert 10e6 < found["prepare_peak_resident_bytes"] < 450e6
    # Each first training renders, and each later one finds what it left.
    assert all(len(found["seconds"][kind]) == 2 for kind in ("tokens", "tokens_again"))
    assert found["tokens_peak_resident_bytes"] > 10e6


def test_answers(command: Command) -> None:
    done = command(
        "bench", "answers", "--recipe", "polyglot_1_3b_ohlora", "--size", "tiny", "--steps", "4", "--questions", "12",
        "--repeats", "2", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["same"] == 1
    loop, ours = (found["seconds_each"][way] for way in ("loop", "ours"))
    assert len(loop) == len(ours) == found["ratio_to_loop"]["pairs"] == 2
    assert found["ratio_to_loop"]["value"] == pytest.approx((loop[0] / ours[0] * loop[1] / ours[1]) ** 0.5)
    for name, what in (("gemma3_12b_opercode", "generates nothing"), ("nobody", "not known")):
        done = command("bench", "answers", "--recipe", name)
        assert done.returncode == 2
        assert what in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_classify(command: Command) -> None:
    done = command(
        "bench", "classify", "--size", "tiny", "--steps", "4", "--classes", "12", "--texts", "16", "--repeats", "1",
        "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "NOT" in found["model"]
    assert found["valid"]["tree"] == 1
    rates = found["payments_per_second"]
    assert found["ratio_to_one_at_a_time"] == pytest.approx(rates["tree"] / rates["one_at_a_time"])
    assert found["ratio_to_bound"] == pytest.approx(rates["tree"] / rates["bound"])
    assert found["ratio_to_least"] == pytest.approx(rates["tree"] / rates["least"])
    assert found["expansions"] >= 1


def test_balance(command: Command, tmp_path: Path) -> None:
    done = command(
        "bench", "balance", "--ways", "cross-entropy", "sqrt sampler", "--seeds", "1", "--rows", "700", "--classes",
        "4", "--out", "found", "--flags=--max-steps 3 --eval-rows 20",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "found" / "summary.json").read_text())
    assert [line["way"] for line in summary["ways"]] == ["cross-entropy", "sqrt sampler"]
    assert all("failed" not in line for line in summary["ways"])
    for name, sampler in (("cross-entropy", "none"), ("sqrt-sampler", "sqrt")):
        config = json.loads((tmp_path / "found" / "runs" / f"{name}-0" / "training_config.json").read_text())
        assert config["balance"]["sampler"] == sampler
        assert config["settings"]["max_steps"] == 3
    assert (tmp_path / "found" / "balance.png").read_bytes().startswith(b"\x89PNG")
    # What is there is not trained again.
    again = command(
        "bench", "balance", "--ways", "cross-entropy", "--seeds", "1", "--rows", "700", "--classes", "4", "--out",
        "found", "--json",
    )  # fmt: skip
    (run,) = json.loads(again.stdout)["runs"]
    assert run == summary["runs"][0]


def test_recipes(command: Command, tmp_path: Path) -> None:
    flags = "--flags=--max-steps 2 --source persona.csv"
    (tmp_path / "persona.csv").write_bytes((ROOT / "recipes/samples/ohlora.csv").read_bytes())
    names = ("polyglot_1_3b_ohlora", "gemma3_1b_counsel")
    done = command("bench", "recipes", "--recipes", *names, "--backend", "peft", "--out", "found.json", flags)
    assert done.returncode == 0, done.stderr
    persona, counsel = json.loads((tmp_path / "found.json").read_text())["recipes"]
    assert persona["train"]["optimizer_steps"] == 2
    assert "NOT" in persona["notice"]
    assert f"| chrf | {persona['test']['chrf']:.3f} |" in done.stdout
    # The other recipe cannot read this file, and says so in the table's place.
    assert "failed" in counsel
    assert f"gemma3_1b_counsel failed: {counsel['failed']}" in done.stdout


def test_an_unknown_measurement_or_way(command: Command) -> None:
    for arguments, message in (
        (("speed",), "no measurement 'speed'; there are compare, plan, report, diff"),
        (("recipes", "--recipes", "luck"), "--recipes 'luck': unknown; there are gemma2_2b_ohlora"),
        (("balance", "--ways", "luck"), "--ways 'luck': unknown; there are 'cross-entropy'"),
    ):
        done = command("bench", *arguments)
        assert done.returncode == 2
        assert message in done.stderr


def test_the_default_is_what_the_committed_comparison_says() -> None:
    ways = {way["way"]: way for way in json.loads((ROOT / "results/balance/summary.json").read_text())["ways"]}
    balance = recipe("gemma3_12b_opercode").balance
    assert (balance.sampler, balance.class_weights, balance.focal_gamma) == ("sqrt", "none", 0)
    ours, plain = ways["sqrt sampler"]["f1_macro"], ways["cross-entropy"]["f1_macro"]
    assert ours["mean"] - plain["mean"] >= 0.10
    assert ours["low"] > plain["high"]
    assert not any(way["f1_macro"]["low"] > ours["high"] for way in ways.values())


def test_readme_has_the_figures_of_the_results(command: Command) -> None:
    done = command("bench", "figures", "--check")
    assert done.returncode == 0, done.stderr
    readme, *others = (file.read_text(encoding="utf-8") for file in FILES)
    assert sorted(re.findall(r"<!-- figures: (\w+) -->", "".join([readme, *others]))) == sorted(TABLES)
    for name, table in TABLES.items():
        assert len(table().splitlines()) > 4, name
    broken = re.sub(r"0\.\d\d\d", "0.999", readme)
    assert fill(broken) != broken
    assert fill(broken).count("0.999") < broken.count("0.999")
