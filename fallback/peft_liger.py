"""Rung 2: plain PEFT, with Liger's Triton kernels for the norms, the rotary embedding and the MLP.

The loss stays our own fused head, as under every backend: Liger's would replace the model's forward, and could give
no probability of an answer. Liger also replaces the classes in the model's module, so a process that loaded a model
with it is no place for another without.
"""

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

from fallback import plain_peft
from fallback.choose import Choice
from fallback.plain_peft import add_lora, for_inference, import_libraries, load_adapter

__all__ = ["add_lora", "for_inference", "import_libraries", "load", "load_adapter", "model_types", "patch"]


@cache
def model_types() -> frozenset[str]:
    """The architectures that the installed Liger has kernels for; none where it is not installed. Read from its
    source, because importing it would import torch and transformers before a backend is chosen."""
    package = importlib.util.find_spec("liger_kernel")
    if package is None or not package.submodule_search_locations:
        return frozenset()
    source = Path(package.submodule_search_locations[0]) / "transformers" / "monkey_patch.py"
    table = re.search(r"^MODEL_TYPE_TO_APPLY_LIGER_FN = \{(.*?)^\}", source.read_text(encoding="utf-8"), re.S | re.M)
    return frozenset(re.findall(r'^\s+"(\w+)":', table.group(1), re.M)) if table else frozenset()


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
