"""The ladder: what is chosen where, and why. What a card can do is described in tests/test_components.py."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, recipe

from fallback import choose as choosing
from fallback import components, cpu, probe
from fallback.cards import card
from fallback.choose import CannotRun, choose
from fallback.torch_build import TorchBuild
from recipes.stages import fine_tune, loading
from recipes.stages.base_model import Chosen, settle
from recipes.stages.cli import parse_train
from recipes.stages.fine_tune import tried_out
from recipes.stages.recipe import Sampling, Settings
from recipes.stages.resume import Begun
from recipes.stages.run import Run, write_json
from recipes.stages.train import sft_arguments
from recipes.stages.validation import AnswerValidation

CU126 = TorchBuild("2.14.1+cu126", "12.6", ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"))
CU128 = TorchBuild("2.10.0+cu128", "12.8", ("sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"))
CU130 = TorchBuild("2.14.1+cu130", "13.0", ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"))
BUILDS = {"12.6": CU126, "12.8": CU128, "13.0": CU130}
MODELS = ("llama", "gemma3_text", "gpt_neox")

# Of a recipe that asks for 4 bits and the paged 8-bit optimiser.
WHOLE = """
card         | torch's CUDA   | model           | backend device dtype    attention quantization optimizer       triton
Quadro M6000 | 12.6           | all             | peft    cuda   float32  sdpa      none         adamw_torch      no
Quadro M6000 | 12.8 13.0      | all             | peft    cpu    float32  sdpa      4bit         adamw_torch      no
P100         | 12.6           | all             | peft    cuda   float32  sdpa      4bit         paged_adamw_8bit no
P100         | 12.8 13.0      | all             | peft    cpu    float32  sdpa      4bit         adamw_torch      no
GTX 1080     | 12.6           | all             | peft    cuda   float32  sdpa      4bit         paged_adamw_8bit no
GTX 1080     | 12.8 13.0      | all             | peft    cpu    float32  sdpa      4bit         adamw_torch      no
V100         | 12.6 12.8      | llama gpt_neox  | unsloth cuda   float16  sdpa      4bit         paged_adamw_8bit yes
V100         | 12.6 12.8      | gemma3_text     | unsloth cuda   float32  sdpa      4bit         paged_adamw_8bit yes
V100         | 13.0           | all             | peft    cpu    float32  sdpa      4bit         adamw_torch      no
T4           | 12.6 12.8 13.0 | llama gpt_neox  | unsloth cuda   float16  sdpa      4bit         paged_adamw_8bit yes
T4           | 12.6 12.8 13.0 | gemma3_text     | unsloth cuda   float32  sdpa      4bit         paged_adamw_8bit yes
A100 80GB    | 12.6 12.8 13.0 | all             | unsloth cuda   bfloat16 sdpa      4bit         paged_adamw_8bit yes
RTX 3060     | 12.6 12.8 13.0 | all             | unsloth cuda   bfloat16 sdpa      4bit         paged_adamw_8bit yes
L4           | 12.6 12.8 13.0 | all             | unsloth cuda   bfloat16 sdpa      4bit         paged_adamw_8bit yes
H100         | 12.6 12.8 13.0 | all             | unsloth cuda   bfloat16 sdpa      4bit         paged_adamw_8bit yes
H200         | 12.6 12.8 13.0 | all             | unsloth cuda   bfloat16 sdpa      4bit         paged_adamw_8bit yes
B200         | 12.6           | all             | peft    cpu    float32  sdpa      4bit         adamw_torch      no
B200         | 12.8 13.0      | all             | unsloth cuda   bfloat16 sdpa      4bit         paged_adamw_8bit yes
RTX 5090     | 12.6           | all             | peft    cpu    float32  sdpa      4bit         adamw_torch      no
RTX 5090     | 12.8 13.0      | all             | unsloth cuda   bfloat16 sdpa      4bit         paged_adamw_8bit yes
none         | 12.6 12.8 13.0 | all             | peft    cpu    float32  sdpa      4bit         adamw_torch      no
"""


def whole() -> dict[tuple[str, str, str], tuple[str, ...]]:
    found: dict[tuple[str, str, str], tuple[str, ...]] = {}
    for line in WHOLE.strip().splitlines()[1:]:
        name, cuda, models, chosen = (part.strip() for part in line.split("|"))
        for version in cuda.split():
            for model in MODELS if models == "all" else models.split():
                assert (name, version, model) not in found, "written twice"
                found[name, version, model] = tuple(chosen.split())
    return found


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are about cards; whether Unsloth imports is tried for real in the ones that say so."""
    monkeypatch.setattr(components, "probe_unsloth", lambda gpu: None)


def test_the_table_has_every_card_under_every_torch() -> None:
    table = whole()
    assert len({name for name, _, _ in table}) == 13
    assert len(table) == 13 * len(BUILDS) * len(MODELS)


@pytest.mark.parametrize(("name", "cuda", "model"), whole())
def test_the_whole_choice(name: str, cuda: str, model: str) -> None:
    gpu = None if name == "none" else card(name)
    made = choose(model, gpu=gpu, quantization="4bit", optimizer="paged_adamw_8bit", build=BUILDS[cuda])
    got = (made.backend, made.device, made.dtype, made.attention, made.quantization, made.optimizer)
    assert (*got, "yes" if made.triton else "no") == whole()[name, cuda, model]
    assert set(made.reasons) == {"backend", "device", "dtype", "attention", "quantization", "optimizer", "loss"}
    assert all(made.reasons.values())


def test_a_card_that_this_torch_has_no_kernels_for_is_told_what_to_install() -> None:
    choice = choose("llama", gpu=card("V100"), build=CU130)
    reason = choice.reasons["device"]
    assert "torch 2.14.1+cu130 has no kernels for V100, compute capability 7.0" in reason
    assert "pip install torch==2.14.1+cu126 torchvision==" in reason
    assert "--index-url https://download.pytorch.org/whl/cu126" in reason
    newer = choose("llama", gpu=card("RTX 5090"), build=CU126).reasons["device"]
    assert "+cu130 --index-url https://download.pytorch.org/whl/cu130" in newer
    with pytest.raises(CannotRun, match=r"peft\+liger cannot run here: torch 2.14.1\+cu130.*torch==2.14.1\+cu126"):
        choose("llama", "peft+liger", gpu=card("V100"), build=CU130)
    with pytest.raises(CannotRun, match=r"need compute capability 7\.0.*torch==2.14.1\+cu126"):
        choose("llama", "peft+liger", gpu=card("GTX 1080"), build=CU130)
    kepler = choose("llama", gpu=card("Tesla K40:3.5:12"), build=CU126).reasons["device"]
    assert "a card of capability 5.0 is needed" in kepler


def test_a_card_with_torch_kernels_but_without_bitsandbytes_trains_unquantised() -> None:
    choice = choose("llama", gpu=card("Quadro M6000"), quantization="4bit", optimizer="paged_adamw_8bit", build=CU126)
    assert "below compute capability 6.0" in choice.reasons["quantization"]
    assert "below compute capability 6.0" in choice.reasons["optimizer"]
    # A torch of one's own for CUDA 12.8 may hold what bitsandbytes' binary for 12.8 does not.
    own = TorchBuild("2.14.0a0", "12.8", ("sm_61",))
    choice = choose("llama", gpu=card("GTX 1080"), quantization="4bit", optimizer="paged_adamw_8bit", build=own)
    assert (choice.device, choice.quantization, choice.optimizer) == ("cuda", "none", "adamw_torch")
    assert "binary for CUDA 12.8, torch's, has no kernels below 7.0" in choice.reasons["quantization"]
    assert "torch==2.14.1+cu126" in choice.reasons["quantization"]


def test_below_seven_the_reasons_name_it() -> None:
    choice = choose("llama", gpu=card("GTX 1080"), build=CU126)
    assert "compute capability 7.0, and GTX 1080 has 6.1" in choice.reasons["backend"]
    assert "plain torch: Triton needs compute capability 7.0" in choice.reasons["loss"]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("llama", "with code of its own for llama"),
        ("gpt_neox", "no code of its own for gpt_neox, which takes its generic"),
    ],
)
def test_unsloth_s_way_with_an_architecture_is_told(model: str, says: str) -> None:
    assert says in choose(model, gpu=card("T4")).reasons["backend"]


def test_a_gpu_here_is_judged_by_the_torch_that_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real torch, asked in a process of its own, and only where there is a GPU."""
    monkeypatch.setattr(probe, "CACHE", tmp_path)
    monkeypatch.setattr(choosing, "read_gpu", lambda: None)
    choose("llama", "peft")
    assert not list(tmp_path.glob("torch-*"))
    kepler = card("Tesla K40:3.5:12")
    monkeypatch.setattr(choosing, "read_gpu", lambda: kepler)
    choice = choose("llama", "peft")
    assert choice.device == "cpu"
    assert "has no kernels for Tesla K40" in choice.reasons["device"]
    assert len(list(tmp_path.glob("torch-*"))) == 1
    monkeypatch.setattr(probe.subprocess, "run", lambda *a, **k: pytest.fail("asked twice"))
    choose("llama", "peft")


def test_a_torch_that_does_not_import_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(probe, "CACHE", tmp_path / "probes")
    monkeypatch.setattr(choosing, "read_gpu", lambda: card("T4"))
    with pytest.raises(CannotRun, match=r"torch: it does not import: ImportError: libcudart\.so"):
        choose("llama")
    assert not (tmp_path / "probes").exists()


def test_nothing_is_compiled_where_triton_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def compiles() -> bool:
        called: list[Any] = []
        torch.compile(lambda x: x + 1, backend=lambda graph, inputs: called.append(graph) or graph.forward)(
            torch.zeros(2)
        )
        return bool(called)

    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    choose("llama", "peft", gpu=card("T4"), build=CU130).module()
    assert compiles()
    choose("llama", "peft", gpu=card("GTX 1080"), build=CU126).module()
    assert not compiles()


def test_a_card_that_stays_idle_is_hidden_from_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    choice = choose("llama", "peft", gpu=card("V100"), build=CU130)
    monkeypatch.setattr(choosing, "read_gpu", lambda: None)
    choice.module()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    monkeypatch.setattr(choosing, "read_gpu", lambda: card("V100"))
    choice.module()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_a_named_backend_that_cannot_run_is_an_error_with_a_remedy() -> None:
    with pytest.raises(CannotRun, match=r"7\.0.*--backend peft"):
        choose("llama", "unsloth", gpu=card("GTX 1080"))


@pytest.mark.parametrize(("size", "backend"), [("tiny", "peft+liger"), ("small", "peft+liger"), ("full", "unsloth")])
def test_a_small_model_does_not_wait_for_a_compiler(size: Any, backend: str) -> None:
    chosen, gpu = Chosen("some", size, "random", "folder"), card("H100")
    found = choose("llama", "auto", gpu=gpu, build=CU130, failed=tried_out(chosen, gpu))
    assert found.backend == backend
    assert ("compile for longer" in found.reasons["backend"]) == (size != "full")
    assert tried_out(chosen, None) == {}, "without a GPU there is another reason"
    assert choose("llama", "unsloth", gpu=gpu, build=CU130, failed=tried_out(chosen, gpu)).backend == "unsloth"


def test_a_training_asks_for_that(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def until_here(*_: Any, **given: Any) -> None:
        asked.update(given)
        raise CannotRun("that is all")

    monkeypatch.setattr(fine_tune, "usable_gpu", lambda: card("H100"))
    monkeypatch.setattr(fine_tune, "choose", until_here)
    here = recipe("llama_1b_civil")
    for size, told in (("tiny", {"unsloth"}), ("small", {"unsloth"}), ("full", set())):
        given = ["--size", size, "--weights", "random", "--run", str(tmp_path / "run")]
        with pytest.raises(CannotRun, match="that is all"):
            fine_tune.fine_tune(here, parse_train(here, "train", given))
        assert asked["failed"].keys() == told
        assert asked["large"] == (size != "tiny")
    assert not (tmp_path / "run").exists()


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
    assert choice.backend == "peft"
    assert "not unsloth: without a GPU it has no kernels" in choice.reasons["backend"]
    monkeypatch.setattr("fallback.choose.SLOWER_WITHOUT_A_GPU", {})
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
    monkeypatch.setattr(probe, "CACHE", tmp_path / "probes")
    monkeypatch.setattr("fallback.choose.SLOWER_WITHOUT_A_GPU", {})
    choice = choose("llama", gpu=None)
    assert choice.backend == "peft"
    assert "torchvision::nms" in choice.reasons["backend"]
    assert not (tmp_path / "probes").exists()


def test_threads_spin_briefly_unless_told_otherwise() -> None:
    asked = (
        "import os; from fallback.choose import choose; choose('llama', gpu=None).module(); "
        "print(os.environ.get('GOMP_SPINCOUNT'))"
    )

    def found(**env: str) -> str:
        inherited = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
        done = subprocess.run(
            [sys.executable, "-c", asked],
            cwd=ROOT,
            env={**inherited, **env},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split()[-1]

    assert found() == "10000"
    assert found(GOMP_SPINCOUNT="7") == "7"
    assert found(OMP_WAIT_POLICY="PASSIVE") == "None"


def test_unsloth_is_not_imported_to_find_out() -> None:
    choose("llama", gpu=None)
    assert "unsloth" not in sys.modules


def test_attention_that_was_asked_for_or_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    modern = card("RTX 3060")
    assert choose("llama", gpu=modern).attention == "sdpa"
    assert choose("llama", gpu=modern, attention="eager").attention == "eager"
    assert choose("gemma2", gpu=modern).attention == "eager"
    with pytest.raises(CannotRun, match="caps its attention scores"):
        choose("gemma2", gpu=modern, attention="sdpa")
    for gpu in (None, card("T4")):
        with pytest.raises(CannotRun, match=r"compute capability 8\.0"):
            choose("llama", "peft", gpu=gpu, attention="flash_attention_2")
    monkeypatch.setattr(components.importlib.util, "find_spec", lambda name: None if name == "flash_attn" else object())
    with pytest.raises(CannotRun, match="flash-attn is not installed"):
        choose("llama", "peft", gpu=modern, attention="flash_attention_2")
    monkeypatch.setattr(components.importlib.util, "find_spec", lambda name: object())
    assert choose("llama", "peft", gpu=modern, attention="flash_attention_2").attention == "flash_attention_2"


def test_a_precision_that_is_asked_for_or_why_not() -> None:
    def dtype(model: str, gpu: str | None, wanted: Any) -> str:
        return choose(model, "peft", gpu=gpu and card(gpu), dtype=wanted).dtype

    assert dtype("llama", None, "bfloat16") == "bfloat16"
    assert dtype("llama", "RTX 3060", "float32") == "float32"
    assert dtype("llama", "RTX 3060", "float16") == "float16"
    with pytest.raises(CannotRun, match=r"T4 only emulates it.*Use --dtype auto"):
        dtype("llama", "T4", "bfloat16")
    with pytest.raises(CannotRun, match="Gemma's activations overflow it"):
        dtype("gemma3_text", "RTX 3060", "float16")
    with pytest.raises(CannotRun, match="on GPUs only"):
        dtype("llama", None, "float16")


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str | None], None]]:
    """A processor with these flags, or a system that does not tell."""

    def described(flags: str | None) -> None:
        cpu.bfloat16.cache_clear()
        monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
        (tmp_path / "cpuinfo").unlink(missing_ok=True)
        if flags is not None:
            told = f"processor\t: 0\nmodel name\t: some\nflags\t\t: fpu avx2 {flags} sse\nbugs\t\t: amx_bf16\n\n"
            (tmp_path / "cpuinfo").write_text(told, encoding="utf-8")

    yield described
    cpu.bfloat16.cache_clear()


@pytest.mark.parametrize(
    ("flags", "instructions"),
    [
        ("avx512f avx512_bf16", "avx512_bf16"),
        ("avx512_bf16 amx_bf16", "amx_bf16"),
        ("avx512f amx_tile not_avx512_bf16", None),
        (None, None),
    ],
)
def test_a_processor_that_multiplies_bfloat16_trains_in_it(
    processor: Callable[[str | None], None], flags: str | None, instructions: str | None
) -> None:
    processor(flags)
    assert cpu.bfloat16() == instructions
    told = components.bf16(None)
    assert told.usable == (instructions is not None)
    assert str(instructions or "needs a GPU") in told.reason
    assert not components.bf16(card("T4")).usable
    trained = choose("llama", gpu=None, large=True)
    assert trained.dtype == ("bfloat16" if instructions else "float32")
    assert str(instructions or "exact") in trained.reasons["dtype"]
    assert choose("llama", gpu=None).dtype == "float32"
    assert choose("llama", gpu=None, dtype="float32", large=True).dtype == "float32"
    # What a GPU computes in does not follow from the processor beside it.
    assert choose("llama", "peft", gpu=card("T4"), build=CU130, large=True).dtype == "float16"


@pytest.mark.parametrize("trained_by", ["peft", "unsloth"])
@pytest.mark.parametrize(
    ("size", "named", "trained", "has", "answers"),
    [
        ("small", "auto", "bfloat16", "avx512_bf16", "bfloat16"),
        ("full", "auto", "float16", "amx_bf16", "float32"),
        ("small", "auto", "bfloat16", None, "float32"),
        ("tiny", "auto", "bfloat16", "avx512_bf16", "float32"),
        # On another machine, or under FSDP.
        ("small", "auto", "float32", "avx512_bf16", "float32"),
        ("small", "float32", "float32", "avx512_bf16", "float32"),
    ],
)
def test_answers_are_rounded_as_the_training_was(
    processor: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trained_by: str,
    size: Any, named: Any, trained: str, has: str | None, answers: str,
) -> None:  # fmt: skip
    processor(has)
    monkeypatch.setattr(choosing, "read_gpu", lambda: None)
    here = recipe("llama_1b_civil")
    write_json(tmp_path / "choice.json", {"backend": trained_by, "dtype": trained})
    monkeypatch.setattr(loading, "find_run", lambda *_: Run(tmp_path))
    monkeypatch.setattr(loading.adapter, "check", lambda _: None)
    chosen = settle(here, size, "random")
    monkeypatch.setattr(Chosen, "opened", lambda _: chosen)
    monkeypatch.setattr(loading, "settings_of", lambda _: replace(here.settings, dtype=named))
    # Where Unsloth is not to be had any more, another backend answers.
    monkeypatch.setattr(components, "unsloth", lambda _: components.Component(False, "not here"))
    _, _, choice, _ = loading.open_run(here, None)
    assert (choice.backend, choice.dtype) == ("peft", answers)


def test_a_training_goes_on_in_the_precision_it_was_begun_in(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Chosen("some", "small", "random", "folder")
    for dtype in ("float32", "bfloat16"):
        begun = Begun(Run(Path("nowhere")), {}, {"dtype": dtype})
        assert fine_tune.in_bfloat16(small, begun) == (dtype == "bfloat16")
    assert fine_tune.in_bfloat16(small, None)
    assert not fine_tune.in_bfloat16(replace(small, size="tiny"), None)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not fine_tune.in_bfloat16(small, None)


@pytest.mark.parametrize(
    ("gpu", "named", "expected"),
    [
        (None, "paged_adamw_8bit", "adamw_torch_fused"),
        (None, "adamw_torch", "adamw_torch_fused"),
        ("RTX 3060", "paged_adamw_8bit", "paged_adamw_8bit"),
        ("RTX 3060", "adamw_torch", "adamw_torch"),
    ],
)
def test_adamw_is_fused_on_cpus(gpu: str | None, named: Any, expected: str, tmp_path: Path) -> None:
    choice = choose("llama", "peft", optimizer=named, gpu=card(gpu) if gpu else None, build=CU130)
    # transformers would refuse the card's precision on a machine without it.
    choice = replace(choice, dtype="float32")
    looking = AnswerValidation(None, [None], 8, Sampling(), (), tmp_path)  # type: ignore[arg-type, list-item]
    assert sft_arguments(Settings(optimizer=named), choice, Run(tmp_path), 9, looking).optim == expected
