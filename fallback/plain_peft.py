"""Rung 2 and floor: transformers and PEFT as they are, on anything torch runs on."""

import os
from typing import Any

from fallback import leave_out
from fallback.choose import Choice


def import_libraries(choice: Choice) -> None:
    if not choice.triton:
        leave_out.a_broken_triton()
    leave_out.the_compiler()
    with leave_out.without(*leave_out.BY_TRANSFORMERS):
        import trl  # noqa: F401  (loads transformers and peft; nothing patches them)
        from transformers import AutoModelForCausalLM  # noqa: F401

    if not choice.triton:
        from fallback import portable_loss

        portable_loss.install()


def load(source: str, choice: Choice, max_length: int) -> Any:
    """The frozen base model."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=getattr(torch, choice.dtype),
        attn_implementation=choice.attention,
        quantization_config=_quantization(choice),
        device_map=_place(choice),
        use_safetensors=True,
        trust_remote_code=False,
    )
    keep_layout(model)
    return model


def _quantization(choice: Choice) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if choice.quantization == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, choice.dtype),
            **_divisible(choice),
        )
    return BitsAndBytesConfig(load_in_8bit=True) if choice.quantization == "8bit" else None


def _place(choice: Choice) -> Any:
    """A launcher of several processes gives each a card of its own. FSDP takes its part from the host's memory, layer
    by layer, where weights are plain numbers; 4-bit ones are made on the card."""
    if choice.device == "cpu" or (_divided() and choice.quantization == "none"):
        return "cpu"
    return {"": int(os.environ.get("LOCAL_RANK", 0))}


def _divided() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def _divisible(choice: Choice) -> dict[str, Any]:
    """FSDP divides what looks like numbers: packed weights that call themselves bytes would stay whole in every
    process."""
    return {"bnb_4bit_quant_storage": choice.dtype} if _divided() else {}


def keep_layout(model: Any) -> None:
    """bitsandbytes 0.50 repacks 4-bit weights for its AVX512 kernel at the first forward without gradients, and
    the backward pass over repacked weights is wrong: one evaluation would quietly stop the learning."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def add_lora(model: Any, lora: dict[str, Any], checkpointing: bool, max_length: int, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", bias="none", **lora))


def load_adapter(model: Any, folder: str) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder)


def for_inference(model: Any) -> Any:
    model.eval()
    model.config.use_cache = True
    return model
