"""How long a training takes: from its matrix products, and from what a card can multiply."""

import time

from fallback.gpu import Gpu

TFLOPS = {
    "GTX 1080": (8.9, None), "RTX 3060": (12.7, 25.6), "RTX 4060 Ti 16GB": (22.1, 44.1), "T4": (8.1, 65.1),
    "V100": (14.1, 112.7), "RTX 3090": (35.6, 71.2), "RTX 4090": (82.6, 165.2), "L4": (30.3, 121.2),
    "RTX 5090": (104.8, 209.5), "A100 40GB": (19.5, 311.9), "A100 80GB": (19.5, 311.9), "H100": (66.9, 989.4),
    "H200": (66.9, 989.4), "B200": (75.0, 2250.0), "Quadro M6000": (6.8, None), "P100": (9.3, None),
}  # fmt: skip
"""Card -> its makers' figures for dense products with float32 sums: of float32 (without TF32), and of 16 bits in tensor
cores, bfloat16 where it has them."""
UTILISATION = 0.3
"""Share of that which a LoRA training is taken to reach. An assumption, and a modest one: what `python -m bench
compare` measured on your card is worth more."""


def flops_per_second(gpu: Gpu, dtype: str) -> float | None:
    """What the makers say of the card; None for one that is not in the table."""
    single, half = TFLOPS.get(gpu.name, (None, None))
    figure = single if dtype == "float32" else half
    return figure * 1e12 if figure else None


def matmul_flops_per_second(dtype: str, device: str, seconds: float = 0.3) -> float:
    """What this device reaches in one large matrix product: the measure that a training step is held against."""
    import torch

    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    best, spent = float("inf"), 0.0
    while spent < seconds:
        began = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - began
        best, spent = min(best, took), spent + took
    return 2 * size**3 / best
