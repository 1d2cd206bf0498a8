"""python -m fallback: what this machine, or a card you name, can run, what would be chosen for it, and why."""

import argparse
import json
import os
import sys
from dataclasses import asdict
from typing import Any

from fallback.cards import GIB, card
from fallback.choose import Choice, choose
from fallback.components import Component, components, dotted
from fallback.gpu import Gpu, read_gpu
from fallback.probe import Failed
from fallback.torch_build import TorchBuild, read_build, unusable

ARCHITECTURES = ("gemma3_text", "llama", "gpt_neox", "gemma2")
DECISIONS = ("backend", "device", "dtype", "attention", "quantization", "optimizer")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fallback", description=__doc__)
    parser.add_argument("--gpu", metavar="CARD", help='T4, 12GB, or name:capability:GiB as in "Quadro M6000:5.2:12"')
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    arguments = parser.parse_args()
    try:
        gpu = card(arguments.gpu) if arguments.gpu is not None else read_gpu()
    except ValueError as error:
        parser.exit(2, f"error: --gpu {error}\n")
    try:
        build = read_build()
    except Failed as failed:
        parser.exit(1, f"error: torch: {failed}; install everything anew: make clean setup\n")
    choices = chosen(gpu, build)
    found = components(gpu, build)
    if arguments.json:
        print(json.dumps(as_json(gpu, build, choices, found), indent=2))
    else:
        print("\n".join(lines(gpu, build, choices, found)))


def chosen(gpu: Gpu | None, build: TorchBuild | None) -> dict[str, Choice]:
    """By architecture, for training a model that is not tiny, with 4 bits and the paged optimiser."""
    return {
        name: choose(name, quantization="4bit", optimizer="paged_adamw_8bit", gpu=gpu, build=build, large=True)
        for name in ARCHITECTURES
    }


def as_json(
    gpu: Gpu | None, build: TorchBuild, choices: dict[str, Choice], found: dict[str, Component]
) -> dict[str, Any]:
    return {
        "gpu": asdict(gpu) if gpu else None,
        "torch": {**asdict(build), "usable": gpu is None or unusable(gpu, build) is None},
        "choice": {name: choice.as_json() for name, choice in choices.items()},
        "components": {name: asdict(component) for name, component in found.items()},
    }


def lines(gpu: Gpu | None, build: TorchBuild, choices: dict[str, Choice], found: dict[str, Component]) -> list[str]:
    told = [
        f"gpu    {_named(gpu)}",
        f"torch  {build.version}, CUDA {build.cuda or 'none'}: {' '.join(build.architectures) or 'for CPUs alone'}",
    ]
    idle = unusable(gpu, build) if gpu else None
    told += [f"       {line}" for line in idle or ()]
    told.append("")
    for name, component in found.items():
        told.append(f"{'yes' if component.usable else 'no':<4} {name:<19} {component.reason}")
        if component.remedy:
            told.append(f"{'':<24} {component.remedy}")
    told += blocks(choices, "everything runs on the CPU, see above" if idle else None)
    if idle and gpu is not None and idle[1].startswith("pip install"):
        told += ["", "with the torch that this command installs", *blocks(chosen(gpu, None), None)]
    return told


def blocks(choices: dict[str, Choice], device: str | None) -> list[str]:
    """A paragraph for each choice, architectures with the same one together."""
    same: dict[str, list[str]] = {}
    for name, choice in choices.items():
        why = {**choice.reasons, **({"device": device} if device else {})}
        text = "\n".join(f"  {what:<13} {getattr(choice, what):<17} {why[what]}" for what in DECISIONS)
        same.setdefault(f"{text}\n  {'loss':<31} {why['loss']}", []).append(name)
    return [line for text, names in same.items() for line in ("", ", ".join(names), text)]


def _named(gpu: Gpu | None) -> str:
    if gpu is None:
        return "no usable NVIDIA GPU: everything runs on the CPU"
    driver = f", driver {gpu.driver}" if gpu.driver else ", described and not here"
    return f"{gpu.name}, compute capability {dotted(gpu.capability)}, {gpu.memory_bytes / GIB:.1f} GiB{driver}"


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read this has gone, as in `| head`. Python would complain of it again when it closes its output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
