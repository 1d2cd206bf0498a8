"""What runs on which card: our tables against the installed libraries themselves."""

import ast
import importlib.util
import json
import re
import struct
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

from fallback import probe, torch_build
from fallback.cards import card
from fallback.components import BITSANDBYTES, bitsandbytes_needs, components, unsloth, unsloth_types
from fallback.torch_build import TorchBuild, read_build

Command = Callable[..., subprocess.CompletedProcess[str]]
CU126 = TorchBuild("2.14.1+cu126", "12.6", ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"))
CU130 = TorchBuild("2.14.1+cu130", "13.0", ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"))


def installed(package: str) -> Path:
    found = importlib.util.find_spec(package)
    assert found is not None
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0])


def kernels_in(library: Path) -> set[int]:
    """Architectures of the machine code in a library: the entries of its fat binaries."""
    data = library.read_bytes()
    found = set()
    for start in re.finditer(b"\x50\xed\x55\xba\x01\x00\x10\x00", data):
        place = start.start() + 16
        end = place + struct.unpack_from("<Q", data, place - 8)[0]
        while place < end:
            kind, _, header = struct.unpack_from("<HHI", data, place)
            if kind == 2:
                found.add(struct.unpack_from("<I", data, place + 28)[0])
            place += header + struct.unpack_from("<Q", data, place + 8)[0]
    return found


def test_the_binaries_of_bitsandbytes_hold_what_our_table_says() -> None:
    lowest = {}
    for library in installed("bitsandbytes").glob("libbitsandbytes_cuda*.so"):
        version = library.stem.removeprefix("libbitsandbytes_cuda")
        lowest[int(version[:2]), int(version[2:])] = divmod(min(kernels_in(library)), 10)
    assert lowest == BITSANDBYTES


@pytest.mark.parametrize(
    ("cuda", "needs"),
    [((12, 6), (6, 0)), ((12, 7), (6, 0)), ((12, 9), (7, 0)), ((12, 0), (6, 0)), ((13, 1), (7, 5)), ((14, 0), None)],
)
def test_which_binary_bitsandbytes_takes(cuda: tuple[int, int], needs: tuple[int, int] | None) -> None:
    assert bitsandbytes_needs(cuda) == needs


def test_unsloth_s_own_architectures_are_those_its_loader_dispatches() -> None:
    tree = ast.parse((installed("unsloth") / "models" / "loader.py").read_text(encoding="utf-8"))
    found = {
        node.test.comparators[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        and ast.unparse(node.test).startswith("model_type == ")
        and isinstance(node.test, ast.Compare)
        and isinstance(node.test.comparators[0], ast.Constant)
        and any(isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "dispatch_model" for line in node.body)
    }
    assert unsloth_types() == found >= {"llama", "gemma2"}


def test_the_installed_torch_is_read_without_importing_it() -> None:
    import torch

    build = read_build()
    assert (build.version, build.cuda) == (torch.__version__, torch.version.cuda)
    assert build.architectures == tuple((torch._C._cuda_getArchFlags() or "").split())
    if build.cuda:
        assert build.runs_on((9, 0))
        assert not build.runs_on((3, 5))


@pytest.mark.parametrize(
    ("held", "capability", "runs"),
    [
        ("sm_50", (5, 2), True), ("sm_52", (5, 0), False), ("sm_60", (6, 1), True), ("sm_60", (7, 0), False),
        ("sm_86", (8, 9), True), ("sm_90", (10, 0), False), ("sm_90a", (9, 0), True), ("sm_90a", (9, 1), False),
        ("compute_90", (12, 0), True), ("compute_90", (8, 9), False), ("sm_100f", (10, 3), True),
        ("sm_120", (12, 0), True), ("gfx90a", (9, 0), False),
    ],
)  # fmt: skip
def test_which_code_runs_on_which_card(held: str, capability: tuple[int, int], runs: bool) -> None:
    assert TorchBuild("2.14.1", "13.0", (held,)).runs_on(capability) == runs


def test_a_torch_for_cpus_leaves_every_card_idle() -> None:
    why, mends = torch_build.unusable(card("L4"), TorchBuild("2.13.0+cpu", None, ())) or ("", "")
    assert "was built without CUDA" in why
    assert "/whl/cu130" in mends


def test_a_driver_older_than_torch_s_cuda_is_found() -> None:
    here = replace(card("RTX 3060"), driver="550.54", driver_cuda=12)
    why, mends = torch_build.unusable(here, CU130) or ("", "")
    assert "built for CUDA 13.0, and driver 550.54 knows CUDA 12 at the most" in why
    assert "a newer NVIDIA driver" in mends
    assert "torch==2.14.1+cu126" in mends
    assert torch_build.unusable(here, CU126) is None
    _, mends = torch_build.unusable(replace(here, capability=(12, 0)), CU130) or ("", "")
    assert "cu126" not in mends, "that one has no kernels for it"


def test_each_obstacle_names_what_would_mend_it() -> None:
    for name in ("Quadro M6000", "GTX 1080", "V100", "T4", "L4", "B200"):
        for build in (CU126, CU130):
            for component in components(card(name), build).values():
                assert component.reason
                assert component.usable != bool(component.remedy), component
    maxwell = components(card("Quadro M6000"), CU126)
    assert maxwell["bitsandbytes 4-bit"].remedy == "a card of capability 6.0"
    assert maxwell["xformers"].remedy == "a card of capability 7.5", "read from the installed xformers"
    volta = components(card("V100"), CU130)
    assert volta["triton"].remedy.startswith("pip install torch==2.14.1+cu126")
    assert volta["flash-attention"].remedy == "a card of capability 8.0"


def test_a_triton_that_does_not_import_is_no_triton(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("raise RuntimeError('built for another machine')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(probe, "CACHE", tmp_path / "probes")
    found = components(card("L4"), CU130)
    for name in ("triton", "liger", "torch.compile", "unsloth"):
        assert not found[name].usable
        assert "built for another machine" in found[name].reason
        assert found[name].remedy == "make clean setup"


def test_what_is_not_installed_does_not_hide_that_the_card_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fallback.components.importlib.util.find_spec", lambda name: None)
    found = unsloth(card("GTX 1080"))
    assert found.reason.startswith("unsloth is not installed; its Triton kernels need compute capability 7.0")
    assert found.remedy == "a card of capability 7.0"
    assert unsloth(card("T4")).remedy == "pip install unsloth"


def test_the_remedy_is_the_torch_of_the_locks() -> None:
    assert f"torch=={torch_build.LAST_CU126}+cu126" in (ROOT / "requirements-cu126.lock").read_text().splitlines()
    locked = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert f"\ntorch=={torch_build.LAST_CU126} " in locked
    assert f"\ntorchvision=={torch_build.ITS_TORCHVISION} " in locked


def test_the_report_on_a_card_that_is_not_here(command: Command) -> None:
    done = command("fallback", "--gpu", "Quadro M6000:5.2:12")
    assert done.returncode == 0, done.stderr
    assert "Quadro M6000, compute capability 5.2, 12.0 GiB, described and not here" in done.stdout
    assert "a card of capability 7.0" in done.stdout
    if not read_build().runs_on((5, 2)):
        now, _, then = done.stdout.partition("with the torch that this command installs")
        assert "everything runs on the CPU, see above" in now
        assert "cuda              Quadro M6000, compute capability 5.2" in then
    whole = json.loads(command("fallback", "--gpu", "Quadro M6000:5.2:12", "--json").stdout)
    assert set(whole) == {"gpu", "torch", "choice", "components"}
    assert whole["gpu"]["capability"] == [5, 2]
    assert whole["torch"]["architectures"] == list(read_build().architectures)
    assert set(whole["choice"]) >= {"llama", "gemma3_text", "gpt_neox"}
    assert set(whole["choice"]["llama"]) >= {"backend", "dtype", "attention", "quantization", "optimizer", "reasons"}
    assert len(whole["components"]) == 9
    for component in whole["components"].values():
        assert set(component) == {"usable", "reason", "remedy"}


def test_a_card_that_cannot_be_understood_is_one_line(command: Command) -> None:
    done = command("fallback", "--gpu", "M6000:five:12")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --gpu 'M6000:five:12': unknown; ")
    assert len(done.stderr.splitlines()) == 1
