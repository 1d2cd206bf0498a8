"""When memory does not suffice: what was too much, and how the same can be learned with less."""

from recipes.stages.recipe import Recipe, Settings


class TooMuchAtOnce(Exception):
    """What went through the network when memory did not suffice."""

    def __init__(self, rows: int, tokens: int):
        super().__init__(f"out of memory with {tokens:,} tokens of {rows} examples at once")
        self.rows, self.tokens = rows, tokens

    @property
    def fewer(self) -> int | None:
        """Tokens at once that may fit: the optimiser steps stay what they are. None where one example is too much."""
        return self.tokens // 2 if self.rows > 1 else None


def out_of_memory(error: BaseException) -> bool:
    """On a GPU it is a class of its own, on a CPU a message."""
    return (
        isinstance(error, TooMuchAtOnce)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def less_memory(recipe: Recipe, settings: Settings, preset: str | None, error: BaseException) -> str:
    """What to change first when training ran out of memory."""
    smaller = [name for name, values in recipe.presets.items() if values.get("batch_size", 99) < settings.batch_size]
    fewer = error.fewer if isinstance(error, TooMuchAtOnce) else None
    if fewer:
        remedy = f"take --batch-tokens {fewer}, the same steps with half the memory"
    elif smaller:
        remedy = f"take --preset {smaller[-1]}"
    elif not settings.checkpointing:
        remedy = "take --checkpointing"
    elif settings.quantization != "4bit":
        remedy = "take --quantization 4bit"
    else:
        remedy = f"take --max-length {max(64, settings.max_length // 2)}, or a smaller --lora-rank"
    what = str(error) if isinstance(error, TooMuchAtOnce) else "out of memory"
    return (
        f"{what}, batch {settings.batch_size} x {settings.accumulation}, length {settings.max_length}"
        f"{f', preset {preset}' if preset else ''}: {remedy}"
    )
