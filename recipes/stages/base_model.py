"""Which weights a run starts from: the published ones, or random ones of the same architecture.

recipes/architectures holds the public configuration of every base model, so the architecture can be built
without a download: at full size, or shrunk (tiny: seconds on a CPU; small: about 30 million parameters).
Such a model gets a tokenizer trained on the recipe's sample that keeps the family's control tokens, at their
true ids where the vocabulary has room for them, and the family's real chat template.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from fallback import leave_out
from fallback.torch_build import usable_gpu
from recipes.stages import tokenizers
from recipes.stages.prepare import sample_texts
from recipes.stages.recipe import Recipe, UserError
from recipes.stages.run import read_json, write_whole
from recipes.stages.tokenizers import FAMILIES, make_tokenizer

Size = Literal["tiny", "small", "full"]
Weights = Literal["pretrained", "random"]

ARCHITECTURES = Path(__file__).parents[1] / "architectures"
CACHE = Path(__file__).parents[2] / ".cache" / "models"


@dataclass(frozen=True)
class Chosen:
    """A base model, settled: what it is and where its files are."""

    name: str
    size: Size
    weights: Weights
    source: str
    """Folder or hub id that from_pretrained can load."""

    @property
    def large(self) -> bool:
        """More than small products with much beside them: a processor's fastest products tell."""
        return self.size != "tiny"

    @property
    def description(self) -> str:
        if self.weights == "pretrained":
            return f"{self.name}, its published weights"
        shape = "at full size" if self.size == "full" else f"shrunk to size {self.size}"
        return f"NOT {self.name} itself but its architecture {shape} with random weights: only for trying things out"

    def stored(self) -> dict[str, Any]:
        """For the files of a run. A random model goes by its folder's name: it lies in the cache of whoever reads it,
        and where that is concerns nobody else."""
        return {**asdict(self), "source": Path(self.source).name if self.weights == "random" else self.source}

    @classmethod
    def opened(cls, config: Path) -> "Chosen":
        """As a run's training_config.json says, which may come from anybody."""
        try:
            stored = read_json(config)["base_model"]
            chosen = cls(**{name: str(value) for name, value in stored.items()})  # type: ignore[arg-type]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{config}: names no base model ({error!r}); train the run again") from None
        if chosen.size not in get_args(Size) or chosen.weights not in get_args(Weights):
            raise UserError(f"{config}: no base model is of size {chosen.size!r} with weights {chosen.weights!r}")
        if chosen.weights == "pretrained":
            return chosen
        folder = Path(chosen.source).name
        if not re.fullmatch(r"\w[\w.-]*", folder):
            raise UserError(f"{config}: {chosen.source[:60]!r} is no random model's folder")
        return replace(chosen, source=str(CACHE / folder))


def architecture(recipe: Recipe) -> dict[str, Any]:
    return json.loads((ARCHITECTURES / f"{recipe.base.architecture}.json").read_text(encoding="utf-8"))


def shrink(config: dict[str, Any], size: Size, vocabulary: int) -> dict[str, Any]:
    """The same architecture family with fewer and narrower layers: patterns, ratios and options stay."""
    if size == "full":
        return config
    heads, head_dim = (8, 32) if size == "tiny" else (8, 64)
    hidden = heads * head_dim
    small = dict(
        config,
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * config["intermediate_size"] // config["hidden_size"] // 64 * 64,
        num_attention_heads=heads,
        max_position_embeddings=min(config["max_position_embeddings"], 8192),
        # With the published 0.02 a narrow random head could never be sure of anything: its logits stay within 3.
        initializer_range=hidden**-0.5,
    )
    if "num_key_value_heads" in config:
        small["num_key_value_heads"] = max(1, heads * config["num_key_value_heads"] // config["num_attention_heads"])
    if "head_dim" in config:
        small["head_dim"] = head_dim
    if "query_pre_attn_scalar" in config:
        small["query_pre_attn_scalar"] = head_dim
    if config.get("sliding_window"):
        # Shorter than most examples, so that the window is really at work.
        small["sliding_window"] = 64
    # Attention kinds alternate with a period (five sliding layers and a full one in Gemma 3): small keeps it whole,
    # tiny keeps its end, so that both kinds are there.
    kinds = config.get("layer_types") or []
    period = kinds.index("full_attention") + 1 if kinds else 1
    per_layer = 3 * hidden * small["intermediate_size"] + 3 * hidden * hidden
    if size == "tiny":
        small["num_hidden_layers"] = 2
        small["intermediate_size"] = 2 * hidden
        kinds = kinds[max(0, period - 2) :]
    else:
        wanted = (30_000_000 - vocabulary * hidden) // per_layer
        small["num_hidden_layers"] = max(1, round(wanted / period)) * period
    if kinds:
        small["layer_types"] = kinds[: small["num_hidden_layers"]]
    return small


def settle(
    recipe: Recipe,
    size: Literal["tiny", "small", "full", "auto"] = "auto",
    weights: Weights | None = None,
    model: str | None = None,
) -> Chosen:
    """Decide on a base model. Loads nothing and writes nothing: see ensure_files."""
    name = model or recipe.base.hub_id
    if size == "auto":
        size = auto_size(name, weights)
    if weights is None:
        weights = "pretrained" if size == "full" else "random"
    if size != "full" and weights == "pretrained":
        raise UserError(f"there are no published weights at size {size}; use --size full or --weights random")
    if model is not None and (size != "full" or weights == "random"):
        raise UserError(f"--model {model} comes with its own size and weights; use it with --size full alone")
    return Chosen(name, size, weights, name if weights == "pretrained" else str(_folder(recipe, size)))


def auto_size(name: str, weights: str | None) -> Size:
    """full where a CUDA GPU that torch can use and the weights are at hand, else tiny."""
    if usable_gpu() is None:
        return "tiny"
    if weights == "random" or (Path(name) / "config.json").is_file():
        return "full"
    from huggingface_hub import try_to_load_from_cache

    return "full" if isinstance(try_to_load_from_cache(name, "config.json"), str) else "tiny"


def model_type(recipe: Recipe, chosen: Chosen) -> str:
    """The architecture family, as transformers names it."""
    if chosen.name == recipe.base.hub_id:
        return architecture(recipe)["model_type"]
    config = published_config(chosen)
    try:
        return str(read_json(config)["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{config}: not a model's configuration ({error!r}); --model wants a whole model") from None


def published_config(chosen: Chosen) -> Path:
    """The config.json of published weights: the smallest thing that shows whether they can be had."""
    config = Path(chosen.source) / "config.json"
    if config.is_file():
        refuse_pickles(config.parent, "pytorch_model", "model")
        return config
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(chosen.source, "config.json"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{chosen.source} is neither a folder with a config.json nor a model that can be fetched from the hub "
            f"({' '.join(str(error).split())[:160]}); accept its licence there and run hf auth login, name a folder "
            "with --model, or try the architecture without its weights: --weights random, or --size tiny"
        ) from error


# Loads tensors and nothing else out of pickles, in a process that ends with it.
_CONVERT = (
    "import pathlib, sys, torch; from safetensors.torch import save_file; d, old, new = sys.argv[1:]; "
    'save_file({k: v.contiguous().clone() for f in sorted(pathlib.Path(d).glob(old + "*.bin")) '
    'for k, v in torch.load(f, map_location="cpu", weights_only=True).items()}, '
    'pathlib.Path(d) / (new + ".safetensors"), {"format": "pt"})'
)


def refuse_pickles(folder: Path, pickled: str, wanted: str) -> None:
    """A pickle can run whatever its writer wanted; weights are read from safetensors alone."""
    pickles = sorted(folder.glob(f"{pickled}*.bin"))
    if pickles and not any(folder.glob(f"{wanted}*.safetensors")):
        command = shlex.join(["python", "-c", _CONVERT, str(folder), pickled, wanted])
        raise UserError(f"{pickles[0]}: weights in a pickle are not loaded; convert them: {command}")


def _folder(recipe: Recipe, size: Size) -> Path:
    """Where a random model is kept: the name changes with everything it is made of, our code included."""
    made_of = [size, architecture(recipe), recipe.base.chat_template, sample_texts(recipe)]
    code = [Path(file).read_text(encoding="utf-8") for file in (__file__, tokenizers.__file__)]
    key = json.dumps([made_of, code], sort_keys=True)
    return CACHE / f"{recipe.base.architecture}-{size}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def ensure_files(recipe: Recipe, chosen: Chosen) -> None:
    """Make a random model's config, tokenizer and weights unless they are there. Call it after the backend has
    imported its libraries: this imports transformers, which Unsloth must precede."""
    folder = Path(chosen.source)
    if chosen.weights == "pretrained":
        published_config(chosen)
        return
    if (folder / "config.json").is_file():
        return
    # What is made here replaces a folder; the name may have come with somebody else's run.
    if folder.resolve().parent != CACHE.resolve():
        raise UserError(f"{folder}: no model is there, and random ones are made in {CACHE} alone; train the run again")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    beside = Path(f"{folder}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    config = architecture(recipe)
    family = config["model_type"]
    tokenizer = make_tokenizer(
        family,
        sample_texts(recipe),
        learned=2048 if chosen.size == "tiny" else 8192,
        total=config["vocab_size"] if chosen.size == "full" else None,
        template=recipe.base.chat_template,
    )
    config = shrink(config, chosen.size, len(tokenizer))
    if chosen.size != "full" and not recipe.closed:
        # A random head tied to the embeddings makes every token's likeliest successor itself. Of a few codes a short
        # training unlearns that, of free text it does not: answers went on repeating one syllable for ever.
        config["tie_word_embeddings"] = False
    ends = [tokenizer.convert_tokens_to_ids(token) for token in FAMILIES[family].ends]
    config.update(
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
    )
    full = chosen.size == "full"
    with torch.random.fork_rng(), torch.device("cuda" if full and torch.cuda.is_available() else "cpu"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config), dtype=torch.bfloat16 if full else torch.float32
        )
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    notice = f"Random weights in the architecture of {recipe.base.hub_id}, size {chosen.size}. Not the published model."
    write_whole(beside / "README.md", notice + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    beside.replace(folder)


def tokenizer_file(chosen: Chosen) -> Path | None:
    """The base model's tokenizer.json, if it is on this machine already."""
    here = Path(chosen.source) / "tokenizer.json"
    if here.is_file():
        return here
    if chosen.weights == "random" or Path(chosen.source).is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(chosen.source, "tokenizer.json")
    return Path(cached) if isinstance(cached, str) else None


def load_tokenizer(recipe: Recipe, source: str) -> Any:
    """The base model's tokenizer, with a template to render by and a padding token that is not the end token."""
    with leave_out.without(*leave_out.BY_TRANSFORMERS):
        from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: its tokenizer cannot be loaded ({' '.join(str(error).split())[:300]})") from error
    if tokenizer.chat_template is None:
        if recipe.plain_template is None:
            raise UserError(f"{source} has no chat template and recipe {recipe.name} names no plain one")
        tokenizer.chat_template = recipe.plain_template
    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = _spare_token(tokenizer)
    tokenizer.padding_side = "right"
    return tokenizer


def _spare_token(tokenizer: Any) -> str:
    """A control token that no text contains. Padding with the end token would hide the end token from the loss in
    every toolkit that masks padding by its id, and such models never stop."""
    taken = {tokenizer.bos_token, tokenizer.eos_token}
    control = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    used_by_template = tokenizer.chat_template
    spare = [token for token in control if token not in taken and token not in used_by_template]
    spare.sort(key=lambda token: ("pad" not in token, "unused" not in token and "reserved" not in token))
    if spare:
        return spare[0]
    if tokenizer.unk_token and tokenizer.unk_token not in taken:
        return tokenizer.unk_token
    raise UserError(f"{tokenizer.name_or_path}: no token is free to pad with; add one to its tokenizer")
