"""bench train: the same rows and steps in every arm, and what is said of them."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from conftest import need


def row(arm: str, repeat: int, rate: float, losses: list[float], **more: Any) -> dict[str, Any]:
    steps = [{"seconds": 50 / rate, "loss": loss, "tokens": 50} for loss in losses]
    told = {
        "tokens_per_second": rate, "supervised_tokens_per_second": rate / 10, "samples_per_second": rate / 50,
        "first_step_seconds": 2.0, "peak_resident_bytes": 2**30, "peak_allocated_bytes": None, "steps": steps,
        "mfu": 0.3, "matmul_flops_per_second": 1e11,
    }  # fmt: skip
    return {"arm": arm, "repeat": repeat, "status": "measured", "choice": {"dtype": "float32"}, "train": told, **more}


def test_ratios_are_of_pairs_and_other_losses_are_no_gain() -> None:
    from bench.train import compared, table

    rows = [
        row(arm, repeat, rate * (1 + repeat), [2.0, last])
        for repeat in (0, 1)
        for arm, rate, last in (("ours", 300.0, 1.0), ("trl", 100.0, 1.001), ("unsloth", 200.0, 1.5))
    ]
    rows.append({"arm": "unsloth-compiled", "repeat": 0, "status": "failed", "reason": "no compiler"})
    found = compared(rows, ("trl", "unsloth", "unsloth-compiled"), 0)
    assert found["ratio_to_trl"] == pytest.approx(3)
    # A faster training that is another one is nobody's rival.
    assert (found["best_other"], found["ratio_to_best_other"]) == ("trl", pytest.approx(3))
    assert found["arms"]["trl"]["same_training"]
    assert not found["arms"]["unsloth"]["same_training"]
    said = table(found)
    assert "no, 33.3% apart" in said
    assert "failed: no compiler" in said
    assert "Ours computes at 30% of the 100 GFLOP/s" in said
    assert "The fastest other is trl: ours is x 3.00." in said
    rows[-2]["train"]["steps"][1]["tokens"] = 40
    assert "| no, other rows |" in table(compared(rows, ("trl", "unsloth"), 0))
    rows[-2]["train"]["steps"][1]["tokens"] = 50
    drawn = compared(rows, ("trl", "unsloth"), 0, dropout=True)
    assert drawn["arms"]["trl"]["same_training"] is None
    assert "| 0.1% apart |" in table(drawn)


def test_a_round_s_ratio_is_of_steps_on_the_same_rows_and_no_outlier_is_anybody_s() -> None:
    from bench.train import speed

    def steps(*seconds: float, tokens: int = 7) -> list[dict[str, float]]:
        return [{"seconds": second, "tokens": tokens} for second in seconds]

    # The first step and one of warmup do not count; the last time the machine did something else.
    ours = steps(9, 9, 1, 2, 3, 1, 90)
    assert speed(ours, steps(1, 1, 2, 4, 6, 2, 9), warmup=1) == pytest.approx(2)
    assert speed(ours, steps(1, 1, 2, 4, 6, 2, 9, tokens=14), warmup=1) == pytest.approx(1)


def test_a_handicap_is_told_beside_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from bench.rivals import handicap
    from bench.train import compared, table

    for able in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda able=able: able)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
        assert handicap({torch.float32}, "cpu") is handicap({torch.bfloat16}, "cuda") is None
        told = handicap({torch.bfloat16}, "cpu")
        found = compared([row("ours", 0, 3.0, [1, 1]), row("trl", 0, 1.0, [1, 1], handicap=told)], ("trl",), 0)
        assert ("trl is slower here than elsewhere: it keeps" in table(found)) == (not able)


def test_dropout_is_the_recipe_s_own_or_none() -> None:
    """Its small models' settings go without, and would be no measurement of it."""
    from bench import train

    for dropout, expected in ((False, "0"), (True, "0.05")):
        flags = train.case(train.Train(dropout=dropout), "gemma3_12b_opercode", "ours", 0).flags
        assert flags[flags.index("--lora-dropout") + 1] == expected


def test_ours_compiled_is_nobody_else_and_has_ratios_of_its_own() -> None:
    from bench import train

    flags = {arm: train.case(train.Train(), "llama_1b_civil", arm, 0).flags for arm in ("ours", "ours-compiled")}
    assert {"--compile"} == set(flags["ours-compiled"]) - set(flags["ours"])
    rows = [row(arm, 0, rate, [2.0, 1.0]) for arm, rate in (("ours", 300.0), ("trl", 100.0))]
    rows.append(row("ours-compiled", 0, 400.0, [2.0, 1.0], compiled={"seconds": 30.0}))
    found = train.compared(rows, ("trl", "ours-compiled"), 0)
    assert (found["best_other"], found["ratio_to_trl"]) == ("trl", pytest.approx(3))
    compiled = found["arms"]["ours-compiled"]
    assert {arm: ratio["value"] for arm, ratio in compiled["this_to"].items()} == pytest.approx(
        {"ours": 4 / 3, "trl": 4}
    )
    assert compiled["compiled"] == [{"seconds": 30.0}]
    assert "ours-compiled to trl: x 4.00" in train.table(found)
    failed = {"arm": "ours-compiled", "repeat": 0, "status": "failed", "reason": "no compiler"}
    assert "this_to" not in train.compared([*rows[:2], failed], ("trl", "ours-compiled"), 0)["arms"]["ours-compiled"]


def test_a_step_s_rows_may_be_named() -> None:
    from bench import train

    named = train.Train(batch_size=2, accumulation=8)
    for args, expected in ((named, ["2", "8"]), (train.Train(), [])):
        flags = train.case(args, "gemma3_12b_opercode", "trl", 0).flags
        assert [flags[flags.index(f) + 1] for f in ("--batch-size", "--accumulation") if f in flags] == expected


def test_without_ours_there_is_nothing_to_compare() -> None:
    from bench.train import compared

    found = compared(
        [{"arm": "ours", "repeat": 0, "status": "failed", "reason": "x"}, row("trl", 0, 1.0, [1.0])], ("trl",), 0
    )
    assert found["ratio_to_trl"] is None
    assert found["arms"]["trl"]["status"] == "measured"


@pytest.mark.parametrize("rival", ["trl", "unsloth"])
def test_the_same_rows_give_the_same_losses(rival: str, command: Callable[..., Any]) -> None:
    need("unsloth" if rival == "unsloth" else "peft", "gemma3_12b_opercode")
    done = command(
        "bench", "train", "--recipes", "gemma3_12b_opercode", "--size", "tiny", "--arms", rival, "--backend", "peft",
        "--steps", "4", "--warmup", "0", "--repeats", "1", "--batch-size", "4", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    arms = json.loads(done.stdout)["recipes"]["gemma3_12b_opercode"]["arms"]
    assert arms[rival]["status"] == arms["ours"]["status"] == "measured", done.stdout
    assert arms[rival]["same_rows"]
    assert arms[rival]["losses"] == pytest.approx(arms["ours"]["losses"], rel=2e-3)
    assert arms["ours"]["mfu"] > 0
    assert "handicap" not in arms["ours"]
    import torch

    from bench.rivals import handicap

    # Both round a quantised model's adapter to bfloat16.
    assert arms[rival].get("handicap") == handicap({torch.bfloat16}, "cpu")


def test_a_slow_down_that_was_put_there_is_found(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_PLANT_SLEEP", "ours-again:1.0")
    done = command(
        "bench", "train", "--recipes", "polyglot_1_3b_ohlora", "--size", "tiny", "--arms", "ours-again", "--backend",
        "peft", "--turns", "step", "--steps", "10", "--warmup", "1", "--repeats", "1", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["settings"]["turns"] == "step"
    found = summary["recipes"]["polyglot_1_3b_ohlora"]
    (ratio,) = found["arms"]["ours-again"]["rounds"]
    assert ratio == found["arms"]["ours-again"]["ours_to_this"]["value"]
    # It sleeps as long as each step took.
    assert ratio > 1.4
    # Ours again is nobody else.
    assert found["best_other"] is None


def test_who_is_not_known(command: Callable[..., Any]) -> None:
    done = command("bench", "train", "--arms", "axolotl")
    assert done.returncode == 2
    assert "--arms 'axolotl': unknown; there are trl" in done.stderr


def test_a_figure_tells_what_was_not_measured_and_has_no_interval_of_one_round() -> None:
    from bench.figures import _faster

    ratio = {"value": 1.5, "low": None, "high": None}
    once = {"status": "measured", "ours_to_this": ratio, "same_training": True}
    assert _faster(once) == "x 1.50"
    other = {**once, "ours_to_this": {**ratio, "low": 1.1, "high": 2.0}, "same_training": False}
    assert _faster(other) == "x 1.50 [1.10, 2.00], other losses"
    assert _faster({"status": "failed", "reason": "no room"}) == "failed: no room"
    assert _faster(None) == ""
