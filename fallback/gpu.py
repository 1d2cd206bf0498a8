"""What GPU is here. Asks the driver, not torch: the answer must not cost an import, and a torch build that
cannot drive the card would hide it."""

import os
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: tuple[int, int]
    memory_bytes: int
    driver: str | None = None
    driver_cuda: int | None = None
    """The newest major version of CUDA that the driver runs."""

    @property
    def bf16(self) -> bool:
        """In hardware. torch.cuda.is_bf16_supported() also says yes where it is emulated."""
        return self.capability >= (8, 0)


@cache
def read_gpu() -> Gpu | None:
    """The first NVIDIA GPU that this process may use, or None."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        if pynvml.nvmlDeviceGetCount() == 0:
            return None
        first = (visible or "0").split(",")[0].strip()
        handle = (
            pynvml.nvmlDeviceGetHandleByIndex(int(first))
            if first.isdigit()
            else pynvml.nvmlDeviceGetHandleByUUID(first)
        )
        return Gpu(
            name=pynvml.nvmlDeviceGetName(handle),
            capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
            memory_bytes=pynvml.nvmlDeviceGetMemoryInfo(handle).total,
            driver=pynvml.nvmlSystemGetDriverVersion(),
            driver_cuda=pynvml.nvmlSystemGetCudaDriverVersion() // 1000,
        )
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
