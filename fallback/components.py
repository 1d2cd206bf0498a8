"""Which libraries can run on a card under a torch, and if not, why and what would mend it.

Every question here is about the card (None: the CPU) and the build of torch that would drive it (None: one that has
kernels for the card); the ladder in choose asks the same questions, so its reasons are the report's.
"""

import importlib.util
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from fallback import cpu
from fallback.gpu import Gpu, read_gpu
from fallback.probe import Failed, probe
from fallback.torch_build import TorchBuild, remedy, unusable

_UNSLOTH = ("unsloth", "unsloth_zoo", "torch", "transformers", "trl", "peft", "bitsandbytes", "triton", "torchvision")
# What is there but does not import fits some other version of what is beside it: only the lock's set goes together.
_ANEW = "make clean setup"
# CUDA version of a binary in bitsandbytes 0.50.2 -> the lowest compute capability it has kernels for.
BITSANDBYTES = {
    (11, 8): (6, 0), (12, 1): (6, 0), (12, 4): (6, 0), (12, 6): (6, 0), (12, 8): (7, 0),
    (13, 0): (7, 5), (13, 2): (7, 5),
}  # fmt: skip


@dataclass(frozen=True)
class Component:
    usable: bool
    reason: str
    remedy: str = ""

    @property
    def obstacle(self) -> str | None:
        """The reason, with the command where one helps: a reason that names a capability needs no word about cards."""
        if self.usable:
            return None
        return f"{self.reason} ({self.remedy})" if self.remedy and not self.remedy.startswith("a card") else self.reason


def components(gpu: Gpu | None, build: TorchBuild | None) -> dict[str, Component]:
    found = {
        "unsloth": unsloth(gpu),
        "triton": triton(gpu),
        "bitsandbytes 4-bit": bitsandbytes_4bit(gpu, build),
        "bitsandbytes 8-bit": bitsandbytes_8bit(gpu, build),
        "xformers": xformers(gpu),
        "flash-attention": flash_attention(gpu),
        "liger": liger(gpu),
        "torch.compile": torch_compile(gpu),
        "bf16": bf16(gpu),
    }
    obstacle = unusable(gpu, build) if gpu is not None and build is not None else None
    if obstacle is None:
        return found
    # What the card itself forbids stays the reason: no torch helps there.
    idle = Component(False, obstacle[0].partition(": ")[0], obstacle[1])
    return {name: idle if component.usable else component for name, component in found.items()}


def dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _too_old(gpu: Gpu | None, lowest: tuple[int, int], who_needs: str) -> Component | None:
    purchase = f"a card of capability {dotted(lowest)}"
    if gpu is None:
        return Component(False, f"{who_needs} a GPU of compute capability {dotted(lowest)}", purchase)
    if gpu.capability < lowest:
        has = f"{gpu.name} has {dotted(gpu.capability)}"
        return Component(False, f"{who_needs} compute capability {dotted(lowest)}, and {has}", purchase)
    return None


def _missing(module: str, package: str) -> Component | None:
    if importlib.util.find_spec(module) is not None:
        return None
    return Component(False, f"{package} is not installed", f"pip install {package}")


def _first(*found: Component | None) -> Component | None:
    """The obstacles together, and the remedy of the last: installing a package helps no card that is too old for it."""
    there = [component for component in found if component is not None]
    return Component(False, "; ".join(c.reason for c in there), there[-1].remedy) if there else None


def triton(gpu: Gpu | None) -> Component:
    """Present is not enough: a package that does not import would end the run at its first loss."""
    found = _first(_missing("triton", "triton"), _too_old(gpu, (7, 0), "Triton needs"))
    if found is not None:
        return found
    try:
        probe("triton", "import triton, triton.language", ("triton",))
    except Failed as failed:
        return Component(False, f"Triton: {failed}", _ANEW)
    return Component(True, "compiles for compute capability 7.0 and newer")


def unsloth(gpu: Gpu | None) -> Component:
    """Imports nothing here: Unsloth patches transformers, trl and peft when imported, so it is tried in a process of
    its own."""
    missing = _missing("unsloth", "unsloth")
    if gpu is None:
        if missing is not None:
            return missing
        if os.environ.get("UNSLOTH_DISABLE_CPU_FALLBACK") == "1":
            reason = "there is no GPU and UNSLOTH_DISABLE_CPU_FALLBACK=1 forbids it the CPU"
            return Component(False, reason, "unset UNSLOTH_DISABLE_CPU_FALLBACK")
    else:
        found = _first(missing, _too_old(gpu, (7, 0), "its Triton kernels need"))
        kernels = found or triton(gpu)
        if not kernels.usable:
            return kernels
    obstacle = probe_unsloth(gpu)
    if obstacle is not None:
        return Component(False, obstacle, _ANEW)
    return Component(True, "imports and runs here")


def probe_unsloth(gpu: Gpu | None) -> str | None:
    here = read_gpu()
    also = asdict(here) if here else None
    try:
        # A card that torch cannot use is still seen by Unsloth, which would prepare itself for it.
        probe("unsloth", "import unsloth; from trl import SFTTrainer", _UNSLOTH, also, hide_gpu=gpu is None)
    except Failed as failed:
        return str(failed)
    return None


def _source(package: str, *path: str) -> str:
    """Of an installed library that must not be imported before a backend is chosen; nothing where it is not there."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        return ""
    file = Path(found.submodule_search_locations[0], *path)
    return file.read_text(encoding="utf-8") if file.is_file() else ""


@cache
def unsloth_types() -> frozenset[str]:
    """The architectures that the installed Unsloth has code of its own for: those its loader dispatches. All others
    take its generic path, which rewrites whatever transformers has."""
    found: set[str] = set()
    within = ""
    for branch in re.split(r"^ +(?:if|elif|else)\b", _source("unsloth", "models", "loader.py"), flags=re.M):
        named = re.match(r' model_type == "(\w+)":', branch)
        within = named[1] if named else within
        if re.search(r"^ +dispatch_model = Fast", branch, re.M):
            found.add(within)
    return frozenset(found)


@cache
def liger_types() -> frozenset[str]:
    """The architectures that the installed Liger has kernels for; none where it is not installed."""
    source = _source("liger_kernel", "transformers", "monkey_patch.py")
    table = re.search(r"^MODEL_TYPE_TO_APPLY_LIGER_FN = \{(.*?)^\}", source, re.S | re.M)
    return frozenset(re.findall(r'^\s+"(\w+)":', table.group(1), re.M)) if table else frozenset()


def liger(gpu: Gpu | None, model_type: str | None = None) -> Component:
    missing = None if liger_types() else Component(False, "liger-kernel is not installed", "pip install liger-kernel")
    found = _first(missing, _too_old(gpu, (7, 0), "its Triton kernels need"))
    kernels = found or triton(gpu)
    if not kernels.usable:
        return kernels
    if model_type is not None and model_type not in liger_types():
        return Component(False, f"Liger has no kernels for {model_type}")
    return Component(True, "layer kernels in Triton")


def bitsandbytes_needs(cuda: tuple[int, int]) -> tuple[int, int] | None:
    """What the binary that bitsandbytes loads beside a torch of this CUDA version was built for: its own, else the
    next lower, else the next higher of the same major version; None where there is none."""
    same = [version for version in BITSANDBYTES if version[0] == cuda[0]]
    chosen = max((v for v in same if v <= cuda), default=min((v for v in same if v > cuda), default=None))
    return BITSANDBYTES[chosen] if chosen else None


def bitsandbytes_4bit(gpu: Gpu | None, build: TorchBuild | None) -> Component:
    missing = _missing("bitsandbytes", "bitsandbytes")
    lowest = min(BITSANDBYTES.values())
    if missing is not None:
        return missing
    if gpu is None:
        return Component(True, "kernels for CPUs")
    if gpu.capability < lowest:
        reason = f"bitsandbytes has no kernels below compute capability {dotted(lowest)}"
        return Component(False, reason, f"a card of capability {dotted(lowest)}")
    if build is None or build.cuda_version is None:
        return Component(True, f"kernels for compute capability {dotted(lowest)} and newer")
    needed = bitsandbytes_needs(build.cuda_version)
    if needed is None:
        return Component(False, f"bitsandbytes has no binary for CUDA {build.cuda}", remedy(gpu))
    if gpu.capability < needed:
        reason = f"bitsandbytes' binary for CUDA {build.cuda}, torch's, has no kernels below {dotted(needed)}"
        return Component(False, reason, remedy(gpu))
    return Component(True, f"its binary for CUDA {build.cuda} holds {dotted(needed)} and newer")


def bitsandbytes_8bit(gpu: Gpu | None, build: TorchBuild | None) -> Component:
    if gpu is None:
        return Component(False, "bitsandbytes' 8-bit layers train on GPUs only", "a card of capability 6.0")
    found = bitsandbytes_4bit(gpu, build)
    if found.usable and gpu.capability < (7, 5):
        return Component(True, f"{found.reason}; slowly, since products of 8 bits are in hardware from 7.5")
    return found


def xformers(gpu: Gpu | None) -> Component:
    """By the architectures it was built for, which it names in a file of its own."""
    if missing := _missing("xformers", "xformers"):
        return _first(missing, _too_old(gpu, (7, 5), "its kernels need")) or missing
    built = _source("xformers", "cpp_lib.json")
    if not built:
        return Component(False, "it was installed without its kernels", _ANEW)
    held = re.findall(r"(\d+)\.(\d+)", json.loads(built)["env"]["TORCH_CUDA_ARCH_LIST"])
    lowest = min((int(major), int(minor)) for major, minor in held)
    too_old = _too_old(gpu, lowest, "its kernels need")
    return too_old or Component(True, f"built for {dotted(lowest)} and newer")


def flash_attention(gpu: Gpu | None) -> Component:
    found = _first(_missing("flash_attn", "flash-attn"), _too_old(gpu, (8, 0), "its kernels need"))
    return found or Component(True, "in 16 bits only")


def torch_compile(gpu: Gpu | None) -> Component:
    if gpu is not None:
        found = triton(gpu)
        return Component(True, "through Triton") if found.usable else found
    compiler = cxx()
    if compiler is None:
        return Component(False, "on a CPU it needs a C++ compiler", "apt-get install g++")
    return Component(True, f"on the CPU, through {compiler}")


def cxx() -> str | None:
    """A C++ compiler: the one that CXX names, which torch asks for too, else any."""
    named = os.environ.get("CXX", "").split()[:1]
    return next(filter(None, map(shutil.which, named or ("g++", "c++", "clang++"))), None)


def bf16(gpu: Gpu | None) -> Component:
    if gpu is None and (instructions := cpu.bfloat16()):
        return Component(True, f"in hardware, by {instructions}; tiny models take float32")
    return _too_old(gpu, (8, 0), "bfloat16 in hardware needs") or Component(True, "in hardware")
