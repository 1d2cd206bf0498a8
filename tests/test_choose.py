"""The ladder: what is chosen where, and why."""

import sys
from pathlib import Path

import pytest

from fallback import choose as choosing
from fallback.choose import CannotRun, choose
from fallback.gpu import Gpu

GIB = 2**30
CARDS = {
    "Quadro M6000": Gpu("Quadro M6000", (5, 2), 12 * GIB),
    "GTX 1080": Gpu("GTX 1080", (6, 1), 8 * GIB),
    "V100": Gpu("V100", (7, 0), 16 * GIB),
    "T4": Gpu("T4", (7, 5), 16 * GIB),
    "RTX 3060": Gpu("RTX 3060", (8, 6), 12 * GIB),
}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are about cards; whether Unsloth imports is tried for real in the ones that say so."""
    monkeypatch.setattr(choosing, "_probe", lambda: None)


@pytest.mark.parametrize("card", CARDS)
def test_no_triton_below_seven(card: str) -> None:
    gpu = CARDS[card]
    choice = choose("llama", gpu=gpu, quantization="4bit", optimizer="paged_adamw_8bit")
    modern = gpu.capability >= (7, 0)
    assert choice.backend == ("unsloth" if modern else "peft")
    assert choice.triton == modern
    if not modern:
        assert "7.0" in choice.reasons["backend"]
        assert "plain torch" in choice.reasons["loss"]


@pytest.mark.parametrize(
    ("card", "model", "dtype"),
    [
        ("RTX 3060", "gemma3_text", "bfloat16"),
        ("T4", "llama", "float16"),
        ("T4", "gemma3_text", "float32"),
        ("GTX 1080", "llama", "float32"),
        ("Quadro M6000", "gpt_neox", "float32"),
    ],
)
def test_dtype(card: str, model: str, dtype: str) -> None:
    assert choose(model, gpu=CARDS[card]).dtype == dtype


def test_a_card_without_bitsandbytes_kernels_is_told_so() -> None:
    choice = choose("llama", gpu=CARDS["Quadro M6000"], quantization="4bit", optimizer="paged_adamw_8bit")
    assert (choice.quantization, choice.optimizer) == ("none", "adamw_torch")
    assert "6.0" in choice.reasons["quantization"]


def test_a_named_backend_that_cannot_run_is_an_error_with_a_remedy() -> None:
    with pytest.raises(CannotRun, match=r"7\.0.*--backend peft"):
        choose("llama", "unsloth", gpu=CARDS["GTX 1080"])


def test_every_decision_has_a_reason() -> None:
    for gpu in [None, *CARDS.values()]:
        choice = choose("gemma2", gpu=gpu, quantization="8bit", optimizer="paged_adamw_8bit")
        assert set(choice.reasons) >= {"backend", "device", "dtype", "attention", "quantization", "optimizer", "loss"}
        assert all(choice.reasons.values())


def test_gemma_2_caps_its_scores() -> None:
    assert choose("gemma2", gpu=None).attention == "eager"
    assert choose("gemma3_text", gpu=None).attention == "sdpa"


def test_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = choose("llama", gpu=None, quantization="8bit", optimizer="paged_adamw_8bit")
    assert (choice.device, choice.optimizer, choice.quantization, choice.triton) == (
        "cpu",
        "adamw_torch",
        "none",
        False,
    )
    monkeypatch.setenv("UNSLOTH_DISABLE_CPU_FALLBACK", "1")
    stepped_down = choose("llama", gpu=None)
    assert stepped_down.backend == "peft"
    assert "UNSLOTH_DISABLE_CPU_FALLBACK" in stepped_down.reasons["backend"]


def test_an_unsloth_that_does_not_import_is_a_reason_not_a_crash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A real probe of a real, broken package."""
    monkeypatch.undo()
    (tmp_path / "unsloth.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(choosing, "_CACHE", tmp_path / "probes")
    choice = choose("llama", gpu=None)
    assert choice.backend == "peft"
    assert "torchvision::nms" in choice.reasons["backend"]
    assert not (tmp_path / "probes").exists()


def test_unsloth_is_not_imported_to_find_out() -> None:
    choose("llama", gpu=None)
    assert "unsloth" not in sys.modules


def test_attention_that_was_asked_for_or_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    modern = CARDS["RTX 3060"]
    assert choose("llama", gpu=modern).attention == "sdpa"
    assert choose("llama", gpu=modern, attention="eager").attention == "eager"
    assert choose("gemma2", gpu=modern).attention == "eager"
    with pytest.raises(CannotRun, match="caps its attention scores"):
        choose("gemma2", gpu=modern, attention="sdpa")
    for gpu in (None, CARDS["T4"]):
        with pytest.raises(CannotRun, match=r"compute capability 8\.0"):
            choose("llama", "peft", gpu=gpu, attention="flash_attention_2")
    monkeypatch.setattr(choosing.importlib.util, "find_spec", lambda name: None if name == "flash_attn" else object())
    with pytest.raises(CannotRun, match="flash-attn is not installed"):
        choose("llama", "peft", gpu=modern, attention="flash_attention_2")
    monkeypatch.setattr(choosing.importlib.util, "find_spec", lambda name: object())
    assert choose("llama", "peft", gpu=modern, attention="flash_attention_2").attention == "flash_attention_2"
