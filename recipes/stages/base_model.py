"""Which weights a run starts from: the published ones, or random ones of the same architecture.

recipes/architectures holds the public configuration of every base model, so the architecture can be built
without a download: at full size, or shrunk (tiny: seconds on a CPU; small: about 30 million parameters).
Such a model gets a tokenizer trained on the recipe's sample that keeps the family's control tokens, at their
true ids where the vocabulary has room for them, and the family's real chat template.
"""

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fallback.gpu import read_gpu
from recipes.stages.prepare import sample_texts
from recipes.stages.recipe import Recipe, UserError
from recipes.stages.run import write_whole

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
    def description(self) -> str:
        if self.weights == "pretrained":
            return f"{self.name}, its published weights"
        shape = "at full size" if self.size == "full" else f"shrunk to size {self.size}"
        return f"NOT {self.name} itself but its architecture {shape} with random weights: only for trying things out"


def architecture(recipe: Recipe) -> dict[str, Any]:
    return json.loads((ARCHITECTURES / f"{recipe.base.architecture}.json").read_text(encoding="utf-8"))


def shrink(config: dict[str, Any], size: Size, vocabulary: int) -> dict[str, Any]:
    """The same architecture family with fewer and narrower layers: patterns, ratios and options stay."""
    if size == "full":
        return config
    heads, head_dim = (4, 32) if size == "tiny" else (8, 64)
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
    # Attention kinds alternate with a period; a model shorter than one period would lose a kind.
    kinds = config.get("layer_types") or []
    period = kinds.index("full_attention") + 1 if kinds else 1
    per_layer = 3 * hidden * small["intermediate_size"] + 3 * hidden * hidden
    wanted = 4 if size == "tiny" else (30_000_000 - vocabulary * hidden) // per_layer
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
    """full where a CUDA GPU and the weights are at hand, else tiny."""
    if read_gpu() is None:
        return "tiny"
    if weights == "random" or (Path(name) / "config.json").is_file():
        return "full"
    from huggingface_hub import try_to_load_from_cache

    return "full" if isinstance(try_to_load_from_cache(name, "config.json"), str) else "tiny"


def model_type(recipe: Recipe, chosen: Chosen) -> str:
    """The architecture family, as transformers names it."""
    if chosen.name == recipe.base.hub_id:
        return architecture(recipe)["model_type"]
    config = Path(chosen.source) / "config.json"
    if not config.is_file():
        from huggingface_hub import hf_hub_download

        try:
            config = Path(hf_hub_download(chosen.source, "config.json"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"--model {chosen.source}: neither a folder with a config.json nor a model that can be fetched "
                f"({str(error).splitlines()[0]})"
            ) from error
    return json.loads(config.read_text(encoding="utf-8"))["model_type"]


def _folder(recipe: Recipe, size: Size) -> Path:
    """Where a random model is kept: the name changes with everything it is made of, this file included."""
    made_of = [size, architecture(recipe), recipe.base.chat_template, sample_texts(recipe)]
    key = Path(__file__).read_text(encoding="utf-8") + json.dumps(made_of, sort_keys=True)
    return CACHE / f"{recipe.base.architecture}-{size}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def ensure_files(recipe: Recipe, chosen: Chosen) -> None:
    """Make a random model's config, tokenizer and weights unless they are there. Call it after the backend has
    imported its libraries: this imports transformers, which Unsloth must precede."""
    folder = Path(chosen.source)
    if chosen.weights == "pretrained" or (folder / "config.json").is_file():
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    beside = Path(f"{folder}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    config = architecture(recipe)
    tokenizer = make_tokenizer(config, chosen.size, sample_texts(recipe), recipe.base.chat_template)
    config = shrink(config, chosen.size, len(tokenizer))
    ends = [tokenizer.convert_tokens_to_ids(token) for token in _ENDS[config["model_type"]]]
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


# Control tokens by family, each list in order; an int is the id of the token that follows it.
_CONTROL: dict[str, list[int | str]] = {
    "gemma3_text": [0, "<pad>", "<eos>", "<bos>", "<unk>", "<mask>", 105, "<start_of_turn>", "<end_of_turn>"],
    "gemma2": [0, "<pad>", "<eos>", "<bos>", "<unk>", "<mask>", 106, "<start_of_turn>", "<end_of_turn>"],
    "llama": [
        128000,
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>",
        "<|reserved_special_token_2|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
    ],
    "gpt_neox": [0, "<|unused0|>", "<|unused1|>", "<|endoftext|>", "<|sep|>"],
}
_ROLES: dict[str, dict[str, str]] = {
    "gemma3_text": {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"},
    "gemma2": {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"},
    "llama": {
        "pad_token": "<|finetune_right_pad_id|>",
        "eos_token": "<|end_of_text|>",
        "bos_token": "<|begin_of_text|>",
    },
    "gpt_neox": {"pad_token": "<|unused1|>", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"},
}
_ENDS: dict[str, tuple[str, ...]] = {
    "gemma3_text": ("<eos>", "<end_of_turn>"),
    "gemma2": ("<eos>", "<end_of_turn>"),
    "llama": ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    "gpt_neox": ("<|endoftext|>",),
}


def official_template(name: str) -> str:
    """A model's own chat template, from TRL's collection; found without importing TRL."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.submodule_search_locations
    return (Path(spec.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def make_tokenizer(config: dict[str, Any], size: Size, texts: Iterable[str], template: str | None) -> Any:
    """A byte-pair tokenizer of the model's family, trained on the sample."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    family = config["model_type"]
    learned = 2048 if size == "tiny" else 8192
    control: dict[int, str] = {}
    place = 0
    for entry in _CONTROL[family]:
        if isinstance(entry, int):
            place = entry
        else:
            control[place] = entry
            place += 1
    gemma = family.startswith("gemma")
    if gemma:
        # SentencePiece's ways: spaces become part of tokens, digits stand alone, unknown characters become bytes.
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("\\d|\\n+|▁*[^▁\\d\\n]+|▁+"), "isolated")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet: list[str] = []
    else:
        tokenizer = Tokenizer(models.BPE())
        if family == "gpt_neox":
            tokenizer.normalizer = normalizers.NFC()
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        else:
            words = (
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            )
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(words), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    # Control tokens with low ids come first, as in the families' own vocabularies; gaps are filled.
    low = [control.get(i, f"<unused{i}>") for i in range(max(control) + 1)] if max(control) < 1000 else []
    if gemma:
        low += [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=learned, special_tokens=low, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    # The trainer marks byte tokens as special, and then they would not decode.
    names = set(control.values())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in names]
    if low:
        total = config["vocab_size"] if size == "full" else len(vocabulary)
        fill = total
    else:
        # Llama's control tokens follow the text vocabulary: at their true ids at full size, else right behind it.
        first = min(control) if size == "full" else len(vocabulary)
        shift = first - min(control)
        fill = first
        total = config["vocab_size"] if size == "full" else max(control) + shift + 1
    for i in range(len(vocabulary), fill):
        vocabulary[f"<unlearned{i}>"] = i
    if not low:
        state["added_tokens"] = [
            dict(
                id=i + shift,
                content=token,
                single_word=False,
                lstrip=False,
                rstrip=False,
                normalized=False,
                special=True,
            )
            for i, token in sorted(control.items())
        ]
        for i in range(max(control) + shift + 1, total):
            vocabulary[f"<unlearned{i}>"] = i
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        chat_template=official_template(template) if template else None,
        extra_special_tokens=[token for token in names if token not in _ROLES[family].values()],
        clean_up_tokenization_spaces=False,
        **_ROLES[family],
    )


def load_tokenizer(recipe: Recipe, source: str) -> Any:
    """The base model's tokenizer, with a template to render by and a padding token that is not the end token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
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
