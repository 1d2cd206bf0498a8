"""adapter/ -> a model of its own: LoRA folded into the base weights as they were published, and looked at afterwards.

Neither 4 nor 8 bits are merged into: what was learned on quantised weights is added to the weights that they were made
from. Whether the outcome answers like the adapter is measured on the files, before they get their name.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from fallback import leave_out
from fallback.choose import Choice
from recipes.stages import loading, prepare, train
from recipes.stages.base_model import Chosen, ensure_files, published_config
from recipes.stages.classifier import Known
from recipes.stages.console import say
from recipes.stages.exported import Exported, load_whole, with_phrase
from recipes.stages.recipe import Message, Recipe, Sampling, UserError
from recipes.stages.resume import trained_in
from recipes.stages.run import (
    Run,
    as_system_error,
    place_beside,
    read_json,
    replacing_folder,
    write_json,
)

Precision = Literal["bfloat16", "float16", "float32"]
PROMPTS = 8
"""Sample prompts that adapter and merged model are compared on."""
ANSWER_TOKENS = 32
SHARD_BYTES = 4 * 2**30
"""Largest file of weights; more files than one get an index."""

# Half a last digit of each precision, as a share of a number; how many of them a merged weight may be off by; and what
# logits may differ by, as a share of what training changed in them and of their own spread, whichever is more. Rounding
# the weights of 16 random layers to bfloat16 moved the logits by 4 % of their spread, of two by 2 %; deeper ones and
# trained ones were not measured.
_HALF_DIGIT = {"float32": 2**-24, "bfloat16": 2**-9, "float16": 2**-12}
_DIGITS_OFF = {"float32": 16.0, "bfloat16": 2.0, "float16": 2.0}
_ALLOWED = {"float32": (0.01, 1e-4), "bfloat16": (0.1, 0.1), "float16": (0.05, 0.02)}


@dataclass(frozen=True)
class Source:
    """A trained run, opened to be exported."""

    recipe: Recipe
    run: Run
    chosen: Chosen
    trained: Choice
    """What it is answered with, quantisation included."""
    asked_quantization: str
    max_length: int

    @property
    def base_name(self) -> str:
        """The base model for other people: a hub id, or the last part of a path."""
        return self.chosen.name if not Path(self.chosen.name).is_dir() else Path(self.chosen.name).resolve().name


def open_source(recipe: Recipe, path: Path | None) -> Source:
    run, chosen, trained, max_length = loading.open_run(recipe, path, "peft")
    if run.unfinished:
        raise UserError(f"{run.path}: its training has not come to its end; {train.going_on(recipe, run)}")
    return Source(recipe, run, chosen, trained, read_json(run.config)["settings"]["quantization"], max_length)


def place_for(source: Source, out: Path | None, kind: str) -> Path:
    """The folder to write; what somebody else put there is not replaced."""
    place = out or source.run.path / kind
    if place.exists() and not (place.is_dir() and (not any(place.iterdir()) or (place / "export.json").is_file())):
        raise UserError(f"--out {place}: something else than an export is there; name another folder")
    if not place.parent.is_dir():
        raise UserError(f"--out {place}: there is no folder {place.parent}")
    return place


def merged(
    source: Source, out: Path | None, kind: str = "merged", more: Callable[[Path, Any], None] | None = None
) -> Path:
    """Write the merged model; `more` is given the folder and the loaded model before the folder gets its name."""
    place = place_for(source, out, kind)
    with system_errors(), replacing_folder(place) as beside:
        dtype, why = stored_dtype(source)
        about = _write(source, beside, dtype, why, more)
        tell(about, place)
    return place


@contextmanager
def system_errors() -> Iterator[None]:
    """A full disk is the system's matter, also where a library has hidden its number."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (refused := as_system_error(error)) and not isinstance(error, OSError):
            raise refused from error
        raise


def stored_dtype(source: Source) -> tuple[Precision, str]:
    """The precision of the merged weights: that of the base model's files, so that merging loses nothing else."""
    source.trained.module().import_libraries(source.trained)
    ensure_files(source.recipe, source.chosen)
    config = read_json(base_config(source))
    if "quantization_config" in config:
        raise UserError(
            f"{source.base_name}: its weights are quantised already, and nothing is merged into such; train on the "
            "model that they were made from, or hand on the adapter: export hub"
        )
    parts = [config, config.get("text_config") or {}]
    named = next((str(part[key]) for part in parts for key in ("dtype", "torch_dtype") if part.get(key)), "")
    if named in ("bfloat16", "float16", "float32"):
        return cast(Precision, named), "as the base model's files are"
    return "bfloat16", "the base model's files do not say theirs"


def base_config(source: Source) -> Path:
    return (
        Path(source.chosen.source) / "config.json"
        if source.chosen.weights == "random"
        else published_config(source.chosen)
    )


def _write(
    source: Source, folder: Path, dtype: Precision, why: str, more: Callable[[Path, Any], None] | None
) -> dict[str, Any]:
    recipe, run = source.recipe, source.run
    choice = replace(source.trained, quantization="none", dtype=dtype, device=_device(source))
    say(f"merging into {dtype} weights ({why}), on the {'GPU' if choice.device == 'cuda' else 'CPU'} …")
    model = loading.load_trained(recipe, run, source.chosen, choice, source.max_length)
    prompts = [model.renderer.prompt(messages, source.max_length) for messages in sample_prompts(source)]
    adapter = observe(model, prompts)
    with model.network.disable_adapter():
        untrained = observe(model, prompts, adapter.answers)
    if all(bool((a == b).all()) for a, b in zip(adapter.logits, untrained.logits, strict=True)):
        raise UserError(f"{run.adapter}: it changes nothing in {source.base_name}; it belongs to another base model")
    needed = sum(p.numel() * p.element_size() for p in model.network.parameters())
    if (free := shutil.disk_usage(place_beside(folder.parent)).free) < needed:
        raise UserError(
            f"{folder.parent}: {needed / 2**30:.1f} GiB are needed and {free / 2**30:.1f} free; free some space"
        )
    sums = probes(model.network, run.adapter)
    network = fold(model.network)
    model = replace(model, network=network)
    network.generation_config = served_with(model, recipe.sampling)
    network.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", with_older_names(config))
    ours = model.tokenizer.chat_template
    model.tokenizer.chat_template = with_phrase(ours, recipe.stop_phrase)
    model.tokenizer.save_pretrained(folder)
    model.tokenizer.chat_template = ours
    rewrite_tokenizer_config(folder, {"add_bos_token": begins_with_bos(model)})
    add_unread_files(source, folder)
    if recipe.closed:
        Known.of(run).write(folder)
    ends = network.generation_config.eos_token_id
    about: dict[str, Any] = {
        "recipe": recipe.name,
        "base_model": {"name": source.base_name, "size": source.chosen.size, "weights": source.chosen.weights},
        "notice": source.chosen.description.replace(source.chosen.name, source.base_name),
        "adapter_sha256": adapter_digest(source),
        "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "dtype": dtype,
        "dtype_reason": why,
        "max_length": source.max_length,
        "stop_strings": list(recipe.stop),
        "end_tokens": {model.tokenizer.convert_ids_to_tokens(i): i for i in ends},
        "trained_on": source.asked_quantization,
        "trained_in": trained_in(source.run),
    }
    if more:
        more(folder, model)
    for path in folder.iterdir():
        # Weights are written for their owner's eyes alone, and a server runs under another name.
        path.chmod(0o644)
    del model, network
    free_memory()
    again = load_whole(recipe, folder, choice, source.max_length)
    digits = off_by(again.network, sums, dtype)
    about["parity"] = agreement(
        adapter, untrained, observe(again, prompts), observe(again, prompts, adapter.answers), dtype
    )
    del again
    free_memory()
    about["parity"]["half_digits_off"] = digits
    about["parity"]["half_digits_allowed"] = _DIGITS_OFF[dtype]
    refuse_other_answers(source, about["parity"])
    about["on_quantised_base"] = _on_quantised(source, prompts, adapter, untrained, dtype)
    write_json(folder / "export.json", about)
    return about


def merged_before(source: Source) -> Path | None:
    """merged/ of the run, where it was made from the adapter as it is now."""
    found = Exported.at(source.run.path / "merged")
    return found.path if found and found.about.get("adapter_sha256") == adapter_digest(source) else None


def adapter_digest(source: Source) -> str:
    with (source.run.adapter / "adapter_model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_UNREAD = ("tokenizer.model", "preprocessor_config.json", "processor_config.json")


def add_unread_files(source: Source, folder: Path) -> None:
    """Small files of the base model that training on text does not read, and that others do: llama.cpp and Ollama want
    Gemma's tokenizer.model, and vLLM what a model with a vision tower does to pictures."""
    if source.chosen.weights == "random":
        return
    for name in _UNREAD:
        here = Path(source.chosen.source) / name
        if not Path(source.chosen.source).is_dir():
            from huggingface_hub import hf_hub_download

            try:
                here = Path(hf_hub_download(source.chosen.source, name))
            except (OSError, ValueError):
                continue
        if here.is_file():
            shutil.copyfile(here, folder / name)


def _device(source: Source) -> Literal["cuda", "cpu"]:
    """The GPU where the model fits at 16 bits, with room to answer; else the memory of the machine."""
    if source.trained.device == "cpu":
        return "cpu"
    import torch

    config = read_json(base_config(source))
    text = config.get("text_config") or config
    # Generous, and cheap to know before anything is loaded: layers of attention and a gated MLP, and two embeddings.
    width, layers = text["hidden_size"], text["num_hidden_layers"]
    parameters = layers * (4 * width * width + 3 * width * text["intermediate_size"]) + 2 * text["vocab_size"] * width
    return "cuda" if torch.cuda.mem_get_info()[0] > 2.2 * parameters + 2**30 else "cpu"


def free_memory() -> None:
    import torch

    leave_out.let_go()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def sample_prompts(source: Source) -> list[tuple[Message, ...]]:
    """What the run was tested on, where that is still there; else the recipe's own sample."""
    data = source.run.data / "test.jsonl"
    examples = train.examples(source.recipe, source.run, "test") if data.is_file() else []
    return [example.prompt for example in (examples or prepare.sample_examples(source.recipe))[:PROMPTS]]


def fold(network: Any) -> Any:
    """Add every pair of LoRA matrices to its weight, in float32, and round once. PEFT's own merge rounds what is added
    before it adds it."""
    import torch

    folded = 0
    with torch.no_grad():
        for module in network.modules():
            for name in getattr(module, "lora_A", ()):
                weight = module.get_base_layer().weight
                weight.data = (weight.float() + module.get_delta_weight(name).float()).to(weight.dtype)
                folded += 1
    if not folded:
        raise UserError("the adapter has no LoRA matrices: there is nothing to merge")
    return network.unload()


def signs(name: str, width: int) -> Any:
    """Ones and minus ones that nobody can guess, the same for the same name."""
    import torch

    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
    return torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


def probes(network: Any, adapter: Path) -> dict[str, Any]:
    """For every layer that the adapter's file changes: what base weight and LoRA matrices together make of a vector.
    Computed from the file and not from the loaded matrices, so that it is no copy of the merge."""
    from safetensors import safe_open

    config, begin, end = read_json(adapter / "adapter_config.json"), "base_model.model.", ".lora_A.weight"
    if config.get("use_dora") or config.get("use_rslora") or config.get("alpha_pattern") or config.get("rank_pattern"):
        raise UserError(f"{adapter}: no plain LoRA, as the recipes train it; merge it with what it was trained with")
    found = {}
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        for key in [key for key in file.keys() if key.endswith(end)]:  # noqa: SIM118
            name = key.removeprefix(begin).removesuffix(end)
            weight = network.base_model.model.get_submodule(name).get_base_layer().weight.detach()
            a, b = (file.get_tensor(begin + name + f".lora_{part}.weight").double() for part in "AB")
            vector = signs(name, a.shape[1])
            whole = weight.double() @ vector.to(weight.device)
            found[name] = whole.cpu() + config["lora_alpha"] / config["r"] * (b @ (a @ vector))
    return found


def off_by(network: Any, sums: dict[str, Any], dtype: str) -> float:
    """How far the merged weights are from the sums, in halves of their last digit: rounding once makes it about one."""
    worst = 0.0
    for name, expected in sums.items():
        weight = network.get_submodule(name).weight.detach().double()
        made = (weight @ signs(name, weight.shape[1]).to(weight.device)).cpu()
        digit = _HALF_DIGIT[dtype] * float(weight.square().sum(1).mean().sqrt())
        worst = max(worst, float((made - expected).square().mean().sqrt()) / digit)
    return worst


def served_with(model: Any, sampling: Sampling) -> Any:
    """What servers read: every token that ends an answer, and how the recipe draws."""
    from recipes.stages.generation import configuration

    ours, theirs = configuration(model, sampling), model.network.generation_config
    if sampling.temperature > 0:
        theirs.do_sample, theirs.temperature, theirs.top_p, theirs.top_k = True, sampling.temperature, sampling.top_p, 0
    else:
        theirs.do_sample, theirs.temperature, theirs.top_p, theirs.top_k = False, None, None, None
    theirs.eos_token_id, theirs.pad_token_id = ours.eos_token_id, ours.pad_token_id
    theirs.repetition_penalty, theirs.no_repeat_ngram_size = ours.repetition_penalty, ours.no_repeat_ngram_size
    theirs.bos_token_id = model.tokenizer.bos_token_id
    theirs.max_new_tokens = sampling.max_new_tokens
    # Otherwise transformers takes it for a copy of config.json, and makes it anew from there.
    theirs._from_model_config = False
    return theirs


def with_older_names(config: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 writes everything about positions under `rope_parameters`. Ollama and llama.cpp look for the names
    of before, and take a default where they find none: a model that answers, and wrongly."""
    told = dict(config)
    if isinstance(told.get("text_config"), dict):
        told["text_config"] = with_older_names(told["text_config"])
    rope = told.get("rope_parameters") or {}
    whole = rope.get("full_attention", rope)
    if not whole:
        return told
    older: dict[str, Any] = {"rope_theta": whole.get("rope_theta")}
    if told.get("model_type") == "gpt_neox":
        older = {"rotary_emb_base": whole.get("rope_theta"), "rotary_pct": whole.get("partial_rotary_factor")}
    if "sliding_attention" in rope:
        older["rope_local_base_freq"] = rope["sliding_attention"].get("rope_theta")
    if whole.get("rope_type", "default") != "default":
        older["rope_scaling"] = {name: value for name, value in whole.items() if name != "rope_theta"}
    return {**{name: value for name, value in older.items() if value is not None}, **told}


def begins_with_bos(model: Any) -> bool:
    """Prompts begin with the token that begins a text."""
    prompt = model.renderer.prompt((Message("user", "?"),))
    return bool(prompt[0] == model.tokenizer.bos_token_id)


def rewrite_tokenizer_config(folder: Path, more: dict[str, Any]) -> None:
    """In words that transformers 4 knows too, with which many a server runs. Ollama and llama.cpp put the token that
    begins a text before a prompt where `add_bos_token` says so."""
    path = folder / "tokenizer_config.json"
    config = {**read_json(path), **more}
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    for name in ("is_local", "local_files_only", "backend", "name_or_path"):
        config.pop(name, None)
    write_json(path, config)


@dataclass(frozen=True)
class Seen:
    """What a model answers to some prompts, and its logits all along the answers."""

    answers: list[list[int]]
    logits: list[Any]


def observe(model: Any, prompts: Sequence[list[int]], answers: list[list[int]] | None = None) -> Seen:
    """Greedy answers; or logits along answers that are given."""
    import torch

    from recipes.stages.generation import configuration

    how = configuration(model, Sampling(max_new_tokens=ANSWER_TOKENS))
    device, found, logits = model.network.device, [], []
    with torch.inference_mode():
        for number, prompt in enumerate(prompts):
            ids = torch.tensor([prompt], device=device)
            if answers is None:
                made = model.network.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how)
                found.append(made[0, len(prompt) :].tolist())
            answer = found[-1] if answers is None else answers[number]
            whole = torch.tensor([prompt + answer], device=device)
            out = model.network(input_ids=whole, attention_mask=torch.ones_like(whole), use_cache=False).logits
            logits.append(out[0, len(prompt) - 1 : -1].float().cpu())
    return Seen(answers or found, logits)


def agreement(adapter: Seen, untrained: Seen, answered: Seen, along: Seen, dtype: str) -> dict[str, Any]:
    """How far another model is from the adapter, in logits along the adapter's answers and in answers of its own; and
    how far the adapter is from the base model, which is the measure of it."""
    import torch

    one, base, other = (torch.cat(seen.logits) for seen in (adapter, untrained, along))

    def rms(values: Any) -> float:
        return float(values.double().square().mean().sqrt())

    difference, effect = rms(other - one), rms(one - base)
    of_effect, of_spread = _ALLOWED[dtype]
    spread = rms(one - one.mean(1, keepdim=True))
    largest = float((other - one).abs().max())
    same = sum(a == b for a, b in zip(adapter.answers, answered.answers, strict=True))
    ties = sum(
        _tie(logits, a, b, 2 * largest)
        for logits, a, b in zip(adapter.logits, adapter.answers, answered.answers, strict=True)
        if a != b
    )
    return {
        "prompts": len(adapter.answers),
        "positions": len(one),
        "largest_difference": largest,
        "rms_difference": difference,
        "rms_of_what_training_changed": effect,
        "rms_allowed": max(of_effect * effect, of_spread * spread),
        "share": difference / effect if effect else 0.0 if difference == 0 else 1.0,
        "same_likeliest_token": float((other.argmax(1) == one.argmax(1)).double().mean()),
        "same_answers": same,
        "answers_that_part_at_a_tie": ties,
    }


def _tie(logits: Any, one: list[int], other: list[int], margin: float) -> bool:
    """The answers part where the adapter itself hardly prefers its own token."""
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    return at is not None and float(logits[at][one[at]] - logits[at][other[at]]) <= margin


def refuse_other_answers(source: Source, parity: dict[str, Any]) -> None:
    answers = parity["same_answers"] + parity["answers_that_part_at_a_tie"]
    fault = None
    if not parity["half_digits_off"] <= parity["half_digits_allowed"]:
        fault = f"its weights are off by {parity['half_digits_off']:,.1f} halves of a last digit"
    elif not parity["rms_difference"] <= parity["rms_allowed"] or answers < parity["prompts"]:
        fault = (
            f"its logits are off by {parity['rms_difference']:.2g} on average (allowed: {parity['rms_allowed']:.2g}), "
            f"{parity['same_answers']} of {parity['prompts']} answers are the same"
        )
    if fault:
        raise UserError(
            f"{source.run.path}: the merged model is not the adapter on its base model: {fault}; nothing was kept. "
            "Hand on the adapter instead (export hub), and report this line"
        )


def _on_quantised(
    source: Source, prompts: list[list[int]], adapter: Seen, untrained: Seen, dtype: Precision
) -> dict[str, Any] | None:
    """The adapter where it was trained, on quantised weights, beside the same adapter on whole ones. They differ, by
    what the quantisation took away and training made up for: no fault of the merge, and worth knowing."""
    if source.asked_quantization == "none":
        return None
    if source.trained.quantization == "none":
        return {"not_measured": source.trained.reasons["quantization"]}
    quantised = source.trained
    if quantised.device == "cpu":
        # As the merge was computed, or two roundings would be told as one quantisation.
        quantised = replace(quantised, dtype=dtype)
    model = loading.load_trained(source.recipe, source.run, source.chosen, quantised, source.max_length)
    found = agreement(adapter, untrained, observe(model, prompts), observe(model, prompts, adapter.answers), "float32")
    del model
    free_memory()
    wanted = ("rms_difference", "largest_difference", "share", "same_likeliest_token", "same_answers", "prompts")
    told = {name: found[name] for name in wanted}
    return {"quantization": quantised.quantization, "dtype": quantised.dtype, **told}


def tell(about: dict[str, Any], place: Path) -> None:
    parity = about["parity"]
    say(
        f"merged model against adapter, {parity['prompts']} prompts, {parity['positions']} answer tokens: logits "
        f"differ by {parity['largest_difference']:.2g} at most and {parity['rms_difference']:.2g} on average, "
        f"{parity['share']:.2%} of what training changed; {parity['same_answers']} of {parity['prompts']} answers are "
        "the same"
        + f", {parity['answers_that_part_at_a_tie']} part at a tie"
        * bool(parity["answers_that_part_at_a_tie"])
    )
    if quantised := about.get("on_quantised_base"):
        if reason := quantised.get("not_measured"):
            say(f"the adapter on its {about['trained_on']} base was not looked at: {reason}")
        else:
            say(
                f"the adapter on the {quantised['quantization']} base that it was trained on differs from this by "
                f"{quantised['rms_difference']:.2g} on average, {quantised['share']:.1%} of what training changed; "
                f"{quantised['same_answers']} of {quantised['prompts']} answers are the same"
            )
    size = sum(path.stat().st_size for path in place.parent.glob(f".{place.name}.making/*.safetensors"))
    say(f"{size / 2**20:,.1f} MiB of weights, tokenizer, chat template and export.json -> {place}")
    if "NOT" in about["notice"]:
        say(about["notice"])
