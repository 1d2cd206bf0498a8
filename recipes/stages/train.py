"""data/ -> adapter/: the one training loop of this project, which bench measures too."""

import json
import math
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from fallback import compiled
from fallback.choose import Choice
from fallback.patched import patched
from recipes.stages import processes
from recipes.stages.base_model import Chosen, ensure_files, load_tokenizer
from recipes.stages.checkpoint import step_of
from recipes.stages.console import duration, progress, say
from recipes.stages.loading import load_for_training, save_adapter
from recipes.stages.recipe import Balance, Example, Interrupted, Recipe, Settings, UserError
from recipes.stages.render import Renderer
from recipes.stages.resume import data_digest
from recipes.stages.run import BrokenFile, Run, read_jsonl, write_json, write_whole
from recipes.stages.stopping import EarlyStopping
from recipes.stages.validation import VALIDATION_ANSWERS, AnswerValidation, ClassValidation, evaluations


def examples(recipe: Recipe, run: Run, split: str) -> list[Example]:
    path = run.data / f"{split}.jsonl"
    found = []
    for number, row in enumerate(read_jsonl(path), 1):
        try:
            example = recipe.to_example(row)
            whole = all(isinstance(message.content, str) for message in example.messages)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            whole = False
        if not whole:
            raise BrokenFile(f"{path}, line {number}: not a row of {recipe.name}; prepare the data again")
        found.append(example)
    return found


def optimizer_steps(rows: int, settings: Settings, world: int = 1) -> int:
    """As transformers' Trainer counts them; rows are those that an epoch draws."""
    per_epoch = max(1, math.ceil(rows / (settings.batch_size * settings.accumulation * world)))
    return settings.max_steps or math.ceil(per_epoch * settings.epochs)


def sft_arguments(settings: Settings, choice: Choice, run: Run, steps: int, validation: Any, often: bool = True) -> Any:
    """Settings -> SFTConfig: the one place where our names meet TRL's. Not `often`: validation at the end alone."""
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(run.path / "checkpoints"),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        # To the Trainer a step is one batch: its parts are ours (batches.Steps).
        per_device_train_batch_size=settings.batch_size * settings.accumulation,
        per_device_eval_batch_size=max(8, settings.batch_size),
        gradient_accumulation_steps=1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=math.ceil(settings.warmup_ratio * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=choice.trainers_optimizer,
        gradient_checkpointing=settings.checkpointing,
        neftune_noise_alpha=settings.neftune_alpha or None,
        bf16=choice.dtype == "bfloat16",
        fp16=choice.dtype == "float16",
        use_cpu=choice.device == "cpu",
        # Every LoRA matrix takes part in every step, and nothing here keeps a state in buffers.
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        seed=settings.seed,
        logging_steps=1,
        # Otherwise a loss that is not a number is logged as zero.
        logging_nan_inf_filter=False,
        report_to=["tensorboard"],
        disable_tqdm=True,
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=evaluated_every(steps, settings, validation) if often else steps,
        metric_for_best_model=f"eval_{validation.metric}",
        greater_is_better=validation.higher_is_better,
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=choice.device == "cuda",
    )


def evaluated_every(steps: int, settings: Settings, validation: Any) -> int:
    trained = steps * settings.batch_size * settings.accumulation * processes.world()
    return math.ceil(steps / evaluations(trained, len(validation.items), validation.share_of_time))


# Steps from which the time of the whole training is estimated first.
_FIRST_STEPS = 5


def train(
    recipe: Recipe,
    run: Run,
    settings: Settings,
    chosen: Chosen,
    choice: Choice,
    balance: Any = None,
    watch: Any = None,
    resume: Path | None = None,
) -> dict[str, Any]:
    """Fine-tune on the run's training split; writes steps.jsonl, logs/ and adapter/, returns the metrics. `watch` is
    a callbacks.Watch that looks on; `resume` is the checkpoint to go on from."""
    began = time.perf_counter()
    memory = {"before_loading": memory_in_use(choice.device == "cuda")}
    say(f"loading {choice.backend} and the model …")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.logs)
    model = load_for_training(recipe, chosen, settings, choice)
    memory["after_loading"] = memory_in_use(choice.device == "cuda")
    from recipes.stages import folding
    from recipes.stages.batches import Batches, Drawn, Steps, dataset
    from recipes.stages.callbacks import Safekeeping, StepRecord, StopEarly, Validations, Watched
    from recipes.stages.losses import Objective, draws
    from recipes.stages.tokens import tokens_of
    from recipes.stages.trainer import RecipeTrainer

    read = tokens_of(model.renderer, examples(recipe, run, "train"), settings.max_length, "the training split")
    items, counts = read.items, read.counts
    if not items:
        raise UserError(f"no training example fits into {settings.max_length} tokens; raise --max-length")
    if counts["shortened"] or counts["left_out"]:
        say(
            f"max_length {settings.max_length}: {counts['shortened']} inputs were shortened and {counts['left_out']} "
            "examples left out because their answer alone is longer; raise --max-length to keep them whole"
        )
    held_out = examples(recipe, run, "val")
    early = EarlyStopping.parse(settings.early_stopping)
    classes, drawn, objective = [0] * len(items), [len(items)], None
    validation: ClassValidation | AnswerValidation
    # Chat models are trained beyond the lowest validation loss on purpose; their last adapter is kept.
    keep_best = early is not None and early.watch == "validation"
    if isinstance(balance, Balance):
        keep_best = True
        validation = ClassValidation.on(model, held_out, items, balance.eval_rows, settings)
        names = list(validation.train_rows)
        classes = [names.index(str(example.label)) for example in items]
        sizes = list(validation.train_rows.values())
        drawn, objective = draws(sizes, balance), Objective.of(sizes, balance)
    else:
        validation = AnswerValidation(
            model, held_out[:VALIDATION_ANSWERS], settings.max_length, recipe.sampling, recipe.stop,
            run.logs / "answers.jsonl",
        )  # fmt: skip
    team = processes.team()
    steps = optimizer_steps(sum(drawn), settings, team.size)
    trainable = sum(p.numel() for p in model.network.parameters() if p.requires_grad)
    say(
        f"training {trainable:,} parameters on {sum(drawn):,} examples: {steps:,} steps "
        f"of {settings.batch_size} x {settings.accumulation}{f' on each of {team.size} processes' * (team.size > 1)}, "
        f"backend {choice.backend}, {choice.dtype}"
    )
    if choice.backend == "unsloth" and choice.device == "cuda":
        say("the first steps take half a minute or more: Unsloth compiles the layers")
    say(f"watch it: tensorboard --logdir {run.logs}")
    checks_planned = math.ceil(steps / evaluated_every(steps, settings, validation)) if watch is None else 1
    if early and early.watch == "validation" and checks_planned <= early.patience:
        say(
            f"early stopping: there will be {checks_planned} evaluations, so that a patience of {early.patience} "
            "never ends; name a smaller one"
        )
    unfoldable = folding.obstacle(choice)
    if settings.fold and unfoldable:
        say(f"batches are padded: {unfoldable}")

    start = step_of(resume)
    before = kept_lines(run.path / "steps.jsonl", start)
    validation.recall(kept_lines(run.path / "validation.jsonl", start))
    if isinstance(validation, AnswerValidation):
        kept_lines(validation.log, start)
    losses = [line["loss"] for line in before]
    first: list[float] = []
    replaced: dict[str, int] = {}
    with (
        progress("training", "steps") as bar,
        appending(run.path / "steps.jsonl") as steps_file,
        appending(run.path / "validation.jsonl") as validation_file,
    ):
        task = bar.add_task("", total=steps)

        def on_step(step: dict[str, Any], total: int) -> None:
            losses.append(step["loss"])
            here = step["step"] - start
            if here == 1:
                # Now, because what is switched on for the training alone is on.
                replaced.update(patched(model.network, trainer))
                told = (
                    "; ".join(f"{name} ({count})" for name, count in replaced.items()) or "nothing, the original code"
                )
                bar.console.print(f"patched: {told}", markup=False)
            now = time.perf_counter()
            if here == 1:
                # Whoever compiles, does it in here.
                first.append(now)
            each = (now - first[0]) / (here - 1) if here > 1 else step["seconds"]
            left = each * (total - step["step"])
            if here == min(_FIRST_STEPS, total - start):
                bar.console.print(
                    f"by the first {here} steps, training will take about {duration(now - loaded + left)}"
                    + ("" if settings.compile or team.size > 1 else compiled.advice(choice, left))
                )
            bar.update(task, completed=step["step"], total=total)
            if step["step"] % settings.log_every == 0 or step["step"] in (start + 1, total):
                rate = step["supervised_tokens"] / max(step["seconds"], 1e-9)
                bar.console.print(
                    f"step {step['step']:>5}/{total}  loss {step['loss']:.4f}  grad {step['grad_norm']:.3f}  "
                    f"lr {step['learning_rate']:.2e}  {rate:,.0f} answer tokens/s  "
                    f"{left:,.0f} s left",
                    markup=False,
                )

        def on_validation(step: int, metrics: dict[str, float], better: bool) -> None:
            validation_file.write(json.dumps({"step": step, **metrics}) + "\n")
            validation_file.flush()
            told = f"validation at step {step}: {validation.told(metrics)}" + ", the best so far" * better
            bar.console.print(told, markup=False)

        record = StepRecord(steps_file, on_step)
        checks = Validations(
            f"eval_{validation.metric}",
            validation.higher_is_better,
            (lambda: save_adapter(model, run, validation.known, trainer)) if keep_best else None,
            on_validation,
        )
        stop = StopEarly(early, settings.log_every) if early else None
        watched = Watched(watch) if watch else None
        # Whoever looks on measures steps, and no checkpoints. The last callback has the last word on saving.
        safe = Safekeeping(math.inf if watch else settings.checkpoint_minutes, _bad_steps(choice))
        compiling = None
        if settings.compile:
            # Not before it is asked for: it loads the compiler.
            from recipes.stages.compiling import Compiling, failures_told

            compiling = Compiling(bar.console.print, safe, going_on(recipe, run))
        batches = Batches(
            model.tokenizer.pad_token_id,
            model.network.config.model_type == "gemma3",
            watch,
            settings.fold and unfoldable is None,
            # A batch of another kind would have everything compiled once more.
            always=settings.compile,
            few_lengths=choice.device == "cpu" and choice.dtype == "bfloat16",
        )
        trainer = RecipeTrainer(
            run=run,
            steps=Steps(
                Drawn(classes, drawn, settings.seed),
                read.lengths,
                settings,
                team,
                filler=len(items),
            ),
            objective=objective,
            own_loss=choice.backend != "unsloth",
            validate=validation,
            model=model.network,
            # Whoever looks on is told of memory and energy, which an evaluation in between would make its own.
            args=sft_arguments(settings, choice, run, steps, validation, often=watch is None),
            train_dataset=dataset(read.table, classes if objective else None, filler=team.size > 1),
            eval_dataset=dataset(read.table[:1]),
            processing_class=model.tokenizer,
            data_collator=batches,
            callbacks=[one for one in (record, checks, watched, compiling, safe, stop) if one],
        )
        trainer.supervised_tokens = 0 if team.rank else sum(line["supervised_tokens"] for line in before)
        for one in (record, watched, compiling):
            if one:
                one.trainer = trainer
        loaded = time.perf_counter()
        told = failures_told(run, safe, going_on(recipe, run)) if compiling else nullcontext()
        with told, safe.listening(), closing_logs(trainer):
            trainer.train(str(resume) if resume else None)
        trained = time.perf_counter()
        if safe.diverged:
            raise UserError(
                f"the gradients of the last {safe.bad} steps were not finite: the training has diverged at step "
                f"{len(losses)}. Lower --learning-rate or --max-grad-norm and look at the data of these steps; "
                f"the last good state is kept: {going_on(recipe, run)} --learning-rate "
                f"{settings.learning_rate / 3:.1g} --accept-changes"
            )
        if safe.asked is not None and len(losses) < steps and not (stop and stop.stopped_at):
            if trainer.is_deepspeed_enabled:
                raise Interrupted(
                    f"stopped after step {len(losses)} of {steps}: no checkpoint, under DeepSpeed", 128 + safe.asked
                )
            raise Interrupted(
                f"stopped after step {len(losses)} of {steps}; go on with {going_on(recipe, run)}", 128 + safe.asked
            )
        if not keep_best:
            save_adapter(model, run, validation.known, trainer)
    window = max(1, min(10, len(losses) // 5))
    measured: dict[str, Any] = {
        "trainable_parameters": trainable,
        "patched": replaced,
        "optimizer_steps": len(losses),
        "supervised_tokens": trainer.seen()[0],
        "forward_passes": sum(trainer.parts),
        "padded_tokens": batches.padded_tokens,
        "computed_tokens": batches.computed_tokens,
        **{f"train_{key}": value for key, value in counts.items()},
        "loss_window": window,
        "first_loss": sum(losses[:window]) / window,
        "final_loss": sum(losses[-window:]) / window,
        "memory_bytes": {**memory, "peak": memory_in_use(choice.device == "cuda", peak=True)},
        "processes": team.size,
        "load_seconds": round(loaded - began, 2),
        "train_seconds": round(trainer.seconds_before + trained - loaded, 2),
        "resumed_from_step": start or None,
        **({"compiled": compiling.found} if compiling else {}),
    }
    measured.update(
        validation_seconds=round(validation.seconds, 2),
        data_seconds=round(trainer.data_seconds, 4),
        stopped_early_at=stop.stopped_at if stop else None,
        kept_step=checks.best_step if keep_best else len(losses),
    )
    if isinstance(validation, ClassValidation):
        measured["temperature"] = validation.temperature
    if keep_best:
        measured[f"best_eval_{validation.metric}"] = checks.best
        say(f"kept the adapter of step {checks.best_step}, {validation.metric} {checks.best:.4f} on validation")
    if stop and stop.stopped_at:
        say(f"stopped early at step {stop.stopped_at} of {steps}: {settings.early_stopping}")
    if batches.computed_tokens < batches.padded_tokens:
        say(f"{1 - batches.computed_tokens / batches.padded_tokens:.0%} of the tokens of padded batches were spared")
    say(
        f"validating took {validation.seconds / measured['train_seconds']:.1%} of the time, "
        f"waiting for batches {trainer.data_seconds / max(trained - loaded, 1e-9):.1%}"
    )
    return measured


@contextmanager
def closing_logs(trainer: Any) -> Iterator[None]:
    """TensorBoard writes in a thread of its own, and what befalls it there comes up in ours at its next call: once is
    enough."""
    threading.excepthook, shown = (lambda _: None), threading.excepthook
    try:
        yield
    except BaseException:
        for callback in trainer.callback_handler.callbacks:
            if writer := getattr(callback, "tb_writer", None):
                with suppress(Exception):
                    writer.close()
        raise
    else:
        threading.excepthook = shown


def _bad_steps(choice: Choice) -> int:
    """Steps in a row with gradients that are not finite, after which there is no hope. Loss scaling begins too high on
    purpose and halves at each of them: 16 halvings from 65,536 to 1."""
    return 3 + (16 if choice.dtype == "float16" else 0)


def kept_lines(path: Path, steps: int) -> list[dict[str, Any]]:
    """The lines of a log up to this step; what came after them, or was cut off, is taken away from the file."""
    kept, lines = list[str](), list[dict[str, Any]]()
    # Not splitlines(): an answer may hold other ends of lines than ours.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        try:
            value = json.loads(line)
            if value["step"] > steps:
                break
        except (ValueError, TypeError, KeyError):
            break
        kept.append(f"{line}\n")
        lines.append(value)
    if processes.rank() == 0:
        write_whole(path, "".join(kept))
    return lines


def appending(path: Path) -> IO[str]:
    """A log that the first process writes for all."""
    return (path if processes.rank() == 0 else Path(os.devnull)).open("a", encoding="utf-8")


def going_on(recipe: Recipe, run: Run) -> str:
    """The command that goes on with this run."""
    # Without the two dashes torchrun takes --run for the beginning of an option of its own.
    started = "python -m" if processes.world() == 1 else f"torchrun --nproc_per_node {processes.world()} -m --"
    return f"{started} recipes.{recipe.name} train --resume --run {shlex.quote(str(run.path))}"


def memory_in_use(cuda: bool, peak: bool = False) -> dict[str, int]:
    """Resident memory of this process and, on a GPU, what torch has allocated there."""
    import resource

    import psutil

    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    found = {"resident": most if peak else psutil.Process().memory_info().rss}
    if cuda and "torch" in sys.modules:
        import torch

        if torch.cuda.is_initialized():
            found["cuda_allocated"] = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
            if peak:
                found["cuda_reserved"] = torch.cuda.max_memory_reserved()
    return found


def decisions(
    run: Run, settings: Settings, chosen: Chosen, balance: Any = None, preset: str | None = None
) -> dict[str, Any]:
    """What training_config.json holds: everything that was decided before anything is computed with it."""
    config: dict[str, Any] = {"base_model": chosen.stored(), "notice": chosen.description, "preset": preset}
    config["data_sha256"] = data_digest(run)
    config["processes"] = processes.world()
    config["settings"] = asdict(settings)
    if isinstance(balance, Balance):
        config["balance"] = asdict(balance)
    return config


def record(run: Run, config: dict[str, Any], choice: Choice) -> None:
    write_json(run.path / "choice.json", choice.as_json())
    write_json(run.config, config)


def show(recipe: Recipe, run: Run, chosen: Chosen, count: int) -> None:
    """Print examples as the model sees them."""
    ensure_files(recipe, chosen)
    renderer = Renderer(load_tokenizer(recipe, chosen.source), recipe.stop_phrase)
    for example in examples(recipe, run, "train")[:count]:
        say(renderer.show(example))
