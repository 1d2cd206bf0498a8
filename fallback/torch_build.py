"""What the installed torch was built for, and whether that includes a card: found out before anything is loaded.

A torch without kernels for a card loads, says yes to torch.cuda.is_available(), and dies at the first operation.
"""

import json
import re
from dataclasses import dataclass

from fallback.gpu import Gpu, read_gpu
from fallback.probe import Failed, probe, version

# torch.cuda.get_arch_list() is empty where there is no GPU, and the same question one level below is not.
_ASK = """
import json, torch
flags = torch._C._cuda_getArchFlags() if torch.version.cuda else None
print(json.dumps([torch.__version__, torch.version.cuda, (flags or "").split()]))
"""
_WHEELS = "https://download.pytorch.org/whl"
# The last release with wheels for CUDA 12.6, which alone hold kernels for cards below 7.5.
LAST_CU126, ITS_TORCHVISION = "2.14.1", "0.29.2"


@dataclass(frozen=True)
class TorchBuild:
    version: str
    cuda: str | None
    """None: built for CPUs alone."""
    architectures: tuple[str, ...]
    """As torch.cuda.get_arch_list() names them: sm_75 is machine code, compute_90 what a newer driver can translate."""

    @property
    def cuda_version(self) -> tuple[int, int] | None:
        if self.cuda is None:
            return None
        major, minor = self.cuda.split(".")[:2]
        return int(major), int(minor)

    def runs_on(self, capability: tuple[int, int]) -> bool:
        return any(_runs(architecture, capability) for architecture in self.architectures)


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    """Machine code runs on later cards of the same major version, PTX on any later one; with an a (sm_90a) both run
    on exactly their own."""
    parts = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
    if parts is None:
        return False
    made_for = int(parts[2]), int(parts[3])
    if parts[4] == "a":
        return capability == made_for
    if parts[1] == "compute" and not parts[4]:
        return capability >= made_for
    return capability[0] == made_for[0] and capability >= made_for


def read_build() -> TorchBuild:
    """The installed torch's. Raises probe.Failed where it does not import."""
    name, cuda, architectures = json.loads(probe("torch", _ASK, ("torch",)))
    return TorchBuild(name, cuda, tuple(architectures))


def unusable(gpu: Gpu, build: TorchBuild) -> tuple[str, str] | None:
    """Why this torch cannot use this card, and what would mend it; None where it can."""
    card = f"{gpu.name}, compute capability {gpu.capability[0]}.{gpu.capability[1]}"
    if build.cuda_version is None:
        return f"torch {build.version} was built without CUDA, so {card}, stays idle", remedy(gpu)
    if not build.runs_on(gpu.capability):
        held = " ".join(build.architectures) or "none"
        return f"torch {build.version} has no kernels for {card}: its CUDA {build.cuda} build holds {held}", remedy(gpu)
    if gpu.driver_cuda is not None and gpu.driver_cuda < build.cuda_version[0]:
        known = f"driver {gpu.driver} knows CUDA {gpu.driver_cuda} at the most"
        newer = f"a newer NVIDIA driver, one for CUDA {build.cuda_version[0]}"
        older = f", or {_install('cu126')}" if gpu.driver_cuda == 12 and gpu.capability < (10, 0) else ""
        return f"torch {build.version} is built for CUDA {build.cuda}, and {known}", newer + older
    return None


def remedy(gpu: Gpu) -> str:
    """The command that installs a torch with kernels for this card."""
    if gpu.capability < (5, 0):
        return "no torch that these recipes run with has any; a card of capability 5.0 is needed"
    return _install("cu126" if gpu.capability < (7, 5) else "cu130")


def _install(cuda: str) -> str:
    # torchvision belongs to one torch and one CUDA: left as it is, neither Unsloth nor TRL would import any more.
    torch, torchvision = LAST_CU126, ITS_TORCHVISION
    if cuda != "cu126":
        torch, torchvision = version("torch") or torch, version("torchvision") or torchvision
    torch, torchvision = (text.partition("+")[0] for text in (torch, torchvision))
    return f"pip install torch=={torch}+{cuda} torchvision=={torchvision}+{cuda} --index-url {_WHEELS}/{cuda}"


def usable_gpu() -> Gpu | None:
    """The GPU of this machine, unless the installed torch cannot compute on it."""
    gpu = read_gpu()
    try:
        return gpu if gpu is not None and unusable(gpu, read_build()) is None else None
    except Failed:
        return None
