"""One training as another tool does it, in a process of its own: python -m bench.rivals CASE.json OUT.json FOLDER.

TRL and Unsloth are called as their documentation shows, with the same model, tokens, order, LoRA, optimiser, precision
and checkpointing as the recipe's own training. Two things are not theirs: the data come as tokens, since templates are
another matter, and without a GPU plain TRL needs our loss head, because its own is a Triton kernel and dies. How
threads wait, what becomes of freed memory and what Python's collector looks through is left as a user of theirs finds
it.
"""

import importlib
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from bench.case import Case
from bench.turns import Turns
from fallback.choose import choose
from fallback.patched import patched
from recipes.stages import cli, loading, prepare, train
from recipes.stages.base_model import ensure_files, load_tokenizer, model_type, settle
from recipes.stages.losses import draws
from recipes.stages.recipe import Balance, Recipe
from recipes.stages.render import IGNORED, Rendered, Renderer
from recipes.stages.run import read_json, write_json


def main(case_file: str, out: str, folder: str) -> None:
    turns = Turns()
    case = Case.of(read_json(Path(case_file)))
    recipe = importlib.import_module(f"recipes.{case.recipe}").RECIPE
    write_json(Path(out), measure(case, recipe, Path(folder), turns))


def measure(case: Case, recipe: Recipe, folder: Path, turns: Turns) -> dict[str, Any]:
    if case.arm == "unsloth-compiled":
        # Its switch for processors. On a GPU it compiles unasked.
        os.environ["UNSLOTH_CPU_COMPILE"] = "1"
    args = cli.parse_train(recipe, "train", [*case.flags, "--run", str(folder)])
    settings = args.settings
    chosen = settle(recipe, args.size, args.weights, args.model)
    choice = choose(
        model_type(recipe, chosen), args.backend, settings.quantization, settings.optimizer,
        attention=settings.attention, dtype=settings.dtype, large=chosen.large,
    )  # fmt: skip
    backend = choice.library()
    backend.import_libraries(choice)
    ensure_files(recipe, chosen)
    tokenizer = load_tokenizer(recipe, chosen.source)
    run = prepare.prepare(recipe, None, recipe.options, settings.seed, folder, settings.max_length, None)
    renderer = Renderer(tokenizer, recipe.stop_phrase)
    from recipes.stages.tokens import tokens_of

    read = tokens_of(renderer, train.examples(recipe, run, "train"), settings.max_length, "the training split")
    rendered = [Rendered(**row) for row in read.table.to_pylist()]
    steps = settings.max_steps
    rows = in_order(recipe, args.balance, read.items, rendered, settings, steps)

    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from bench.meters import GpuMeter

    lora = {
        "r": settings.lora_rank, "lora_alpha": settings.lora_alpha, "lora_dropout": settings.lora_dropout,
    }  # fmt: skip
    network = backend.load(chosen.source, choice, settings.max_length)
    lora["target_modules"] = loading.lora_targets(network, settings)
    network = backend.add_lora(network, lora, settings.checkpointing, settings.max_length, settings.seed)
    loading.start_lora(network, settings)
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in network.modules())
    if choice.device == "cpu" and compiled != (case.arm == "unsloth-compiled"):
        raise RuntimeError(f"{case.arm}: its layers are {'' if compiled else 'not '}compiled")
    if ours := [name for name in patched(network) if "fallback." in name]:
        raise RuntimeError(f"{case.arm}: its layers are ours, {ours}")
    everything = case.arm == "trl-everything"
    columns: dict[str, Any] = {"input_ids": [r.input_ids for r in rows]}
    if not everything:
        columns["completion_mask"] = [[int(label != IGNORED) for label in r.labels] for r in rows]

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.losses: list[float] = []
            self.last = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.wait()
            self.last = time.perf_counter()

        def on_log(self, _: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            if logs and "loss" in logs:
                # The loss was read for this log, so the device is done with the step.
                now = time.perf_counter()
                self.seconds.append(now - self.last)
                self.losses.append(float(logs["loss"]))
                turns.wait()
                self.last = time.perf_counter()

    clock = Clock()
    trainer = SFTTrainer(
        model=network,
        args=SFTConfig(
            output_dir=str(folder / "rival"),
            max_steps=steps,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.accumulation,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.scheduler,
            optim=choice.trainers_optimizer,
            gradient_checkpointing=settings.checkpointing,
            bf16=choice.dtype == "bfloat16",
            fp16=choice.dtype == "float16",
            use_cpu=choice.device == "cpu",
            max_length=settings.max_length,
            completion_only_loss=not everything,
            # The rows stand in the order in which the recipe's own training draws them.
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=settings.seed,
        ),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trained = {parameter.dtype for parameter in network.parameters() if parameter.requires_grad}
    trainer.train()
    gpu = GpuMeter(choice.device == "cuda")
    memory = train.memory_in_use(choice.device == "cuda", peak=True)
    each = settings.batch_size * settings.accumulation
    counted = slice(1 + case.warmup, None)
    seconds = sum(clock.seconds[counted])
    parts = [rows[i : i + each] for i in range(0, len(rows), each)][:steps]
    tokens = [sum(len(r.input_ids) for r in part) for part in parts]
    supervised = sum(r.supervised_tokens for part in parts[counted] for r in part)
    return {
        "choice": choice.as_json(),
        "handicap": handicap(trained, choice.device),
        "train": {
            "first_step_seconds": clock.seconds[0],
            "tokens_per_second": sum(tokens[counted]) / seconds,
            "supervised_tokens_per_second": supervised / seconds,
            "samples_per_second": sum(map(len, parts[counted])) / seconds,
            "peak_resident_bytes": memory["resident"],
            "peak_allocated_bytes": memory.get("cuda_allocated"),
            "device_process_bytes": gpu.process_bytes(),
            "steps": [
                {"seconds": s, "loss": x, "tokens": n}
                for s, x, n in zip(clock.seconds, clock.losses, tokens, strict=True)
            ],
        },
    }


def handicap(trained: Collection[Any], device: str) -> str | None:
    """What makes an arm slower here than on another machine."""
    import torch

    able = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if device != "cpu" or able or platform.machine() != "x86_64" or torch.bfloat16 not in trained:
        return None
    return "it keeps what it trains in bfloat16, and this processor has no instructions for that"


def in_order(
    recipe: Recipe, balance: Any, kept: Sequence[Any], rendered: Sequence[Rendered], settings: Any, steps: int
) -> list[Rendered]:
    """The rows of so many steps, as the recipe's own training draws them."""
    from recipes.stages.batches import Drawn

    classes, drawn = [0] * len(kept), [len(kept)]
    if isinstance(balance, Balance):
        sizes = Counter(str(example.label) for example in kept).most_common()
        names = [name for name, _ in sizes]
        classes = [names.index(str(example.label)) for example in kept]
        drawn = draws([size for _, size in sizes], balance)
    order = Drawn(classes, drawn, settings.seed)
    each, found, epoch = settings.batch_size * settings.accumulation, list[Rendered](), 0
    while len(found) < each * steps:
        order.set_epoch(epoch)
        whole = list(order)
        # An epoch's last step may be smaller; here every step is whole.
        found += [rendered[i] for i in whole[: len(whole) // each * each]]
        epoch += 1
    return found[: each * steps]


if __name__ == "__main__":
    main(*sys.argv[1:])
