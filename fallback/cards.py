"""A card that is not here, as a user names it: by name, by memory, or by all that matters."""

import re

from fallback.gpu import Gpu

GIB = 2**30
CARDS = {
    "Quadro M6000": (5, 2, 12), "GTX 1080": (6, 1, 8), "P100": (6, 0, 16), "V100": (7, 0, 16), "T4": (7, 5, 15),
    "RTX 3060": (8, 6, 12), "RTX 3090": (8, 6, 24), "RTX 4060 Ti 16GB": (8, 9, 16), "RTX 4090": (8, 9, 24),
    "L4": (8, 9, 22), "A100 40GB": (8, 0, 40), "A100 80GB": (8, 0, 80), "H100": (9, 0, 80), "H200": (9, 0, 141),
    "B200": (10, 0, 180), "RTX 5090": (12, 0, 32),
}  # fmt: skip
"""Name -> compute capability and the memory that the driver reports, GiB."""
USUAL = tuple(name for name, (major, minor, memory) in CARDS.items() if (major, minor) >= (7, 5) and memory <= 80)
"""The answer is for these where nobody names a card: older ones compute in other ways, which takes seconds each."""


def card(text: str) -> Gpu:
    """A known card's name, an amount of memory as in 12GB, or name:capability:GiB. Raises ValueError, in one line."""
    if amount := re.fullmatch(r"(\d+(?:\.\d+)?)\s*G(?:i?B)?", text.strip(), re.I):
        return Gpu(f"a card with {amount.group(1)} GiB", (8, 0), round(float(amount.group(1)) * GIB))
    if described := re.fullmatch(r"([^:]*[^:\s]):(\d{1,2})\.(\d):(\d+(?:\.\d+)?)", text.strip()):
        name, major, minor, memory = described.groups()
        if float(memory) > 0:
            return Gpu(name.strip(), (int(major), int(minor)), round(float(memory) * GIB))
    known = {key.lower(): key for key in CARDS}
    key = known.get(re.sub(r"^(nvidia|geforce|tesla|\s)+", "", text.strip().lower()))
    if key is None:
        raise ValueError(
            f"{text!r}: unknown; give its memory, as in --gpu 12GB, or name:capability:GiB, as in "
            f'--gpu "Quadro M6000:5.2:12", or one of {", ".join(CARDS)}'
        )
    major, minor, memory = CARDS[key]
    return Gpu(key, (major, minor), memory * GIB)
