"""data/ -> adapter/: the one training loop of this project, which bench measures too."""

import hashlib
import math
import os
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from fallback.choose import Choice
from recipes.stages.base_model import Chosen, ensure_files, load_tokenizer
from recipes.stages.console import progress, say
from recipes.stages.recipe import Example, Recipe, Settings, UserError
from recipes.stages.render import Rendered, Renderer
from recipes.stages.run import Run, read_jsonl, write_json, writing


@dataclass(frozen=True)
class Model:
    """A base model with its adapter, loaded by a backend, and how to talk to it."""

    network: Any
    tokenizer: Any
    renderer: Renderer
    choice: Choice


def examples(recipe: Recipe, run: Run, split: str) -> list[Example]:
    return [recipe.to_example(row) for row in read_jsonl(run.data / f"{split}.jsonl")]


def optimizer_steps(rows: int, settings: Settings) -> int:
    """As transformers' Trainer counts them."""
    per_epoch = max(1, math.ceil(math.ceil(rows / settings.batch_size) / settings.accumulation))
    steps = math.ceil(per_epoch * settings.epochs)
    return min(steps, settings.max_steps) if settings.max_steps else steps


def load_for_training(recipe: Recipe, chosen: Chosen, settings: Settings, choice: Choice) -> Model:
    backend = choice.module()
    backend.import_libraries(choice)
    ensure_files(recipe, chosen)
    tokenizer = load_tokenizer(recipe, chosen.source)
    network = backend.load(chosen.source, choice, settings.max_length)
    network = backend.add_lora(
        network,
        dict(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=lora_targets(network, settings),
        ),
        settings.checkpointing,
        settings.max_length,
        settings.seed,
    )
    start_lora(network, settings)
    return Model(network, tokenizer, Renderer(tokenizer, recipe.stop_phrase), choice)


def lora_targets(network: Any, settings: Settings) -> list[str] | str:
    """By name; in a model with a vision tower by a pattern that leaves the tower out. The published Gemma 3 12B is
    such a model, and its tower has layers of the same names: 2,985,984 more parameters that no text ever trains."""
    if not any("vision" in name for name, _ in network.named_modules()):
        return list(settings.lora_targets)
    return rf"(?!.*vision).*\.(?:{'|'.join(map(re.escape, settings.lora_targets))})"


def start_lora(network: Any, settings: Settings) -> None:
    """Give every LoRA matrix a start decided by the seed and its name, not by the order in which a backend made
    it: both backends then learn from the same point, and their losses can be laid over each other."""
    import torch

    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "lora_B" in name:
                weight.zero_()
            if "lora_A" not in name:
                continue
            digest = hashlib.sha256(f"{settings.seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            start = torch.empty(weight.shape, dtype=torch.float32)
            if settings.lora_init == "gaussian":
                start.normal_(std=1 / settings.lora_rank, generator=generator)
            else:
                torch.nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
            weight.copy_(start)


def sft_arguments(settings: Settings, choice: Choice, run: Run, steps: int) -> Any:
    """Settings -> SFTConfig: the one place where our names meet TRL's."""
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(run.path / "checkpoints"),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=max(8, settings.batch_size),
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=math.ceil(settings.warmup_ratio * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=choice.optimizer,
        gradient_checkpointing=settings.checkpointing,
        neftune_noise_alpha=settings.neftune_alpha or None,
        bf16=choice.dtype == "bfloat16",
        fp16=choice.dtype == "float16",
        use_cpu=choice.device == "cpu",
        seed=settings.seed,
        logging_steps=1,
        report_to=["tensorboard"],
        disable_tqdm=True,
        save_strategy="no",
        eval_strategy="no",
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=choice.device == "cuda",
    )


def render_all(
    renderer: Renderer, items: Iterable[Example], max_length: int, what: str
) -> tuple[list[Rendered], dict[str, int]]:
    """Tokens of every example, and how many had to be shortened or left out."""
    items = list(items)
    rendered: list[Rendered] = []
    shortened = 0
    with progress(f"reading {what}", "examples") as bar:
        task = bar.add_task("", total=len(items))
        for example in items:
            tokens = renderer.example(example, max_length)
            if tokens is not None:
                rendered.append(tokens)
                shortened += tokens.cut_tokens > 0
            bar.advance(task)
    return rendered, {"examples": len(rendered), "shortened": shortened, "left_out": len(items) - len(rendered)}


def train(recipe: Recipe, run: Run, settings: Settings, chosen: Chosen, choice: Choice) -> dict[str, Any]:
    """Fine-tune on the run's training split; writes steps.jsonl, logs/ and adapter/, returns the metrics."""
    began = time.perf_counter()
    say(f"loading {choice.backend} and the model …")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.logs)
    model = load_for_training(recipe, chosen, settings, choice)
    from recipes.stages.trainer import Batches, RecipeTrainer, StepRecord, dataset

    rendered, counts = render_all(
        model.renderer, examples(recipe, run, "train"), settings.max_length, "the training split"
    )
    if not rendered:
        raise UserError(f"no training example fits into {settings.max_length} tokens; raise --max-length")
    if counts["shortened"] or counts["left_out"]:
        say(
            f"max_length {settings.max_length}: {counts['shortened']} inputs were shortened and {counts['left_out']} "
            "examples left out because their answer alone is longer; raise --max-length to keep them whole"
        )
    steps = optimizer_steps(len(rendered), settings)
    trainable = sum(p.numel() for p in model.network.parameters() if p.requires_grad)
    say(
        f"training {trainable:,} parameters on {len(rendered):,} examples: {steps:,} steps "
        f"of {settings.batch_size} x {settings.accumulation}, backend {choice.backend}, {choice.dtype}"
    )
    say(f"watch it: tensorboard --logdir {run.logs}")

    losses: list[float] = []
    with progress("training", "steps") as bar, writing(run.path / "steps.jsonl") as steps_file:
        task = bar.add_task("", total=steps)

        def on_step(step: dict[str, Any], total: int) -> None:
            losses.append(step["loss"])
            bar.update(task, completed=step["step"], total=total)
            if step["step"] % settings.log_every == 0 or step["step"] in (1, total):
                rate = step["supervised_tokens"] / max(step["seconds"], 1e-9)
                left = (time.perf_counter() - loaded) / step["step"] * (total - step["step"])
                bar.console.print(
                    f"step {step['step']:>5}/{total}  loss {step['loss']:.4f}  grad {step['grad_norm']:.3f}  "
                    f"lr {step['learning_rate']:.2e}  {rate:,.0f} answer tokens/s  {left:,.0f} s left",
                    markup=False,
                )

        record = StepRecord(steps_file, on_step)
        trainer = RecipeTrainer(
            model=model.network,
            args=sft_arguments(settings, choice, run, steps),
            train_dataset=dataset(rendered),
            processing_class=model.tokenizer,
            data_collator=Batches(model.tokenizer.pad_token_id, model.network.config.model_type == "gemma3"),
            callbacks=[record],
        )
        record.trainer = trainer
        loaded = time.perf_counter()
        trainer.train()
        trained = time.perf_counter()
    save_adapter(model, run)
    # The trainer makes its folder whether or not it has anything to put there.
    shutil.rmtree(run.path / "checkpoints", ignore_errors=True)
    window = max(1, min(10, len(losses) // 5))
    return {
        "trainable_parameters": trainable,
        "optimizer_steps": len(losses),
        "supervised_tokens": int(trainer.supervised_tokens),
        **{f"train_{key}": value for key, value in counts.items()},
        "first_loss": sum(losses[:window]) / window,
        "final_loss": sum(losses[-window:]) / window,
        "load_seconds": round(loaded - began, 2),
        "train_seconds": round(trained - loaded, 2),
    }


def save_adapter(model: Model, run: Run) -> None:
    beside = run.path / ".adapter.making"
    shutil.rmtree(beside, ignore_errors=True)
    model.network.save_pretrained(beside)
    model.tokenizer.save_pretrained(beside)
    shutil.rmtree(run.adapter, ignore_errors=True)
    beside.replace(run.adapter)


def record_choice(run: Run, settings: Settings, chosen: Chosen, choice: Choice) -> None:
    """Write down all decisions before anything is computed with them."""
    write_json(run.path / "choice.json", choice.as_json())
    write_json(
        run.config,
        {"base_model": asdict(chosen), "notice": chosen.description, "settings": asdict(settings)},
    )


def show(recipe: Recipe, run: Run, chosen: Chosen, count: int) -> None:
    """Print examples as the model sees them."""
    ensure_files(recipe, chosen)
    renderer = Renderer(load_tokenizer(recipe, chosen.source), recipe.stop_phrase)
    for example in examples(recipe, run, "train")[:count]:
        say(renderer.show(example))


def load_trained(recipe: Recipe, run: Run, chosen: Chosen, choice: Choice, max_length: int) -> Model:
    """The base model with the run's adapter, ready to answer."""
    backend = choice.module()
    backend.import_libraries(choice)
    ensure_files(recipe, chosen)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    network = backend.load_adapter(backend.load(chosen.source, choice, max_length), str(run.adapter))
    return Model(backend.for_inference(network), tokenizer, Renderer(tokenizer, recipe.stop_phrase), choice)
