"""data/ -> adapter/: the one training loop of this project, which bench measures too."""

import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fallback.choose import Attention, Backend, CannotRun, Choice, choose
from fallback.patched import patched
from recipes.stages.base_model import Chosen, ensure_files, load_tokenizer, model_type, refuse_pickles
from recipes.stages.classifier import Known
from recipes.stages.console import duration, progress, say
from recipes.stages.recipe import Balance, Example, Recipe, Sampling, Settings, UserError
from recipes.stages.render import Rendered, Renderer
from recipes.stages.run import Run, find_run, read_json, read_jsonl, write_json, writing
from recipes.stages.stopping import EarlyStopping


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
    """As transformers' Trainer counts them; rows are those that an epoch draws."""
    per_epoch = max(1, math.ceil(math.ceil(rows / settings.batch_size) / settings.accumulation))
    steps = math.ceil(per_epoch * settings.epochs)
    return min(steps, settings.max_steps) if settings.max_steps else steps


def load_for_training(recipe: Recipe, chosen: Chosen, settings: Settings, choice: Choice) -> Model:
    backend = choice.module()
    backend.import_libraries(choice)
    ensure_files(recipe, chosen)
    tokenizer = load_tokenizer(recipe, chosen.source)
    network = _base(backend, chosen, choice, settings.max_length)
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


def _base(backend: Any, chosen: Chosen, choice: Choice, max_length: int) -> Any:
    try:
        network = backend.load(chosen.source, choice, max_length)
    except (OSError, ValueError) as error:
        if chosen.weights == "random":
            raise
        raise UserError(f"{chosen.source}: cannot be loaded ({' '.join(str(error).split())[:300]})") from error
    # PEFT writes this name into the adapter's files, and it would be a path of this machine.
    network.name_or_path = network.config._name_or_path = chosen.stored()["source"]
    return network


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


def sft_arguments(settings: Settings, choice: Choice, run: Run, steps: int, validation: Any, often: bool = True) -> Any:
    """Settings -> SFTConfig: the one place where our names meet TRL's. Not `often`: validation at the end alone."""
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
        # Otherwise a loss that is not a number is logged as zero.
        logging_nan_inf_filter=False,
        report_to=["tensorboard"],
        disable_tqdm=True,
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=math.ceil(steps / evaluations(steps, settings, len(validation.items))) if often else steps,
        metric_for_best_model=f"eval_{validation.metric}",
        greater_is_better=validation.higher_is_better,
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=choice.device == "cuda",
    )


def render_all(
    renderer: Renderer, items: Iterable[Example], max_length: int, what: str
) -> tuple[list[Example], list[Rendered], dict[str, int]]:
    """The examples that fit, their tokens, and how many had to be shortened or left out."""
    items = list(items)
    kept: list[Example] = []
    rendered: list[Rendered] = []
    shortened = 0
    with progress(f"reading {what}", "examples") as bar:
        task = bar.add_task("", total=len(items))
        for example in items:
            tokens = renderer.example(example, max_length)
            if tokens is not None:
                kept.append(example)
                rendered.append(tokens)
                shortened += tokens.cut_tokens > 0
            bar.advance(task)
    left_out = len(items) - len(rendered)
    return kept, rendered, {"examples": len(rendered), "shortened": shortened, "left_out": left_out}


# Steps from which the time of the whole training is estimated first.
_FIRST_STEPS = 5
# A validation row costs about this share of a training row: no backward pass, but a walk over the codes.
_VALIDATION_COST = 0.6
# Share of the training time that choosing the best checkpoint may cost.
_VALIDATION_SHARE = 0.08
# Validation examples whose loss is watched, where answers are free text.
_VALIDATION_ANSWERS = 200


def evaluations(steps: int, settings: Settings, validation_rows: int) -> int:
    """How many evaluations the training can afford; the last one is at its end."""
    trained_rows = steps * settings.batch_size * settings.accumulation
    return max(1, min(20, int(_VALIDATION_SHARE * trained_rows / (_VALIDATION_COST * validation_rows))))


def keeping_classes(items: Sequence[Example], rows: int, seed: int) -> list[Example]:
    """A sample of about `rows` examples in which every class has its share, and at least two of its own."""
    by_class: dict[str | None, list[int]] = {}
    for index, example in enumerate(items):
        by_class.setdefault(example.label, []).append(index)
    chosen: list[int] = []
    for label, members in by_class.items():
        count = min(len(members), max(2, round(rows * len(members) / len(items))))
        chosen += random.Random(f"{seed} {label}").sample(members, count)
    return [items[index] for index in sorted(chosen)]


@dataclass
class ClassValidation:
    """Answers a part of the validation split as evaluate will answer the test split, and calibrates on it."""

    model: Model
    items: Sequence[Example]
    weights: Any
    """Of each item: the sample holds more of the rare classes than the split does."""
    train_rows: dict[str, int]
    max_length: int
    metric: str = "f1_macro"
    higher_is_better: bool = True
    temperature: float = 1.0
    seconds: float = 0.0

    @classmethod
    def on(
        cls, model: Model, split: Sequence[Example], train: Sequence[Example], rows: int, settings: Settings
    ) -> "ClassValidation":
        import numpy as np

        items = keeping_classes(split, rows, settings.seed)
        whole, part = Counter(e.label for e in split), Counter(e.label for e in items)
        weights = np.array([whole[e.label] / part[e.label] for e in items])
        train_rows = {str(label): count for label, count in Counter(e.label for e in train).most_common()}
        return cls(model, items, weights, train_rows, settings.max_length)

    @property
    def known(self) -> Known:
        return Known(self.train_rows, self.temperature)

    def __call__(self) -> dict[str, float]:
        import numpy as np

        from recipes.stages.classes import averages
        from recipes.stages.confidence import fit_temperature
        from recipes.stages.scoring import Codes, score

        began = time.perf_counter()
        codes = Codes(self.model.renderer, self.train_rows)
        true = [example.answer for example in self.items]
        prompts = [example.prompt for example in self.items]
        # As exact as answering will be: a temperature fitted to rougher probabilities was off by half.
        log_p = score(self.model, codes, prompts, self.max_length, include=true).log_p
        predicted = [codes.names[i] for i in log_p.argmax(axis=1)]
        of_true = log_p[np.arange(len(true)), [codes.index[name] for name in true]]
        correct = np.array([t == p for t, p in zip(true, predicted, strict=True)])
        self.temperature = fit_temperature(log_p, correct, self.weights)
        found = averages(true, predicted, self.weights)
        self.seconds += time.perf_counter() - began
        return {
            "loss": float(-(self.weights * of_true).sum() / self.weights.sum()),
            **{name: found[name] for name in ("f1_macro", "f1_micro", "accuracy")},
        }

    @staticmethod
    def told(metrics: dict[str, float]) -> str:
        f1, accuracy, loss = (metrics[f"eval_{name}"] for name in ("f1_macro", "accuracy", "loss"))
        return f"macro F1 {f1:.4f}, accuracy {accuracy:.4f}, loss {loss:.4f}"


@dataclass
class AnswerValidation:
    """How probable a part of the validation split's answers are to the model."""

    model: Model
    items: Sequence[Example]
    max_length: int
    sampling: Sampling
    stop: Sequence[str]
    log: Path
    """Where a few answers are written at every evaluation: numbers alone do not show how a persona speaks."""
    metric: str = "loss"
    higher_is_better: bool = False
    known: Known | None = None
    seconds: float = 0.0

    def __call__(self) -> dict[str, float]:
        from recipes.stages.generation import generate
        from recipes.stages.likelihood import answer_loss

        began = time.perf_counter()
        found = answer_loss(self.model, self.items, self.max_length)
        shown = self.items[:3]
        brief = replace(self.sampling, temperature=0.0, max_new_tokens=min(40, self.sampling.max_new_tokens))
        answers = generate(self.model, [item.prompt for item in shown], brief, self.stop, self.max_length)
        with self.log.open("a", encoding="utf-8") as file:
            for item, answer in zip(shown, answers, strict=True):
                line = {"loss": found["loss"], "question": item.text, "answer": answer.text}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.seconds += time.perf_counter() - began
        return {"loss": found["loss"], "perplexity": found["perplexity"]}

    @staticmethod
    def told(metrics: dict[str, float]) -> str:
        return f"loss {metrics['eval_loss']:.4f}, perplexity {metrics['eval_perplexity']:.2f}"


def train(
    recipe: Recipe,
    run: Run,
    settings: Settings,
    chosen: Chosen,
    choice: Choice,
    balance: Any = None,
    watch: Any = None,
) -> dict[str, Any]:
    """Fine-tune on the run's training split; writes steps.jsonl, logs/ and adapter/, returns the metrics. `watch` is
    a trainer.Watch that looks on."""
    began = time.perf_counter()
    memory = {"before_loading": memory_in_use(choice.device == "cuda")}
    say(f"loading {choice.backend} and the model …")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.logs)
    model = load_for_training(recipe, chosen, settings, choice)
    memory["after_loading"] = memory_in_use(choice.device == "cuda")
    from recipes.stages.losses import Objective, draws
    from recipes.stages.trainer import (
        Batches,
        Drawn,
        RecipeTrainer,
        StepRecord,
        StopEarly,
        Validations,
        Watched,
        dataset,
    )

    items, rendered, counts = render_all(
        model.renderer, examples(recipe, run, "train"), settings.max_length, "the training split"
    )
    if not rendered:
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
    validation = AnswerValidation(
        model, held_out[:_VALIDATION_ANSWERS], settings.max_length, recipe.sampling, recipe.stop,
        run.logs / "answers.jsonl",
    )  # fmt: skip
    # Chat models are trained beyond the lowest validation loss on purpose; their last adapter is kept.
    keep_best = early is not None and early.watch == "validation"
    if isinstance(balance, Balance):
        keep_best = True
        validation = ClassValidation.on(model, held_out, items, balance.eval_rows, settings)
        names = list(validation.train_rows)
        classes = [names.index(str(example.label)) for example in items]
        sizes = list(validation.train_rows.values())
        drawn, objective = draws(sizes, balance), Objective.of(sizes, balance)
    steps = optimizer_steps(sum(drawn), settings)
    trainable = sum(p.numel() for p in model.network.parameters() if p.requires_grad)
    say(
        f"training {trainable:,} parameters on {sum(drawn):,} examples: {steps:,} steps "
        f"of {settings.batch_size} x {settings.accumulation}, backend {choice.backend}, {choice.dtype}"
    )
    say(f"watch it: tensorboard --logdir {run.logs}")

    losses: list[float] = []
    replaced: dict[str, int] = {}
    with (
        progress("training", "steps") as bar,
        writing(run.path / "steps.jsonl") as steps_file,
        writing(run.path / "validation.jsonl") as validation_file,
    ):
        task = bar.add_task("", total=steps)

        def on_step(step: dict[str, Any], total: int) -> None:
            losses.append(step["loss"])
            if step["step"] == 1:
                # Now, because what is switched on for the training alone is on.
                replaced.update(patched(model.network, trainer))
                told = (
                    "; ".join(f"{name} ({count})" for name, count in replaced.items()) or "nothing, the original code"
                )
                bar.console.print(f"patched: {told}", markup=False)
            if step["step"] == min(_FIRST_STEPS, total):
                whole = (time.perf_counter() - loaded) / step["step"] * total
                bar.console.print(f"by the first {step['step']} steps, training will take about {duration(whole)}")
            bar.update(task, completed=step["step"], total=total)
            if step["step"] % settings.log_every == 0 or step["step"] in (1, total):
                rate = step["supervised_tokens"] / max(step["seconds"], 1e-9)
                left = (time.perf_counter() - loaded) / step["step"] * (total - step["step"])
                bar.console.print(
                    f"step {step['step']:>5}/{total}  loss {step['loss']:.4f}  grad {step['grad_norm']:.3f}  "
                    f"lr {step['learning_rate']:.2e}  {rate:,.0f} answer tokens/s  {left:,.0f} s left",
                    markup=False,
                )

        def on_validation(step: int, metrics: dict[str, float], better: bool) -> None:
            validation_file.write(json.dumps({"step": step, **metrics}) + "\n")
            told = f"validation at step {step}: {validation.told(metrics)}" + ", the best so far" * better
            bar.console.print(told, markup=False)

        record = StepRecord(steps_file, on_step)
        checks = Validations(
            f"eval_{validation.metric}",
            validation.higher_is_better,
            (lambda: save_adapter(model, run, validation.known)) if keep_best else None,
            on_validation,
        )
        stop = StopEarly(early, settings.log_every) if early else None
        watched = Watched(watch) if watch else None
        trainer = RecipeTrainer(
            sampler=Drawn(classes, drawn, settings.seed),
            objective=objective,
            validate=validation,
            model=model.network,
            # Whoever looks on is told of memory and energy, which an evaluation in between would make its own.
            args=sft_arguments(settings, choice, run, steps, validation, often=watch is None),
            train_dataset=dataset(rendered, classes if objective else None),
            eval_dataset=dataset(rendered[:1]),
            processing_class=model.tokenizer,
            data_collator=Batches(model.tokenizer.pad_token_id, model.network.config.model_type == "gemma3", watch),
            callbacks=[record, checks, *([stop] if stop else []), *([watched] if watched else [])],
        )
        record.trainer = trainer
        if watched:
            watched.trainer = trainer
        loaded = time.perf_counter()
        trainer.train()
        trained = time.perf_counter()
        if not keep_best:
            save_adapter(model, run, validation.known)
    # The trainer makes its folder whether or not it has anything to put there.
    shutil.rmtree(run.path / "checkpoints", ignore_errors=True)
    window = max(1, min(10, len(losses) // 5))
    measured: dict[str, Any] = {
        "trainable_parameters": trainable,
        "patched": replaced,
        "optimizer_steps": len(losses),
        "supervised_tokens": int(trainer.supervised_tokens),
        **{f"train_{key}": value for key, value in counts.items()},
        "first_loss": sum(losses[:window]) / window,
        "final_loss": sum(losses[-window:]) / window,
        "memory_bytes": {**memory, "peak": memory_in_use(choice.device == "cuda", peak=True)},
        "load_seconds": round(loaded - began, 2),
        "train_seconds": round(trained - loaded, 2),
    }
    measured.update(
        validation_seconds=round(validation.seconds, 2),
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
    say(f"validating took {validation.seconds / (trained - loaded):.1%} of the time")
    return measured


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


def save_adapter(model: Model, run: Run, known: Known | None = None) -> None:
    beside = run.path / ".adapter.making"
    shutil.rmtree(beside, ignore_errors=True)
    model.network.save_pretrained(beside)
    model.tokenizer.save_pretrained(beside)
    if known:
        known.write(beside)
    shutil.rmtree(run.adapter, ignore_errors=True)
    beside.replace(run.adapter)


def record_choice(
    run: Run, settings: Settings, chosen: Chosen, choice: Choice, balance: Any = None, preset: str | None = None
) -> None:
    """Write down all decisions before anything is computed with them."""
    write_json(run.path / "choice.json", choice.as_json())
    config: dict[str, Any] = {"base_model": chosen.stored(), "notice": chosen.description, "preset": preset}
    config["settings"] = asdict(settings)
    if isinstance(balance, Balance):
        config["balance"] = asdict(balance)
    write_json(run.config, config)


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

    tokenizer = AutoTokenizer.from_pretrained(run.adapter, trust_remote_code=False)
    network = backend.load_adapter(_base(backend, chosen, choice, max_length), str(run.adapter))
    return Model(backend.for_inference(network), tokenizer, Renderer(tokenizer, recipe.stop_phrase), choice)


def open_run(recipe: Recipe, path: Path | None, wanted: Backend = "auto") -> tuple[Run, Chosen, Choice, int]:
    """A trained run and what to answer with: its own backend where that can run here."""
    remedy = f"train one first: python -m recipes.{recipe.name} train"
    run = find_run(recipe, path, lambda run: run.trained, remedy)
    refuse_pickles(run.adapter, "adapter_model", "adapter_model")
    chosen = Chosen.opened(run.config)
    try:
        trained_with = read_json(run.path / "choice.json")["backend"]
        settings = read_json(run.config)["settings"]
        quantization, max_length = settings["quantization"], int(settings["max_length"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{run.path}: its choice.json and training_config.json are not whole ({error!r})") from None
    kind = model_type(recipe, chosen)
    # Scoring says outright which tokens may be looked at, which FlashAttention cannot be told.
    attention: Attention = "auto" if recipe.closed else settings.get("attention", "auto")
    try:
        choice = choose(kind, trained_with if wanted == "auto" else wanted, quantization, attention=attention)
    except CannotRun:
        if wanted != "auto":
            raise
        choice = choose(kind, "auto", quantization)
    print(f"{run.path}, size {chosen.size}: {chosen.description}", file=sys.stderr)
    return run, chosen, choice, max_length
