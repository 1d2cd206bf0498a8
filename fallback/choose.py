"""The ladder, fastest rung first, and why this machine stands on the rung it stands on.

Importing this module imports no torch: a backend has to be chosen before any library it patches is loaded.
"""

import ctypes
import importlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any, Literal

from fallback import components, cpu
from fallback.gpu import Gpu, read_gpu
from fallback.probe import Failed
from fallback.torch_build import TorchBuild, read_build, unusable

# TRL reports every trainer that is made, from a thread that looks up a name while ours sets variables of the
# environment: glibc's getenv does not stand that, and a training has died of it. Unsloth downloads a file
# to be counted. Whose payments these are is nobody's business; who wants to report sets the variables otherwise.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")

BackendName = Literal["unsloth", "peft+liger", "peft"]
Backend = Literal["auto", "unsloth", "peft+liger", "peft"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
BACKENDS: tuple[BackendName, ...] = ("unsloth", "peft+liger", "peft")
"""Fastest first, where there is a GPU; the last runs wherever torch does."""
SLOWER_WITHOUT_A_GPU: dict[BackendName, str] = {
    "unsloth": "without a GPU it has no kernels of its own, and plain PEFT takes fewer passes over memory"
}
"""Not what `auto` chooses there: python -m bench train."""
_MODULES = {"unsloth": "fallback.with_unsloth", "peft+liger": "fallback.peft_liger", "peft": "fallback.plain_peft"}


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
        """The backend, to be asked for before torch is imported, in a process that computes as fast as it can."""
        if self.device == "cpu":
            # torch's OpenMP threads wait for each other by spinning, for about a millisecond: with one busy process
            # beside it on two cores, a step took 13 times as long as with waiting passively. That in turn costs a
            # quarter of the speed of a quiet machine. Spinning for a thirtieth of the time loses 3 % and 1/3.
            if "OMP_WAIT_POLICY" not in os.environ:
                os.environ.setdefault("GOMP_SPINCOUNT", "10000")
            _keep_freed_memory()
        return self.library()

    def library(self) -> ModuleType:
        """The backend alone: nothing but what it needs to run at all is seen to."""
        if self.device == "cpu":
            if read_gpu() is not None:
                # A card that torch has no kernels for would still answer torch.cuda.is_available() with yes.
                os.environ["CUDA_VISIBLE_DEVICES"] = ""
        elif not self.triton:
            # Inductor writes Triton. transformers compiles generate() by itself where a published generation_config
            # names a static cache, as Gemma's do, and bitsandbytes wraps its operations for want of better ones.
            os.environ["TORCHDYNAMO_DISABLE"] = "1"
        return importlib.import_module(_MODULES[self.backend])

    @property
    def trainers_optimizer(self) -> str:
        """As transformers' Trainer calls it."""
        # On a CPU one pass over memory instead of a dozen. On a GPU nobody measured it.
        return "adamw_torch_fused" if (self.device, self.optimizer) == ("cpu", "adamw_torch") else self.optimizer

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
    dtype: Dtype = "auto",
    build: TorchBuild | None = None,
    failed: Mapping[str, str] | None = None,
    large: bool = False,
) -> Choice:
    """Decide everything that depends on the machine. Raises CannotRun for a named backend that cannot run. Without
    `build` this machine's GPU is judged by the installed torch, and a described one by a torch that fits it. `failed`
    are backends that were tried and died, each with how. `large`: it is for a model that is not tiny, where a
    processor's fastest products are worth their roundings."""
    if gpu == "read":
        gpu = read_gpu()
        if gpu is not None and build is None:
            try:
                build = read_build()
            except Failed as error:
                raise CannotRun(f"torch: {error}; install everything anew: make clean setup") from None
    reasons = {"device": "no usable NVIDIA GPU"}
    if gpu is not None:
        reasons["device"] = f"{gpu.name}, compute capability {components.dotted(gpu.capability)}"
    idle = "; ".join(unusable(gpu, build) or ()) if gpu is not None and build is not None else ""
    backend, reasons["backend"] = _backend(requested, gpu, model_type, idle, failed or {})
    if idle:
        gpu, reasons["device"] = None, f"everything runs on the CPU: {idle}"

    chosen_dtype, reasons["dtype"] = _dtype(gpu, model_type, dtype, large)
    chosen_attention, reasons["attention"] = _attention(gpu, model_type, attention, chosen_dtype)

    eight_bit = quantization == "8bit"
    layers = components.bitsandbytes_8bit(gpu, build) if eight_bit else components.bitsandbytes_4bit(gpu, build)
    if quantization != "none" and not layers.usable:
        quantization = "none"
        reasons["quantization"] = f"the weights stay unquantised: {layers.obstacle}"
    else:
        reasons["quantization"] = "as the recipe asks"

    kernels = components.bitsandbytes_4bit(gpu, build)
    reasons["optimizer"] = "as the recipe asks"
    if optimizer != "adamw_torch" and (gpu is None or not kernels.usable):
        paged = f"{optimizer} pages between GPU and host memory; on a CPU that is plain AdamW"
        reasons["optimizer"] = paged if gpu is None else f"plain AdamW: {kernels.obstacle}"
        optimizer = "adamw_torch"

    triton = components.triton(gpu)
    reasons["loss"] = "fused LM head in Triton" if triton.usable else f"fused LM head in plain torch: {triton.reason}"
    device: Literal["cuda", "cpu"] = "cpu" if gpu is None else "cuda"
    return Choice(backend, device, chosen_dtype, chosen_attention, quantization, optimizer, triton.usable, reasons)


def _backend(
    requested: Backend, gpu: Gpu | None, model_type: str, idle: str, failed: Mapping[str, str]
) -> tuple[BackendName, str]:
    if requested != "auto":
        obstacle = why_not(requested, gpu, model_type, idle)
        if obstacle:
            raise CannotRun(
                f"--backend {requested} cannot run here: {obstacle}. Use --backend peft, or auto to let it step down"
            )
        return requested, f"--backend {requested}"
    obstacles: list[str] = []
    for name in BACKENDS:
        slower = SLOWER_WITHOUT_A_GPU.get(name) if gpu is None or idle else None
        obstacle = failed.get(name) or slower or why_not(name, gpu, model_type, idle)
        if obstacle is None:
            break
        obstacles.append(f"not {name}: {obstacle}")
    if name == "unsloth":
        return name, "Unsloth imports and runs here" + _way(model_type)
    return name, "; ".join(obstacles)


def _way(model_type: str) -> str:
    if model_type in components.unsloth_types():
        return f", with code of its own for {model_type}"
    return f"; it has no code of its own for {model_type}, which takes its generic path"


def why_not(backend: BackendName, gpu: Gpu | None, model_type: str, idle: str = "") -> str | None:
    """The obstacle between this machine and a backend, or None. `idle`: why torch cannot use the GPU that is there."""
    if backend == "unsloth":
        return components.unsloth(None if idle else gpu).obstacle
    if backend == "peft+liger":
        found = components.liger(gpu, model_type)
        return "; ".join(filter(None, [found.obstacle, idle])) or None
    return None


def _attention(
    gpu: Gpu | None, model_type: str, wanted: Attention, dtype: str
) -> tuple[Literal["sdpa", "eager", "flash_attention_2"], str]:
    if wanted == "flash_attention_2":
        obstacle = components.flash_attention(gpu).obstacle
        if obstacle is None and dtype == "float32":
            obstacle = "it computes in 16 bits only"
        if obstacle is None:
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


def _dtype(
    gpu: Gpu | None, model_type: str, wanted: Dtype, large: bool
) -> tuple[Literal["bfloat16", "float16", "float32"], str]:
    if wanted != "auto":
        obstacle = None
        if wanted == "float16" and gpu is None:
            obstacle = "it trains with loss scaling, on GPUs only"
        elif wanted == "float16" and model_type.startswith("gemma"):
            obstacle = "Gemma's activations overflow it"
        elif wanted == "bfloat16" and gpu is not None and not gpu.bf16:
            obstacle = f"{gpu.name} only emulates it; hardware begins at compute capability 8.0"
        if obstacle:
            raise CannotRun(f"--dtype {wanted} cannot run here: {obstacle}. Use --dtype auto")
        return wanted, f"--dtype {wanted}"
    if gpu is None:
        instructions = cpu.bfloat16()
        if instructions and large:
            return "bfloat16", f"this processor multiplies it by {instructions}"
        # Emulated bfloat16 would be slower, and a tiny model is small products with much beside them.
        return "float32", "CPUs compute float32 at full speed, and it is the most exact"
    if gpu.bf16:
        return "bfloat16", "in hardware from compute capability 8.0"
    if model_type.startswith("gemma"):
        return "float32", "Gemma's activations overflow float16, and this card has no bfloat16 in hardware"
    if gpu.capability >= (7, 0):
        return "float16", "no bfloat16 in hardware below compute capability 8.0; float16 with loss scaling"
    return "float32", "below compute capability 7.0 float16 is slow or inexact"
