"""The page that a model is met with: everything on it was read from the run."""

from pathlib import Path
from typing import Any

from recipes.stages.export import Source
from recipes.stages.run import read_json

# What somebody wants to know who has only the model: not every setting, all of them are in the run.
_SETTINGS = (
    "epochs", "max_steps", "learning_rate", "scheduler", "batch_size", "accumulation", "max_length", "quantization",
    "lora_rank", "lora_alpha", "lora_dropout", "neftune_alpha", "seed",
)  # fmt: skip
_LIBRARIES = ("torch", "transformers", "trl", "peft", "unsloth", "bitsandbytes")
_FLAT_SCORES = 12


def card(source: Source, repo: str, about: dict[str, Any] | None) -> str:
    """`about` is the export.json of merged weights; None for an adapter."""
    recipe, run = source.recipe, source.run
    config, data = read_json(run.config), _of(run.data / "metadata.json")
    random = source.chosen.weights == "random"
    parts = [_head(source, about), f"# {recipe.title}"]
    if random:
        parts.append(
            f"> **This is not the real model.** It has random weights in the architecture of "
            f"{recipe.base.hub_id}, size {source.chosen.size}, and was made to try the tools out. "
            "Its answers mean nothing."
        )
    what = "Merged weights" if about else "A LoRA adapter"
    base = source.base_name
    linked = f"[{base}](https://huggingface.co/{base})" if base == recipe.base.hub_id or "/" in base else base
    parts.append(f"{what}, trained by the recipe `{recipe.name}`. Base model: {linked}{_licence(source)}.")
    parts += ["## How to use it", _usage(source, repo, about)]
    if data:
        parts += ["## Data", _data(data)]
    parts += ["## Training", _table(_settings(config))]
    if scores := _scores(source):
        parts += ["## Measured", _table(scores)]
    if about:
        parity = about["parity"]
        parts.append(
            f"Merged in {about['dtype']}. On {parity['prompts']} prompts the logits differ from the adapter's by "
            f"{parity['rms_difference']:.2g} on average, {parity['share']:.2%} of what training changed; "
            f"{parity['same_answers']} greedy answers of {parity['prompts']} are the same."
        )
    parts += ["## Made on", _table(_machine(source))]
    if recipe.notice:
        parts.append(f"{recipe.notice}")
    return "\n\n".join(parts) + "\n"


def _of(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _head(source: Source, about: dict[str, Any] | None) -> str:
    """What the hub reads."""
    base = source.recipe.base
    lines = ["---", f"library_name: {'transformers' if about else 'peft'}", "pipeline_tag: text-generation"]
    if source.chosen.weights == "random":
        tags = ["random-weights", "not-for-use"]
    else:
        tags = [*([] if about else ["lora"]), "text-generation"]
        if "/" in source.base_name:
            lines += [f"base_model: {source.base_name}", f"base_model_relation: {'finetune' if about else 'adapter'}"]
        if source.base_name == base.hub_id and base.licence:
            lines.append(f"license: {base.licence}")
    return "\n".join([*lines, f"tags: [{', '.join(tags)}]", "---"])


def _licence(source: Source) -> str:
    base = source.recipe.base
    if source.base_name != base.hub_id:
        return "; its licence is on its own page"
    told = f", under [{base.licence}]({base.terms})"
    if base.licence == "gemma":
        told += ". Gemma is provided under and subject to the Gemma Terms of Use found at " + base.terms
    if base.licence.startswith("llama"):
        told += ". Built with Llama"
    return told


def _usage(source: Source, repo: str, about: dict[str, Any] | None) -> str:
    recipe = source.recipe
    stops = list(recipe.stop)
    asked = [{"role": message.role, "content": message.content} for message in recipe.ask("…")]
    said = "\n".join(f"- {message['role']}: `{message['content']}`".replace("\n", " ⏎ ") for message in asked)
    rank = read_json(source.run.config)["settings"]["lora_rank"]
    lora = f"--enable-lora --max-lora-rank {max(8, rank)} --lora-modules mine={repo}"
    vllm = f"vllm serve {repo}" if about else f"vllm serve {source.base_name} {lora}"
    parts = [f"Ask as it was trained to be asked, `…` being the question:\n\n{said}"]
    if stops:
        parts.append(
            f'Every answer ends with `{stops[0]}`; give it to the server as a stop string: `"stop": ["{stops[0]}"]`.'
        )
    if recipe.closed:
        parts.append(
            "Its answers are a closed set of codes (`classes.json`), which are best scored and not generated: "
            f'`Classifier(RECIPE, "folder")` of the recipe `{recipe.name}` gives every code its probability'
            + ("." if about else "; it wants the run, or merged weights.")
        )
    if not about:
        parts.append(
            "```python\nfrom peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
            f'model = AutoPeftModelForCausalLM.from_pretrained("{repo}", device_map="auto")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{repo}")\n```'
        )
    parts.append(f"With vLLM (not run by us): `{vllm}`")
    return "\n\n".join(parts)


def _data(data: dict[str, Any]) -> str:
    origin = (
        "the recipe's own sample, which was written or generated for it"
        if data.get("sample")
        else "a file of its author"
    )
    splits = ", ".join(f"{name} {part['rows']:,}" for name, part in data.get("splits", {}).items())
    dropped = sum(part.get("rows", 0) for part in data.get("dropped", {}).values())
    told = f"{data.get('rows', 0):,} rows from {origin}: {splits}."
    return told + (f" {dropped:,} rows could not be used." if dropped else "")


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    settings = config["settings"]
    return {name: settings[name] for name in _SETTINGS if settings.get(name) not in (None, 0, 0.0)}


def _scores(source: Source) -> dict[str, Any]:
    found = _of(source.run.metrics)
    trained, tested = found.get("train", {}), found.get("test", {})
    names = ("optimizer_steps", "trainable_parameters", "first_loss", "final_loss", "train_seconds")
    scores = {name.replace("_", " "): trained[name] for name in names if trained.get(name) is not None}
    numbers = {name: value for name, value in tested.items() if isinstance(value, int | float)}
    return {**scores, **{f"test: {name.replace('_', ' ')}": numbers[name] for name in list(numbers)[:_FLAT_SCORES]}}


def _machine(source: Source) -> dict[str, Any]:
    found, choice = _of(source.run.path / "environment.json"), _of(source.run.path / "choice.json")
    gpu, memory = found.get("gpu"), found.get("memory_bytes", 0) / 2**30
    card = f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB" if gpu else "none"
    versions = found.get("versions", {})
    return {
        "GPU": card,
        "processor": f"{found.get('processor')}, {found.get('cores')} cores, {memory:.0f} GiB",
        "computed with": f"{choice.get('backend')}, {choice.get('dtype')}",
        "libraries": ", ".join(f"{name} {versions[name]}" for name in _LIBRARIES if versions.get(name)),
    }


def _table(lines: dict[str, Any]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4g}"
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value).replace("|", "/")

    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {cell(value)} |" for name, value in lines.items())])
