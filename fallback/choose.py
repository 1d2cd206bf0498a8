"""The ladder, fastest rung first, and why this machine stands on the rung it stands on.

Importing this module imports no torch: a backend has to be chosen before any library it patches is loaded.
"""

import ctypes
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from fallback.gpu import Gpu, read_gpu

BackendName = Literal["unsloth", "peft+liger", "peft"]
Backend = Literal["auto", "unsloth", "peft+liger", "peft"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]
BACKENDS: tuple[BackendName, ...] = ("unsloth", "peft+liger", "peft")
"""Fastest first; the last runs wherever torch does."""
_MODULES = {"unsloth": "fallback.with_unsloth", "peft+liger": "fallback.peft_liger", "peft": "fallback.plain_peft"}
_CACHE = Path(__file__).parents[1] / ".cache" / "probes"


class CannotRun(Exception):
    """The backend that was asked for cannot run here; the message says why and what would help."""


@dataclass(frozen=True)
class Choice:
    """What a run is computed with, and why."""

    backend: BackendName
    device: Literal["cuda", "cpu"]
    dtype: Literal["bfloat16", "float16", "float32"]
    attention: Literal["sdpa", "eager", "flash_attention_2"]
    quantization: Literal["4bit", "8bit", "none"]
    optimizer: str
    triton: bool
    """False: no Triton kernel may run, in the loss or anywhere else."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Decision -> why."""

    def module(self) -> ModuleType:
        """The backend, to be asked for before torch is imported."""
        if self.device == "cpu":
            # torch's OpenMP threads wait for each other by spinning; as soon as another process wants a core, that
            # made a step 20 times slower here. Waiting passively costs nothing on a quiet machine.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            _keep_freed_memory()
        return importlib.import_module(_MODULES[self.backend])

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def _keep_freed_memory() -> None:
    """Let glibc reuse the memory of large tensors. By default it hands every block above 32 MiB back to the system
    when it is freed, and each forward pass then waits for the system to clear the same pages again: a 30M model read
    batches of 16,384 tokens at half the speed."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        # Not glibc, and so not its habit.
        return
    trim_threshold, mmap_threshold = -1, -3
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)


def choose(
    model_type: str,
    requested: Backend = "auto",
    quantization: Literal["4bit", "8bit", "none"] = "none",
    optimizer: str = "adamw_torch",
    gpu: Gpu | Literal["read"] | None = "read",
    attention: Attention = "auto",
    failed: Mapping[str, str] | None = None,
) -> Choice:
    """Decide everything that depends on the machine. Raises CannotRun for a named backend that cannot run. `failed` are
    backends that were tried and died, each with how."""
    if gpu == "read":
        gpu = read_gpu()
    backend, why = _backend(requested, gpu, model_type, failed or {})
    reasons = {"backend": why}

    if gpu is None:
        device: Literal["cuda", "cpu"] = "cpu"
        reasons["device"] = "no usable NVIDIA GPU"
    else:
        device = "cuda"
        reasons["device"] = f"{gpu.name}, compute capability {gpu.capability[0]}.{gpu.capability[1]}"

    dtype, reasons["dtype"] = _dtype(gpu, model_type)
    chosen_attention, reasons["attention"] = _attention(gpu, model_type, attention, dtype)

    if quantization == "8bit" and device == "cpu":
        quantization = "none"
        reasons["quantization"] = "bitsandbytes' 8-bit layers train on GPUs only, so the weights stay at 16 bits"
    elif quantization != "none" and gpu is not None and gpu.capability < (6, 0):
        quantization = "none"
        reasons["quantization"] = (
            "bitsandbytes has no kernels below compute capability 6.0, so the weights stay unquantised"
        )
    else:
        reasons["quantization"] = "as the recipe asks"

    if device == "cpu" and optimizer != "adamw_torch":
        reasons["optimizer"] = f"{optimizer} pages between GPU and host memory; on a CPU that is plain AdamW"
        optimizer = "adamw_torch"
    elif optimizer != "adamw_torch" and gpu is not None and gpu.capability < (6, 0):
        reasons["optimizer"] = "bitsandbytes has no kernels below compute capability 6.0"
        optimizer = "adamw_torch"
    else:
        reasons["optimizer"] = "as the recipe asks"

    triton = gpu is not None and gpu.triton and importlib.util.find_spec("triton") is not None
    reasons["loss"] = (
        "fused LM head in Triton"
        if triton
        else "fused LM head in plain torch, since Triton "
        + ("needs a GPU" if gpu is None else "needs compute capability 7.0" if not gpu.triton else "is not installed")
    )
    return Choice(backend, device, dtype, chosen_attention, quantization, optimizer, triton, reasons)


def _backend(
    requested: Backend, gpu: Gpu | None, model_type: str, failed: Mapping[str, str]
) -> tuple[BackendName, str]:
    if requested != "auto":
        obstacle = why_not(requested, gpu, model_type)
        if obstacle:
            raise CannotRun(
                f"--backend {requested} cannot run here: {obstacle}. Use --backend peft, or auto to let it step down"
            )
        return requested, f"--backend {requested}"
    obstacles: list[str] = []
    for name in BACKENDS:
        obstacle = failed.get(name) or why_not(name, gpu, model_type)
        if obstacle is None:
            break
        obstacles.append(f"not {name}: {obstacle}")
    return name, "; ".join(obstacles) or "Unsloth imports and runs here"


def why_not(backend: BackendName, gpu: Gpu | None, model_type: str) -> str | None:
    """The obstacle between this machine and a backend, or None."""
    if backend == "unsloth":
        return _why_not_unsloth(gpu)
    return _why_not_liger(gpu, model_type) if backend == "peft+liger" else None


def _why_not_liger(gpu: Gpu | None, model_type: str) -> str | None:
    from fallback.peft_liger import model_types

    if not model_types():
        return "liger-kernel is not installed (pip install liger-kernel)"
    if gpu is None:
        return "its Triton kernels need a GPU"
    if not gpu.triton:
        return _too_old(gpu)
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if model_type not in model_types():
        return f"Liger has no kernels for {model_type}"
    return None


def _too_old(gpu: Gpu) -> str:
    major, minor = gpu.capability
    return f"its Triton kernels need compute capability 7.0, and {gpu.name} has {major}.{minor}"


def _attention(
    gpu: Gpu | None, model_type: str, wanted: Attention, dtype: str
) -> tuple[Literal["sdpa", "eager", "flash_attention_2"], str]:
    if wanted == "flash_attention_2":
        if gpu is None or gpu.capability < (8, 0):
            obstacle = "it needs a GPU of compute capability 8.0"
        elif importlib.util.find_spec("flash_attn") is None:
            obstacle = "the package flash-attn is not installed"
        elif dtype == "float32":
            obstacle = "it computes in 16 bits only"
        else:
            return "flash_attention_2", "--attention flash_attention_2"
        raise CannotRun(f"--attention flash_attention_2 cannot run here: {obstacle}. Use --attention auto")
    if model_type == "gemma2":
        if wanted == "sdpa":
            raise CannotRun(
                "--attention sdpa: Gemma 2 caps its attention scores, which torch's fused attention cannot; use eager"
            )
        return "eager", "Gemma 2 caps its attention scores, which torch's fused attention cannot"
    if wanted == "auto":
        return "sdpa", "torch's fused attention runs everywhere"
    return wanted, f"--attention {wanted}"


def _dtype(gpu: Gpu | None, model_type: str) -> tuple[Literal["bfloat16", "float16", "float32"], str]:
    if gpu is None:
        # Emulated bfloat16 would be slower than float32, and these models are small.
        return "float32", "CPUs compute float32 at full speed, and it is the most exact"
    if gpu.bf16:
        return "bfloat16", "in hardware from compute capability 8.0"
    if model_type.startswith("gemma"):
        return "float32", "Gemma's activations overflow float16, and this card has no bfloat16 in hardware"
    if gpu.capability >= (7, 0):
        return "float16", "no bfloat16 in hardware below compute capability 8.0; float16 with loss scaling"
    return "float32", "below compute capability 7.0 float16 is slow or inexact"


def _why_not_unsloth(gpu: Gpu | None) -> str | None:
    """Imports nothing here: Unsloth patches transformers, trl and peft when imported, so it is tried in a process of
    its own, once for each set of versions."""
    if importlib.util.find_spec("unsloth") is None:
        return "it is not installed (pip install unsloth)"
    if gpu is not None and not gpu.triton:
        return _too_old(gpu)
    if gpu is None and os.environ.get("UNSLOTH_DISABLE_CPU_FALLBACK") == "1":
        return "there is no GPU and UNSLOTH_DISABLE_CPU_FALLBACK=1 forbids it the CPU"
    return _probe()


def _probe() -> str | None:
    names = ("unsloth", "unsloth_zoo", "torch", "transformers", "trl", "peft", "bitsandbytes", "triton")
    versions = {name: metadata.version(name) for name in names if importlib.util.find_spec(name)}
    gpu = read_gpu()
    key = json.dumps([sys.executable, platform.python_version(), versions, asdict(gpu) if gpu else None])
    known = _CACHE / f"unsloth-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if known.is_file():
        return json.loads(known.read_text(encoding="utf-8"))
    try:
        done = subprocess.run(
            [sys.executable, "-c", "import unsloth; from trl import SFTTrainer"],
            capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        obstacle = None if done.returncode == 0 else f"it does not import: {lines[-1] if lines else 'it was killed'}"
    except subprocess.TimeoutExpired:
        return "it did not import within five minutes"
    if obstacle is None:
        # Only success is remembered: what hinders an import may be mended without any version changing.
        known.parent.mkdir(parents=True, exist_ok=True)
        beside = known.with_suffix(f".{os.getpid()}")
        beside.write_text("null", encoding="utf-8")
        beside.replace(known)
    return obstacle
