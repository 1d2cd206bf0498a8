"""What a training needs, calculated: exact where exactness is possible, and against published calculations."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import RECIPES, ROOT, recipe

from fallback.gpu import Gpu
from recipes.stages import pace, plan, plan_data, plan_report
from recipes.stages.base_model import architecture
from recipes.stages.recipe import UserError

Command = Callable[..., subprocess.CompletedProcess[str]]
# Bytes of adapter_model.safetensors as PEFT writes it.
ADAPTERS = {
    "gemma3_12b_opercode": 261_972_344,
    "gemma3_1b_counsel": 104_414_464,
    "llama_1b_civil": 90_207_248,
    "polyglot_1_3b_ohlora": 50_338_704,
    "gemma2_2b_ohlora": 332_316_480,
}
# Peak of what is allocated, GiB, at batch 2 with checkpointing, without LoRA, gradients and optimiser: an independent
# calculation by the same method gave 9.0, 1.9 and 2.1 with them, at 16 bits.
PEAKS = {"gemma3_12b_opercode": (1024, 8.5), "gemma3_1b_counsel": (2048, 1.68), "llama_1b_civil": (2048, 1.94)}
PARAMETERS = {
    "gemma3_12b_opercode": (11_766_034_176, 65_470_464),
    "gemma3_1b_counsel": (999_885_952, 26_091_520),
    "llama_1b_civil": (1_235_814_400, 22_544_384),
    "polyglot_1_3b_ohlora": (1_331_810_304, 12_582_912),
    "gemma2_2b_ohlora": (2_614_341_888, 83_066_880),
}
_made: dict[Any, plan.Planned] = {}


def planned(name: str, **changes: Any) -> plan.Planned:
    key = name, tuple(changes.items())
    if key not in _made:
        _made[key] = plan.plan(recipe(name), replace(recipe(name).settings, **changes), 1000)
    return _made[key]


@pytest.mark.parametrize("name", RECIPES)
def test_parameters_and_the_adapter_s_size_are_exact(name: str) -> None:
    found = planned(name)
    assert (found.total_parameters, found.trainable_parameters) == PARAMETERS[name]
    assert found.adapter_bytes == ADAPTERS[name]


def test_the_published_counts_as_both_commands_print_them(command: Command) -> None:
    flags = "--rows", "5046", "--gpu", "12GB", "--json"
    done = command("bench", "plan", "--recipe", "gemma3_1b_counsel", *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["trainable_parameters"] == 26_091_520
    assert found["optimizer_steps"] == 6310
    assert found["total_parameters"] == 999_885_952
    assert found["fits"] == {"a card with 12 GiB": "fits"}
    assert found["tokens_per_epoch"] > 5046
    assert "estimate" in found["tokens_counted"]
    assert set(found["memory_bytes"]) == set(found["peak_bytes"]) == {"peft", "peft+liger", "unsloth"}
    for backend, terms in found["memory_bytes"].items():
        assert sum(terms.values()) == found["peak_bytes"][backend]
    assert set(found["error_last_measured"]) == {"peft", "peft+liger", "unsloth"}
    assert found["error_last_measured"]["peft+liger"] is None, "it needs a GPU, and none has been measured"


@pytest.mark.parametrize("name", PEAKS)
def test_memory_against_another_calculation(name: str) -> None:
    length, expected = PEAKS[name]
    memory = planned(name, batch_size=2, max_length=length).memory_bytes["peft"]
    parts = "quantized_weights", "unquantized_weights", "embedding", "activations", "loss_head"
    assert sum(memory[part] for part in parts) / plan.GIB == pytest.approx(expected, rel=0.05)


def test_what_is_alive_is_counted() -> None:
    import torch

    from recipes.stages.footprint import Live

    live = Live()
    with torch.device("meta"), live:
        a = torch.empty(1024, dtype=torch.float32)
        assert live.now == 4096
        view = a[10:]
        assert live.now == 4096, "a view is no storage of its own"
        b = a * 2
        assert live.now == 8192
        del a, b
        assert live.now == 4096, "the view keeps it alive"
        del view
        assert live.now == 0
    assert live.peak == 8192


@pytest.mark.parametrize(("name", "checkpointing"), [("gemma3_1b_counsel", True), ("llama_1b_civil", False)])
def test_few_layers_tell_what_all_of_them_hold(name: str, checkpointing: bool) -> None:
    from recipes.stages import footprint
    from recipes.stages.base_model import architecture

    config, settings = architecture(recipe(name)), recipe(name).settings
    on = footprint.Conditions(checkpointing=checkpointing)
    batch = footprint.Batch(2, 128, 254)
    whole = footprint.Shape.of(config, config["num_hidden_layers"], settings, on)
    held = footprint.moments(whole, batch).with_head(footprint.head_moments(whole, on.loss, batch))
    assert footprint.peak_bytes(config, settings, on, [batch]) == held


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", RECIPES)
def test_what_an_operation_made_before_is_what_it_makes(
    name: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recipes.stages import footprint
    from recipes.stages.base_model import architecture

    config, settings = architecture(recipe(name)), recipe(name).settings
    shape = footprint.Shape.of(config, 2, settings, footprint.Conditions(attention=attention))
    counted = footprint.moments.__wrapped__
    first, again = (counted(shape, footprint.Batch(2, 64, 126)) for _ in range(2))
    monkeypatch.setattr(footprint, "_made", lambda func, args, kwargs: func(*args, **kwargs))
    assert first == again == counted(shape, footprint.Batch(2, 64, 126))


def test_checkpointing_and_length_do_what_they_should() -> None:
    chosen, gpu = recipe("llama_1b_civil"), plan.card("24GB")

    def activations(**changes: Any) -> int:
        return plan.memory_on(chosen, replace(chosen.settings, **changes), gpu)["activations"]

    kept = activations(checkpointing=True, max_length=1024)
    assert activations(checkpointing=False, max_length=1024) > 3 * kept
    assert activations(checkpointing=True, max_length=2048) == pytest.approx(2 * kept, rel=0.1)
    plain = plan.memory_on(chosen, replace(chosen.settings, quantization="none"), gpu)
    assert plain["quantized_weights"] == 0 < plain["unquantized_weights"]


def test_other_kernels_hold_less_and_other_losses_more() -> None:
    memory = planned("llama_1b_civil").memory_bytes
    assert memory["unsloth"]["activations"] < memory["peft+liger"]["activations"] < memory["peft"]["activations"]
    chosen = recipe("llama_1b_civil")
    heads = plan.otherwise(chosen, chosen.settings)["loss_head"]
    assert heads["full logits"] > 10 * max(heads["chunked"], heads["fused"])


@pytest.mark.parametrize("backend", ["peft", "peft+liger", "unsloth"])
def test_no_division_of_a_step_holds_more_than_the_one_that_is_calculated(backend: Any) -> None:
    """More examples go through at once where they are short: whatever their lengths, not more tokens."""
    from recipes.stages import footprint

    chosen = recipe("gemma3_12b_opercode")
    settings = replace(chosen.settings, batch_size=2, accumulation=8, max_length=512)
    gpu = plan.card(plan.REFERENCE)
    on = plan.conditions(chosen, plan.choice_for(chosen, settings, gpu, backend), settings)
    public = architecture(chosen)
    calculated = footprint.peak_bytes(public, settings, on, plan.full_batches(settings))
    for rows, length in ((16, 64), (8, 128), (5, 204), (3, 341)):
        batch = footprint.Batch(rows, length, rows * (length - 1), first=rows == 16)
        assert footprint.peak_bytes(public, settings, on, [batch]) <= calculated


@pytest.mark.parametrize(
    ("tokens", "shapes"),
    [(None, [(2, 512, False)]), (0, [(2, 512, False)]), (100, [(1, 512, False)]), (512, [(1, 512, False)]),
     (513, [(1, 512, False), (2, 256, False)]), (1500, [(2, 512, False), (3, 500, False)]),
     (2048, [(4, 512, False)]), (16 * 512 - 1, [(15, 512, False), (16, 511, False)]), (10**6, [(16, 512, True)])],
)  # fmt: skip
def test_the_worst_batch_has_as_many_tokens_as_may_go_through_at_once(
    tokens: int | None, shapes: list[tuple[int, int, bool]]
) -> None:
    settings = replace(
        recipe("gemma3_12b_opercode").settings, batch_size=2, accumulation=8, max_length=512, batch_tokens=tokens
    )
    batches = plan.full_batches(settings)
    assert [(batch.rows, batch.length, batch.first) for batch in batches] == shapes
    assert all(batch.supervised == batch.rows * (batch.length - 1) for batch in batches)


def test_fewer_tokens_at_once_are_the_first_thing_to_change() -> None:
    chosen = recipe("gemma3_12b_opercode")
    gpu = plan.card("12GB")
    wide = replace(chosen.settings, batch_size=2, accumulation=8, max_length=512, batch_tokens=8192)
    flags = plan.remedy(chosen, wide, gpu)
    assert flags is not None
    assert flags.startswith("--batch-tokens ")
    fewer = replace(wide, batch_tokens=int(flags.split()[1]))
    assert plan.verdict(plan.need(chosen, fewer, gpu), gpu) == "fits"
    assert plan.verdict(plan.need(chosen, wide, gpu), gpu) != "fits"
    # Shorter examples are of use only where no more of them go through at once.
    least = [flags for flags, _ in plan.remedies(wide)][-1]
    assert "--batch-tokens 128 --max-length 128" in least
    assert least.count("--batch-tokens") == 1


def test_the_verdict_follows_the_card() -> None:
    chosen = recipe("gemma3_12b_opercode")
    small, large = (Gpu("some", (8, 6), gib * plan.GIB) for gib in (6, 24))
    assert plan.verdict(plan.need(chosen, chosen.settings, small), small) == "does not fit"
    assert plan.verdict(plan.need(chosen, chosen.settings, large), large) == "fits"
    assert plan.largest_batch(chosen, chosen.settings, small) == 0
    # Gemma overflows float16, so a card without bfloat16 computes it in float32.
    old = Gpu("T4", (7, 5), 24 * plan.GIB)
    assert plan.need(chosen, chosen.settings, old) > 1.2 * plan.need(chosen, chosen.settings, large)


def test_the_largest_batch_and_length_are_the_largest_that_fit() -> None:
    chosen, gpu = recipe("llama_1b_civil"), plan.card("12GB")

    def fits(**changes: int) -> bool:
        return plan.verdict(plan.need(chosen, replace(chosen.settings, **changes), gpu), gpu) == "fits"

    batch, length = (find(chosen, chosen.settings, gpu) for find in (plan.largest_batch, plan.largest_length))
    assert fits(batch_size=batch)
    assert not fits(batch_size=batch + 1)
    assert fits(max_length=length)
    assert not fits(max_length=round(length * 1.1))


def test_what_is_to_be_changed_first_makes_it_fit() -> None:
    chosen = recipe("gemma2_2b_ohlora")
    gpu = plan.card("6GB")
    assert plan.remedy(chosen, chosen.settings, gpu) == "--quantization 4bit"
    assert plan.remedy(recipe("gemma3_12b_opercode"), recipe("gemma3_12b_opercode").settings, plan.card("6GB")) is None


@pytest.mark.parametrize(("memory", "preset"), [("80GB", "24gb"), ("10.1GB", "12gb"), ("4GB", None)])
def test_the_best_preset_that_fits(memory: str, preset: str | None) -> None:
    chosen = recipe("gemma3_12b_opercode")
    verdicts = plan.presets(chosen, chosen.settings, plan.card(memory))
    assert next((name for name, told in verdicts.items() if told == "fits"), None) == preset


def test_presets_need_not_be_named_after_memory() -> None:
    chosen = recipe("llama_1b_civil")
    assert set(chosen.presets_by_quality) == set(chosen.presets)
    assert next(iter(plan.presets(chosen, chosen.settings, plan.card("12GB")).items())) == ("quality", "fits")


def test_asking_for_a_preset_without_a_gpu_is_one_line(command: Command) -> None:
    flags = "train", "--size", "full", "--weights", "random", "--auto-preset"
    done = command("recipes.llama_1b_civil", *flags, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2
    assert "--auto-preset: there is no GPU here" in done.stderr


def test_tokens_are_those_of_the_file(tmp_path: Path) -> None:
    chosen = recipe("llama_1b_civil")
    lines = ["question,answer,category,difficulty"]
    lines += [f"{'소유권은 언제 넘어가나요? ' * n},등기를 마친 때입니다. {n},일반,하" for n in range(1, 11)]
    file = tmp_path / "qa.csv"
    file.write_text("\n".join(lines), encoding="utf-8")
    counted = plan_data.count(chosen, chosen.options, file, None, None, 2048)
    assert counted.rows == 8
    assert str(file) in counted.how
    shorter = plan_data.count(chosen, chosen.options, file, None, None, 48)
    assert shorter.tokens_per_epoch < counted.tokens_per_epoch
    scaled = plan_data.count(chosen, chosen.options, file, None, 800, 2048)
    assert scaled.tokens_per_epoch == pytest.approx(100 * counted.tokens_per_epoch, rel=0.01)


def test_time_follows_the_card() -> None:
    found = planned("llama_1b_civil")
    counted = plan_data.Counted(1000, 200_000, "")
    chosen = recipe("llama_1b_civil")
    slow, fast = plan.card("T4"), plan.card("H100")
    seconds = plan_report.seconds_by_device(chosen, chosen.settings, found, counted, [slow, fast], {"here": 1e12})
    assert seconds["H100"] < seconds["T4"] < seconds["here"]  # type: ignore[operator]
    by_hand = 4 * 200_000 * found.flops_per_token / (1e12 * 0.3)
    assert seconds["here"] == pytest.approx(by_hand)


def test_cards_by_name_and_by_memory() -> None:
    assert plan.card("12GB").memory_bytes == plan.card("12 GiB").memory_bytes == 12 * plan.GIB
    assert plan.card("NVIDIA GeForce rtx 4090").capability == (8, 9)
    assert set(pace.TFLOPS) == set(plan.CARDS)
    with pytest.raises(UserError, match="give its memory, as in --gpu 12GB"):
        plan.card("a toaster")


def test_what_it_prints(command: Command) -> None:
    done = command(
        "recipes.llama_1b_civil", "plan", "--preset", "fast", "--gpu", "2GB", "RTX 4090", "--max-length", "512"
    )
    assert done.returncode == 0, done.stderr
    for expected in (
        "batch 4 x 4, 512 tokens each",
        "22,544,384",
        "embedding (and head)",
        "at most (size full on NVIDIA H200)",
        "verdicts are for peft",
        "a card with 2 GiB",
        "change first: take",
        "RTX 4090",
        "which is an assumption",
    ):
        assert expected in done.stdout, expected


def test_an_unknown_card_is_one_line(command: Command) -> None:
    done = command("recipes.llama_1b_civil", "plan", "--gpu", "banana")
    assert done.returncode == 2
    assert "--gpu 'banana': unknown" in done.stderr
    assert "Traceback" not in done.stderr


# A machine with a card of this name, for the process and for those that it starts.
A_CARD = """
import fallback.gpu
from fallback.cards import card
fallback.gpu.read_gpu = lambda: card("RTX 3060")
"""


def test_the_preset_that_a_calculation_picks(command: Command, tmp_path: Path) -> None:
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "sitecustomize.py").write_text(A_CARD)
    env = {"PYTHONPATH": f"{tmp_path / 'card'}:{ROOT}"}
    done = command("recipes.gemma3_12b_opercode", "plan", "--presets", "--json", env=env)
    assert done.returncode == 0, done.stderr
    [verdicts] = json.loads(done.stdout).values()
    best = next(name for name, told in verdicts.items() if told == "fits")
    done = command("recipes.gemma3_12b_opercode", "train", "--auto-preset", "--size", "full", "--help", env=env)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.replace("│", " ").split())
    assert f"(default: {best})" in text
