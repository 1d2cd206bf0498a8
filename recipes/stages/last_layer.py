"""In a network's last layer, no work for tokens whose outcome nobody looks at.

What a token becomes in the last layer goes into the loss if the next one carries some, and nowhere else; only its keys
and values are read by others. So queries, the attention's outcome and the MLP are computed for the tokens that are
asked for, and what stands in the place of the others is zeros. For who is asked nothing changes, but where LoRA's
dropout falls.

Import this after a backend has loaded its libraries.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from fallback import cpu
from fallback.compiled import decoder_layers
from fallback.patched import loaded_patchers
from recipes.stages.render import IGNORED

_PARTS = ("q_proj", "o_proj", "dense", "mlp")
"""As they are called in the layers of Llama, Gemma and GPT-NeoX, whose query, key and value are one."""
_KNOWN = ("modeling_llama", "modeling_gemma2", "modeling_gemma3", "modeling_gpt_neox")

# Above this share of tokens asked for, picking them out takes as long as it spares.
MOST = 0.8


@contextmanager
def only_asked_for(network: Any, labels: torch.Tensor, few_lengths: bool = False) -> Iterator[None]:
    """Within this the network's last layer, in the backward pass too, serves the labels that carry loss; with
    `few_lengths`, some tokens more."""
    found = parts(network)
    if not found:
        yield
        return
    asked = labels.new_zeros(labels.shape, dtype=torch.bool)
    asked[:, :-1] = labels[:, 1:] != IGNORED
    with cut(found, places_of(asked, few_lengths), asked.numel()):
        yield


def serving(network: Any, places: torch.Tensor, tokens: int) -> AbstractContextManager[None]:
    """As many places as are asked for, among so many tokens."""
    return cut(parts(network) if _pays(places, tokens) else [], places, tokens)


def places_of(asked: torch.Tensor, few_lengths: bool) -> torch.Tensor:
    """Of the tokens that are asked for; with `few_lengths`, of some more behind them."""
    asked = asked.flatten()
    places = asked.nonzero()[:, 0]
    if few_lengths:
        places = torch.cat([places, (~asked).nonzero()[: cpu.rounded(len(places)) - len(places), 0]])
    return places


def parts(network: Any) -> list[Any]:
    """What of a network in use can be cut. Unsloth's layers are compiled on a GPU, and would be anew for every number
    of tokens that are asked for."""
    return [] if "unsloth" in loaded_patchers() else parts_of(network)


def parts_of(network: Any) -> list[Any]:
    """Of the last layer of a family that is known."""
    layers = decoder_layers(network)
    if not layers or type(layers[-1]).__module__.rpartition(".")[2] not in _KNOWN:
        return []
    named = {name.rpartition(".")[2]: part for name, part in layers[-1].named_modules()}
    return [named[name] for name in _PARTS if name in named]


@contextmanager
def cut(found: Sequence[Any], places: torch.Tensor, tokens: int) -> Iterator[None]:
    if not _pays(places, tokens):
        yield
        return
    before = [(part, part.forward) for part in found]
    own = [part for part, _ in before if "forward" in vars(part)]
    try:
        for part, forward in before:
            part.forward = _only(forward, places)
        yield
    finally:
        for part, forward in before:
            if any(part is one for one in own):
                part.forward = forward
            else:
                vars(part).pop("forward", None)


def _pays(places: torch.Tensor, tokens: int) -> bool:
    return 0 < len(places) <= MOST * tokens


def _only(forward: Callable[[torch.Tensor], torch.Tensor], places: torch.Tensor) -> Callable[..., torch.Tensor]:
    def forward_some(x: torch.Tensor) -> torch.Tensor:
        made = forward(x.flatten(0, 1)[places][None])[0]
        return made.new_zeros(x.shape[:-1].numel(), made.shape[-1]).index_copy(0, places, made).view(*x.shape[:-1], -1)

    return forward_some
