"""A base model and its adapter, loaded by a backend: to train, and to answer."""

import hashlib
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fallback.choose import Attention, Backend, CannotRun, Choice, choose
from recipes.stages import adapter, processes
from recipes.stages.base_model import Chosen, ensure_files, load_tokenizer, model_type
from recipes.stages.classifier import Known
from recipes.stages.console import note
from recipes.stages.recipe import Recipe, Settings, UserError
from recipes.stages.render import Renderer
from recipes.stages.resume import backend_of, settings_of, trained_in
from recipes.stages.run import Run, find_run, replacing_folder


@dataclass(frozen=True)
class Model:
    """A base model with its adapter, loaded by a backend, and how to talk to it."""

    network: Any
    tokenizer: Any
    renderer: Renderer
    choice: Choice


def load_for_training(recipe: Recipe, chosen: Chosen, settings: Settings, choice: Choice) -> Model:
    backend = choice.module()
    backend.import_libraries(choice)
    processes.first_here(lambda: ensure_files(recipe, chosen))
    from fallback import passes

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
    if _teach(network, choice) and (why_not := passes.unpack(network, choice.dtype)):
        note(f"weights are unpacked in every pass; unpacked ones are not kept: {why_not}")
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


def _teach(network: Any, choice: Choice) -> bool:
    """On CPUs plain PEFT's layers are taught fewer passes over memory."""
    from fallback import passes

    fitting = choice.backend == "peft" and passes.fitting(choice.device)
    if fitting:
        passes.teach(network)
    return fitting


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


def load_to_answer(recipe: Recipe, run: Run, chosen: Chosen, choice: Choice, max_length: int) -> Model:
    """`load_trained`, for whoever asks for answers and does not look into layers."""
    from fallback import passes

    model = load_trained(recipe, run, chosen, choice, max_length)
    fitting = choice.backend == "peft" and passes.fitting(choice.device)
    if fitting and (why_not := passes.put_together(model.network, choice.dtype)):
        note(f"answers unpack the weights of every layer for every token; whole matrices are not made: {why_not}")
    return model


def load_trained(recipe: Recipe, run: Run, chosen: Chosen, choice: Choice, max_length: int) -> Model:
    """The base model with the run's adapter, ready to answer."""
    backend = choice.module()
    processes.join(choice.device)
    backend.import_libraries(choice)
    processes.first_here(lambda: ensure_files(recipe, chosen))
    from transformers import AutoTokenizer

    with adapter.reading(run, "tokenizer.json"):
        tokenizer = AutoTokenizer.from_pretrained(run.adapter, trust_remote_code=False)
    with adapter.reading(run, "chat_template.jinja"):
        renderer = Renderer(tokenizer, recipe.stop_phrase)
        adapter.check_template(renderer)
    base = _base(backend, chosen, choice, max_length)
    with adapter.reading(run, "adapter_model.safetensors"):
        network = backend.load_adapter(base, str(run.adapter))
        adapter.check_loaded(run, network)
    _teach(network, choice)
    return Model(backend.for_inference(network), tokenizer, renderer, choice)


def open_run(recipe: Recipe, path: Path | None, wanted: Backend = "auto") -> tuple[Run, Chosen, Choice, int]:
    """A trained run and what to answer with: its own backend where that can run here."""
    remedy = f"train one first: python -m recipes.{recipe.name} train"
    run = find_run(recipe, path, lambda run: run.trained, remedy)
    adapter.check(run)
    chosen = Chosen.opened(run.config)
    settings, trained_with, rounded = settings_of(run), backend_of(run), trained_in(run)
    if recipe.closed:
        Known.of(run)
    kind = model_type(recipe, chosen)
    # Scoring says outright which tokens may be looked at, which FlashAttention cannot be told.
    attention: Attention = "auto" if recipe.closed else settings.attention
    backend = trained_with if wanted == "auto" else wanted
    # On CPUs answers are rounded as the training was, or less: a confidence was fitted to what came out then.
    large = chosen.large and rounded == "bfloat16"
    try:
        choice = choose(kind, backend, settings.quantization, attention=attention, dtype=settings.dtype, large=large)
    except CannotRun:
        if wanted != "auto":
            raise
        try:
            choice = choose(kind, "auto", settings.quantization, dtype=settings.dtype, large=large)
        except CannotRun:
            choice = choose(kind, "auto", settings.quantization)
    if processes.rank() == 0:
        print(f"{run.path}, size {chosen.size}: {chosen.description}", file=sys.stderr)
    return run, chosen, choice, settings.max_length


def save_adapter(model: Model, run: Run, known: Known | None = None, trainer: Any = None) -> None:
    # Where the weights are divided among processes, all of them have to give their part.
    whole = trainer.trained_weights() if trainer is not None and processes.sharded() else None
    if processes.rank():
        return
    with replacing_folder(run.adapter) as beside:
        # Embeddings are never trained here; to find that out by itself PEFT would ask the hub.
        model.network.save_pretrained(beside, save_embedding_layers=False, state_dict=whole)
        model.tokenizer.save_pretrained(beside)
        if known:
            known.write(beside)
