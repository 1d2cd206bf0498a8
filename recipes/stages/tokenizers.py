"""Tokenizers for models with random weights: small ones, of the right family, trained on a recipe's sample.

They keep the family's control tokens, at their true ids wherever the vocabulary is large enough, and the
family's real chat template; everything between is learned from the sample.
"""

import importlib.util
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Family:
    """What every tokenizer of an architecture family has."""

    control: dict[int, str]
    """Control tokens at their true ids."""
    roles: dict[str, str]
    """What transformers calls them."""
    ends: tuple[str, ...]
    """Tokens after which an answer is over."""


def _gemma(start_of_turn: int) -> Family:
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    turns = {start_of_turn: "<start_of_turn>", start_of_turn + 1: "<end_of_turn>"}
    return Family(
        control=dict(enumerate(names)) | turns,
        roles={"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"},
        ends=("<eos>", "<end_of_turn>"),
    )


FAMILIES = {
    "gemma3_text": _gemma(105),
    "gemma2": _gemma(106),
    "llama": Family(
        control={
            128000: "<|begin_of_text|>",
            128001: "<|end_of_text|>",
            128004: "<|finetune_right_pad_id|>",
            128006: "<|start_header_id|>",
            128007: "<|end_header_id|>",
            128008: "<|eom_id|>",
            128009: "<|eot_id|>",
            128010: "<|python_tag|>",
        },
        roles={
            "pad_token": "<|finetune_right_pad_id|>",
            "eos_token": "<|end_of_text|>",
            "bos_token": "<|begin_of_text|>",
        },
        ends=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    ),
    "gpt_neox": Family(
        control={0: "<|unused0|>", 1: "<|unused1|>", 2: "<|endoftext|>", 3: "<|sep|>"},
        roles={"pad_token": "<|unused1|>", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"},
        ends=("<|endoftext|>",),
    ),
}


def official_template(name: str) -> str:
    """A model's own chat template, from TRL's collection; found without importing TRL."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    folders = spec.submodule_search_locations
    assert folders
    return (Path(folders[0]) / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def make_tokenizer(model_type: str, texts: Iterable[str], learned: int, total: int | None, template: str | None) -> Any:
    """A byte-pair tokenizer with `learned` tokens, filled up to `total` where that is given."""
    from tokenizers import AddedToken, Tokenizer, trainers
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[model_type]
    tokenizer, alphabet, byte_tokens = _pieces(model_type)
    # Low control ids come before the learned tokens, high ones (Llama) behind them.
    behind = min(family.control) >= learned
    head = [] if behind else [family.control.get(i, f"<unused{i}>") for i in range(max(family.control) + 1)]
    trainer = trainers.BpeTrainer(
        vocab_size=learned, special_tokens=head + byte_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    state = json.loads(tokenizer.to_str())
    names = {i: name for name, i in state["model"]["vocab"].items()}
    if behind:
        shift = 0 if total else len(names) - min(family.control)
        names |= {i + shift: token for i, token in family.control.items()}
    state["model"]["vocab"] = {names.get(i, f"<unlearned{i}>"): i for i in range(total or max(names) + 1)}
    # The trainer marks head and byte tokens as special, and then bytes would not decode.
    state["added_tokens"] = []
    plain = Tokenizer.from_str(json.dumps(state))
    plain.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.control.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        chat_template=official_template(template) if template else None,
        extra_special_tokens=[token for token in family.control.values() if token not in family.roles.values()],
        clean_up_tokenization_spaces=False,
        **family.roles,
    )


def _pieces(model_type: str) -> tuple[Any, list[str], list[str]]:
    """An untrained tokenizer of the family, its alphabet, and its byte tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if model_type.startswith("gemma"):
        # SentencePiece's ways: spaces become part of tokens, digits stand alone, unknown characters become bytes.
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("\\d|\\n+|▁*[^▁\\d\\n]+|▁+"), "isolated")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        return tokenizer, [], [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    if model_type == "gpt_neox":
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    return tokenizer, pre_tokenizers.ByteLevel.alphabet(), []
