"""A batch in one row: what all its prompts begin with once, then what each example has of its own, and no padding.

A token stands at the position that it has in its example. Everything in a decoder but attention looks at one token at
a time, so only attention has to know: there queries, keys and values are laid out as the padded batch that they stand
for, and go to the function that computes it for others. Attention is causal, so what precedes the own tokens of an
example is the same for all, and all of it comes out as it would in a padded batch.

Import this after a backend has loaded its libraries.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

from fallback import cpu
from fallback.choose import Choice
from recipes.stages.render import IGNORED

# Below this share of tokens saved, laying keys and values out in every layer takes longer than it spares.
LEAST_SAVED = 0.05


@dataclass(frozen=True)
class Fold:
    """Where the tokens of one row stand in the batch that it stands for."""

    shared: int
    """Tokens at the beginning that belong to every example."""
    rows: int
    width: int
    spread: torch.Tensor
    """For each place of the padded batch, its token in the row; padding repeats an example's last token."""
    back: torch.Tensor
    """For each token of the row, its place in the padded batch; a shared one's is in the first example."""
    example: torch.Tensor
    """For each token of the row, whose it is."""
    nobodys: torch.Tensor
    """Which tokens of the row belong to nobody, and only fill it up."""

    def to(self, device: torch.device) -> "Fold":
        moved = {name: getattr(self, name).to(device) for name in ("spread", "back", "example", "nobodys")}
        return replace(self, **moved)


def obstacle(choice: Choice) -> str | None:
    """Why a backend's attention cannot be told where tokens stand."""
    if choice.attention == "flash_attention_2":
        return "FlashAttention 2 takes positions that begin anew for another kind of row"
    if choice.backend == "unsloth" and choice.device == "cuda":
        return "Unsloth's kernels on a GPU take the place of the attention that would have to know"
    return None


def folded(batch: dict[str, Any], few_lengths: bool = False, least_saved: float = LEAST_SAVED) -> dict[str, Any]:
    """A padded batch as one row, where that saves such a share of its tokens; the same batch where not. With
    `few_lengths` it is filled up to a length that comes again, by tokens that belong to nobody."""
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
    rows, width = ids.shape
    shared = _shared(ids, labels, mask)
    lengths = mask.sum(1)
    tokens = shared + int((lengths - shared).sum())
    length = cpu.rounded(tokens) if few_lengths else tokens
    if shared == 0 or length > (1 - least_saved) * rows * width:
        return batch
    kept = mask.bool()
    kept[1:, :shared] = False
    back = kept.flatten().nonzero()[:, 0]
    place = torch.empty(rows * width, dtype=torch.long)
    place[back] = torch.arange(tokens)
    # The first example's own tokens follow the shared ones, as in its own row.
    columns = torch.minimum(torch.arange(width), lengths[:, None] - 1)
    spread = torch.where(columns < shared, columns, place.view(rows, width).gather(1, columns))
    # The first place of all, without its loss, as often as it takes.
    back, nobodys = functional.pad(back, (0, length - tokens)), torch.arange(length) >= tokens
    found = {name: value for name, value in batch.items() if name != "attention_mask"}
    for name in ("input_ids", "labels", "token_type_ids"):
        if name in batch:
            found[name] = batch[name].flatten()[back][None]
    found["labels"][:, tokens:] = IGNORED
    found["position_ids"] = (back % width)[None]
    found["fold"] = Fold(shared, rows, width, spread.flatten(), back, back // width, nobodys)
    return found


def _shared(ids: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> int:
    """Tokens that all rows begin with. The first that an example has of its own carries no loss: in one row, it does
    not stand behind the token that it would have to be predicted from."""
    same = ((ids == ids[0]) & (mask != 0)).all(0).long().cumprod(0).sum()
    counted = labels != IGNORED
    first = torch.where(counted.any(1), counted.long().argmax(1), mask.sum(1)).min()
    return int(min(same, first - 1, mask.sum(1).min() - 1).clamp(min=0))


def by_example(per_token: torch.Tensor, fold: Fold | None) -> torch.Tensor:
    """The sum for each example of what is told of every token but a row's first."""
    if fold is None:
        return per_token.sum(-1)
    return per_token.new_zeros(fold.rows).index_add(0, fold.example[1:], per_token[0])


@contextmanager
def understood(network: Any, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The batch, on the network's device; within this its attention knows what a folded one is, in the backward pass
    too, where checkpointing computes again."""
    fold = batch.get("fold")
    if fold is None:
        yield batch
        return
    embeddings = network.get_input_embeddings()
    noise = getattr(embeddings, "neftune_noise_alpha", None)
    if noise is not None:
        # NEFTune's noise is the weaker the longer the row; it is to be what it is in the padded batch.
        embeddings.neftune_noise_alpha = noise * (batch["input_ids"].shape[1] / fold.width) ** 0.5
    try:
        with attending(network.config.get_text_config(), _NAMES):
            yield {**batch, "fold": fold.to(network.device)}
    finally:
        if noise is not None:
            embeddings.neftune_noise_alpha = noise


class _Spread(torch.autograd.Function):
    """Tokens of one row -> the padded batch."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, fold: Fold) -> torch.Tensor:
        ctx.fold = fold
        return x.index_select(0, fold.spread).unflatten(0, (fold.rows, fold.width))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        fold = ctx.fold
        # No token sees padding, so what comes back from there is nothing.
        own = grad.flatten(0, 1).index_select(0, fold.back)
        own[: fold.shared] = grad[:, : fold.shared].sum(0)
        # Nor does a token see what belongs to nobody, which stands at the first place of all.
        return own.masked_fill_(fold.nobodys.view(-1, *[1] * (own.dim() - 1)), 0), None


class _Gather(torch.autograd.Function):
    """The padded batch -> tokens of one row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, fold: Fold) -> torch.Tensor:
        ctx.fold = fold
        return x.flatten(0, 1).index_select(0, fold.back)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        fold = ctx.fold
        places = grad.new_zeros(fold.rows * fold.width + 1, *grad.shape[1:])
        places.index_copy_(0, fold.back.masked_fill(fold.nobodys, len(places) - 1), grad)
        return places[:-1].unflatten(0, (fold.rows, fold.width)), None


def _attend(
    usual: Callable[..., Any],
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    fold: Fold,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    spread = [_Spread.apply(x[0].transpose(0, 1), fold).transpose(1, 2) for x in (query, key, value)]
    eager = usual is not AttentionInterface._global_mapping["sdpa"]
    # Padding stands behind what it could disturb, so being causal is mask enough.
    mask = None
    if eager or (sliding_window is not None and fold.width > sliding_window):
        mask = _mask(fold.width, sliding_window, query.dtype if eager else torch.bool, query.device)
    made = usual(module, *spread, mask, sliding_window=sliding_window, **kwargs)[0]
    return _Gather.apply(made, fold)[None], None


def _mask(width: int, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    back = torch.arange(width, device=device)[:, None] - torch.arange(width, device=device)
    seen = (back >= 0) & (back < (window or width))
    if dtype == torch.bool:
        return seen[None, None]
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)[None, None]


def attentions(batch: str, attend: Callable[..., Any]) -> dict[str, str]:
    """Register `attend`, which is given the usual attention first, for a kind of batch: the usual one -> its name."""

    def sdpa(*args: Any, **kwargs: Any) -> Any:
        return attend(AttentionInterface._global_mapping["sdpa"], *args, **kwargs)

    def eager(module: Any, *args: Any, **kwargs: Any) -> Any:
        return attend(sys.modules[type(module).__module__].eager_attention_forward, module, *args, **kwargs)

    names = {"sdpa": f"sdpa of {batch}", "eager": f"eager of {batch}"}
    AttentionInterface.register(names["sdpa"], sdpa)
    AttentionInterface.register(names["eager"], eager)
    return names


@contextmanager
def attending(config: Any, names: dict[str, str]) -> Iterator[None]:
    """Within this, attention is the one that is registered for a kind of batch."""
    usual = config._attn_implementation
    try:
        config._attn_implementation = names[usual]
        yield
    finally:
        config._attn_implementation = usual


_NAMES = attentions("a folded batch", _attend)
