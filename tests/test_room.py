"""What is said, and done, when memory does not suffice."""

from dataclasses import replace

import pytest
from conftest import recipe

from recipes.stages.recipe import Settings
from recipes.stages.room import TooMuchAtOnce, less_memory, out_of_memory


def test_out_of_memory_is_recognised() -> None:
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert out_of_memory(caught.value)
    assert out_of_memory(TooMuchAtOnce(2, 64))
    assert not out_of_memory(RuntimeError("shapes do not match"))


def test_what_to_take_then() -> None:
    chosen = recipe("gemma3_12b_opercode")
    batch, one = TooMuchAtOnce(16, 1200), TooMuchAtOnce(1, 384)
    settings = replace(chosen.settings, **chosen.presets["24gb"])
    assert "16 examples at once, batch 4 x 4, length 512, preset 24gb: take --batch-tokens 600," in less_memory(
        chosen, settings, "24gb", batch
    )
    # One example is too much, or the model itself: fewer at once would be of no use.
    assert "take --preset 16gb" in less_memory(chosen, settings, "24gb", one)
    settings = replace(chosen.settings, **chosen.presets["12gb"])
    assert "take --batch-tokens 600," in less_memory(chosen, settings, "12gb", batch)
    for error in (one, MemoryError("can't allocate memory")):
        assert "take --max-length 192" in less_memory(chosen, settings, "12gb", error)
    bare = Settings(batch_size=1, checkpointing=False, quantization="none")
    assert "take --checkpointing" in less_memory(chosen, bare, None, one)
    assert "take --quantization 4bit" in less_memory(chosen, replace(bare, checkpointing=True), None, one)
