"""python -m fallback: what this machine can run, what would be chosen for each architecture, and why."""

import argparse
import json

from fallback.choose import choose
from fallback.gpu import read_gpu

ARCHITECTURES = ("gemma3_text", "llama", "gpt_neox", "gemma2")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fallback", description=__doc__)
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    arguments = parser.parse_args()
    gpu = read_gpu()
    choices = {name: choose(name, quantization="4bit", optimizer="paged_adamw_8bit", gpu=gpu) for name in ARCHITECTURES}
    if arguments.json:
        print(
            json.dumps(
                {
                    "gpu": gpu and {"name": gpu.name, "capability": gpu.capability, "memory_bytes": gpu.memory_bytes},
                    "choice": {name: choice.as_json() for name, choice in choices.items()},
                },
                indent=2,
            )
        )
        return
    if gpu is None:
        print("no usable NVIDIA GPU: everything runs on the CPU")
    else:
        capability = ".".join(map(str, gpu.capability))
        print(f"{gpu.name}, compute capability {capability}, {gpu.memory_bytes / 2**30:.1f} GiB, driver {gpu.driver}")
    for name, choice in choices.items():
        print(f"\n{name}")
        for decision in ("backend", "device", "dtype", "attention", "quantization", "optimizer"):
            print(f"  {decision:<13} {getattr(choice, decision):<10} {choice.reasons[decision]}")
        print(f"  {'loss':<24} {choice.reasons['loss']}")


if __name__ == "__main__":
    main()
