"""Cards that are not here, as they are named on a command line."""

import pytest

from fallback.cards import CARDS, GIB, card
from fallback.gpu import Gpu


def test_by_name_by_memory_and_in_full() -> None:
    assert card("12GB").memory_bytes == card("12 GiB").memory_bytes == 12 * GIB
    assert card("NVIDIA GeForce rtx 4090") == Gpu("RTX 4090", (8, 9), 24 * GIB)
    assert card("Tesla P100").capability == (6, 0)
    assert card("Quadro M6000:5.2:12") == card("Quadro M6000") == Gpu("Quadro M6000", (5, 2), 12 * GIB)
    assert card("my own:12.0:31.5") == Gpu("my own", (12, 0), round(31.5 * GIB))
    assert all(card(name).name == name for name in CARDS)


@pytest.mark.parametrize(
    "text", ["", "a toaster", "GB", "M6000:5:12", "M6000:5.2", ":5.2:12", "M6000:5.2:0", "a:b:c:d"]
)
def test_what_is_no_card_is_one_line_with_a_remedy(text: str) -> None:
    with pytest.raises(ValueError, match="give its memory, as in --gpu 12GB, or name:capability:GiB") as caught:
        card(text)
    assert "\n" not in str(caught.value)
