"""What a process and its GPU use, in bytes, seconds, joules and hertz."""

import os
import time
from typing import Any

from bench.held import storages, weights
from bench.turns import Turns
from recipes.stages.train import memory_in_use


class GpuMeter:
    """One GPU as its driver sees it. Every reading is None where there is no GPU, or where it does not tell."""

    def __init__(self, cuda: bool):
        self.handle: Any = None
        if cuda:
            import pynvml

            pynvml.nvmlInit()
            visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0].strip()
            self.handle = (
                pynvml.nvmlDeviceGetHandleByIndex(int(visible))
                if visible.isdigit()
                else pynvml.nvmlDeviceGetHandleByUUID(visible)
            )

    def _ask(self, question: str, *arguments: Any) -> Any:
        if self.handle is None:
            return None
        import pynvml

        try:
            return getattr(pynvml, question)(self.handle, *arguments)
        except pynvml.NVMLError:
            return None

    def process_bytes(self) -> int | None:
        """This process's memory on the device, contexts and libraries included. A container may hide who is who; then
        it is all that is in use, as told by device_bytes."""
        for process in self._ask("nvmlDeviceGetComputeRunningProcesses") or ():
            if process.pid == os.getpid():
                return process.usedGpuMemory
        return None

    def device_bytes(self) -> int | None:
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        return memory.used if memory else None

    def joules(self) -> float | None:
        """Since the driver was loaded."""
        millijoules = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return millijoules / 1000 if millijoules is not None else None

    def clock_hertz(self) -> int | None:
        megahertz = self._ask("nvmlDeviceGetClockInfo", 1)
        return megahertz * 1_000_000 if megahertz is not None else None

    def throttled(self) -> bool | None:
        """Whether heat or a failing supply hold the clock down. An idle or a set clock is no fault, and under full load
        neither is the card's own power limit."""
        reasons = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        return bool(reasons & 0xE8) if reasons is not None else None


class TrainingMeter:
    """A callbacks.Watch that keeps what it sees: when steps ended, what was in their batches, what was in use."""

    def __init__(self, arm: str, turns: Turns) -> None:
        self.seconds: list[float] = []
        self.ended: list[float] = []
        """When, by the clock on the wall: that arms took turns can be seen in their rows."""
        self.batches: list[dict[str, Any]] = []
        self.used: dict[str, Any] = {}
        """What was in use at the last step; the only evaluation comes after it."""
        self.joules: list[float | None] = []
        """Of each step."""
        self.throttled: list[bool | None] = []
        self.parts: list[int] = []
        self.tensor_bytes: dict[str, int] = {}
        """What the model, its gradients and its optimiser hold, counted tensor by tensor."""
        self._gpu: GpuMeter | None = None
        self._turns = turns
        self._joules: float | None = None
        self._last = 0.0
        # Only tests and bench trust set this: a slow-down of one arm that the comparison has to find.
        planted, _, share = os.environ.get("BENCH_PLANT_SLEEP", "").rpartition(":")
        self._planted = float(share) if share and planted == arm else 0.0

    def batch(self, batch: Any) -> None:
        import hashlib

        ids, mask = batch["input_ids"], batch["attention_mask"]
        self.batches.append(
            {
                "hash": hashlib.blake2b(ids.numpy().tobytes(), digest_size=8).hexdigest(),
                "rows": len(ids),
                "tokens": int(mask.sum()),
                "padded_tokens": ids.numel(),
            }
        )

    def begin(self, trainer: Any) -> None:
        import torch

        self._count(trainer.model)
        self.parts = trainer.parts
        self._trainer = trainer

        cuda = torch.cuda.is_available()
        self._gpu = GpuMeter(cuda)
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._turns.wait()
        self._begin_step()

    def _begin_step(self) -> None:
        assert self._gpu is not None
        self._joules = self._gpu.joules()
        self._last = time.perf_counter()

    def step(self) -> None:
        assert self._gpu is not None
        if self._planted:
            time.sleep(self._planted * (time.perf_counter() - self._last))
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self.ended.append(time.time())
        if not self.tensor_bytes:
            self.tensor_bytes = tensors_of(self._trainer)
            # Or the model stays, and beside it the one that answers is loaded.
            self._trainer = None
        joules = self._gpu.joules()
        self.joules.append(joules - self._joules if joules is not None and self._joules is not None else None)
        self.throttled.append(self._gpu.throttled())
        self.used = self._memory()
        self._turns.wait()
        self._begin_step()

    def _memory(self) -> dict[str, Any]:
        assert self._gpu is not None
        found = memory_in_use(self._gpu.handle is not None, peak=True)
        return {
            "peak_resident_bytes": found["resident"],
            "peak_allocated_bytes": found.get("cuda_allocated"),
            "peak_reserved_bytes": found.get("cuda_reserved"),
            "device_process_bytes": self._gpu.process_bytes(),
            # Of all who are on the card.
            "device_bytes": self._gpu.device_bytes() if self._turns.alone else None,
            "clock_hertz": self._gpu.clock_hertz(),
        }

    def resume(self) -> None:
        self._begin_step()

    def flops(self, tokens: float, supervised_tokens: int) -> float:
        """Of a training step's matrix products: forward, and backward to the activations; the frozen weights get no
        gradient, the LoRA matrices do. Recomputed activations do not count, nor does attention itself, nor what the
        last layer did not compute."""
        from recipes.stages import last_layer

        spared = max(0.0, tokens - supervised_tokens) if supervised_tokens <= last_layer.MOST * tokens else 0.0
        return (
            4.0 * (self._frozen * tokens - self._served[0] * spared)
            + 6.0 * (self._lora * tokens - self._served[1] * spared)
            + 4.0 * self._head * supervised_tokens
        )

    def _count(self, network: Any) -> None:
        from recipes.stages import last_layer

        head = network.get_output_embeddings()
        self._head = head.in_features * head.out_features
        self._lora = sum(p.numel() for p in network.parameters() if p.requires_grad)
        # By shape: quantised weights are packed. LoRA's own layers are counted above.
        self._frozen = _frozen_products(network, head)
        parts = last_layer.parts(network)
        self._served = (
            sum(_frozen_products(part, head) for part in parts),
            sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad),
        )


def _frozen_products(network: Any, head: Any) -> int:
    """Numbers of the matrices that no gradient is for, by their layers' shapes."""
    return sum(
        module.in_features * module.out_features
        for name, module in network.named_modules()
        if hasattr(module, "in_features")
        and "lora_" not in name
        and module is not head
        and "vision" not in name
        and not hasattr(module, "base_layer")
    )


def tensors_of(trainer: Any) -> dict[str, int]:
    """Bytes by what they are for; the optimiser has just let go of the gradients, which are as large as LoRA."""
    import torch

    parts = weights(trainer.model)
    lora = parts.pop("lora_weights")
    states = (value for state in trainer.optimizer.state.values() for value in state.values())
    optimiser = storages(value for value in states if isinstance(value, torch.Tensor))
    return {"base weights": sum(parts.values()), "LoRA": lora, "gradients": lora, "optimiser": optimiser}
