"""Rung 1: Unsloth, which replaces parts of transformers, trl and peft when it is imported, so before they are."""

import sys
from typing import Any

from fallback import leave_out
from fallback.choose import Choice


def import_libraries(choice: Choice) -> None:
    early = sorted({"transformers", "trl", "peft"} & set(sys.modules))
    if early and "unsloth" not in sys.modules:
        raise RuntimeError(f"{', '.join(early)} were imported before unsloth, which would leave them unpatched")
    with leave_out.without("sklearn"):
        import unsloth  # noqa: F401, I001
        import trl  # noqa: F401


def load(source: str, choice: Choice, max_length: int) -> Any:
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        model_name=source,
        max_seq_length=max_length,
        dtype=getattr(torch, choice.dtype),
        load_in_4bit=choice.quantization == "4bit",
        load_in_8bit=choice.quantization == "8bit",
        load_in_16bit=choice.quantization == "none",
        attn_implementation=choice.attention,
        # Otherwise a hub id is replaced by a copy of Unsloth's own, quantised beforehand: another model.
        use_exact_model_name=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    return model


def add_lora(model: Any, lora: dict[str, Any], checkpointing: bool, max_length: int, seed: int) -> Any:
    from unsloth import FastLanguageModel

    return FastLanguageModel.get_peft_model(
        model,
        bias="none",
        use_gradient_checkpointing="unsloth" if checkpointing else False,
        max_seq_length=max_length,
        random_state=seed,
        **lora,
    )


def load_adapter(model: Any, folder: str) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder)


def for_inference(model: Any) -> Any:
    from unsloth import FastLanguageModel

    FastLanguageModel.for_inference(model)
    return model
