"""Rung 2: plain PEFT, with Liger's Triton kernels for the norms, the rotary embedding and the MLP.

The loss stays our own fused head, as under every backend: Liger's would replace the model's forward, and could give
no probability of an answer. Liger also replaces the classes in the model's module, so a process that loaded a model
with it is no place for another without.
"""

from typing import Any

from fallback import plain_peft
from fallback.choose import Choice
from fallback.plain_peft import add_lora, for_inference, import_libraries, load_adapter

__all__ = ["add_lora", "for_inference", "import_libraries", "load", "load_adapter", "patch"]


def load(source: str, choice: Choice, max_length: int) -> Any:
    model = plain_peft.load(source, choice, max_length)
    patch(model)
    return model


def patch(model: Any) -> None:
    """The language model alone: what a vision tower sees is never trained on here."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    language = model.base_model
    language = getattr(language, "language_model", language)
    MODEL_TYPE_TO_APPLY_LIGER_FN[language.config.model_type](
        cross_entropy=False, fused_linear_cross_entropy=False, model=language
    )
