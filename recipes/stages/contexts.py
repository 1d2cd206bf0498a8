"""Texts that a network has read and goes on from: their keys and values, and which of them a new token may look at.

What is new in all rows goes through the network one token after the other, without padding. Only attention has to
know where the rows are: keys and values are laid out as rows when they are put away, and queries when they look.

Import this after a backend has loaded its libraries.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache, DynamicLayer

from fallback import cpu
from fallback.patched import loaded_patchers, uncompiled
from recipes.stages import last_layer
from recipes.stages.folding import attending, attentions

# Places of a batch's rows, padding among them, whose texts are read in one pass. A CPU is fastest where a layer's
# outcome stays in its caches; a GPU waits for its many kernels.
PLACES_AT_ONCE = {"cpu": 4096, "cuda": 8192}
# So few tokens go through as they are, and the last ones of answers that are made together: they have few lengths.
_FEW, _TOGETHER = 16, 64


class Context:
    """A batch of rows that share a cache. Every column of it has a position in each row, or none where it is padding;
    which columns a new token may look at is said outright, since positions and columns differ here."""

    def __init__(self, network: Any, rows: int, capacity: int):
        self.network, self.capacity = network, capacity
        self.config = network.config.get_text_config()
        self.kinds = _kinds(self.config)
        self.window = getattr(self.config, "sliding_window", None)
        self.positions = np.full((rows, 0), -1)
        self.now = slice(0, rows)
        """Rows of the pass that is going on."""
        self.packed: Packed | None = None
        # Not in a circle: keys and values are to go when the context goes, not when Python next looks for circles.
        itself = weakref.proxy(self)
        self.cache = Cache(layers=[_Room(itself) for _ in range(self.config.num_hidden_layers)])

    def begin_with(self, other: "Context") -> None:
        """Take over the keys and values of a context of one row, for all rows."""
        rows, columns = len(self.positions), other.positions.shape[1]
        if columns:
            for mine, given in zip(self.cache.layers, other.cache.layers, strict=True):
                mine.update(*(x[:, :, :columns].expand(rows, -1, -1, -1) for x in (given.keys, given.values)))
        self.positions = np.repeat(other.positions, rows, axis=0)

    def keep(self, rows: Sequence[int]) -> None:
        chosen = torch.tensor(rows, device=self.network.device)
        for layer in self.cache.layers:
            layer.take(chosen)
        self.positions = self.positions[rows]
        self.now = slice(0, len(rows))

    def read_texts(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """One text for each row, longest first, those of like length in one pass; logits after the last token of
        each."""
        before, logits = self.positions, []
        positions = np.full((len(texts), len(texts[0])), -1)
        for rows in slices(texts, PLACES_AT_ONCE[self.network.device.type]):
            some, width = texts[rows], len(texts[rows.start])
            tokens, last = np.zeros((len(some), width), dtype=np.int64), np.zeros((len(some), width), dtype=bool)
            for row, text in enumerate(some):
                tokens[row, : len(text)] = text
                positions[rows.start + row, : len(text)] = before.shape[1] + np.arange(len(text))
                last[row, len(text) - 1] = True
            path = np.broadcast_to((before[rows] >= 0)[:, None], (*tokens.shape, before.shape[1]))
            logits.append(self._pass(rows, tokens, positions[rows, :width], path, np.zeros_like(tokens), last))
        self.positions = np.concatenate([before, positions], axis=1)
        return torch.cat(logits)

    def read(
        self, tokens: np.ndarray, positions: np.ndarray, path: np.ndarray, groups: np.ndarray, wanted: np.ndarray
    ) -> torch.Tensor:
        """Logits after those of `tokens` (rows x new) that are `wanted`, one row each, in their order. `positions` is
        -1 at padding; `path` (rows x new x columns so far) says which earlier columns a token follows; of the new
        ones it sees those of its own group before it."""
        logits = self._pass(slice(0, len(tokens)), tokens, positions, path, groups, wanted)
        self.positions = np.concatenate([self.positions, positions], axis=1)
        return logits

    def _pass(
        self,
        rows: slice,
        tokens: np.ndarray,
        positions: np.ndarray,
        path: np.ndarray,
        groups: np.ndarray,
        wanted: np.ndarray,
    ) -> torch.Tensor:
        new = tokens.shape[1]
        real = positions >= 0
        among = np.tril(np.ones((new, new), dtype=bool)) & (groups[:, :, None] == groups[:, None, :])
        allowed = np.concatenate([path, among & real[:, None, :]], axis=2)
        # A padding token that sees nothing would come out as NaN, and NaN spreads even with weight zero.
        allowed[:, np.arange(new), path.shape[2] + np.arange(new)] = True
        masks = {"full_attention": allowed}
        if self.window is not None:
            every = np.concatenate([self.positions[rows], positions], axis=1)
            near = allowed & (positions[:, :, None] - every[:, None, :] < self.window)
            masks["sliding_attention" if self.kinds else "full_attention"] = near
        device = self.network.device
        ready = {kind: self._as_model_wants(torch.from_numpy(mask)[:, None].to(device)) for kind, mask in masks.items()}
        packed: dict[str, Any] = {}
        count = int(real.sum())
        few_lengths = device.type == "cpu" and self.network.dtype == torch.bfloat16
        few_lengths = few_lengths and count > (_TOGETHER if new == 1 else _FEW)
        if self._packs():
            length = cpu.rounded(count) if few_lengths else count
            packed = {"packed": Packed.of(real, length, device)}
            tokens, positions, wanted = (
                np.pad(x[real], (0, length - count))[None] for x in (tokens, positions, wanted)
            )
        asked = torch.from_numpy(wanted).to(device)
        places = last_layer.places_of(asked, few_lengths)
        # A row of logits is as long as the vocabulary: of a quarter million numbers, where only few are looked at.
        hook = self.network.get_output_embeddings().register_forward_pre_hook(
            lambda head, inputs: (inputs[0].flatten(0, 1)[places][None],)
        )
        try:
            with (
                last_layer.serving(self.network, places, tokens.size),
                self._during(rows, **packed),
                uncompiled(self.network),
            ):
                output = self.network(
                    input_ids=torch.from_numpy(tokens).to(device),
                    position_ids=torch.from_numpy(np.maximum(positions, 0)).to(device),
                    attention_mask=ready if self.kinds else ready["full_attention"],
                    past_key_values=self.cache,
                    use_cache=True,
                    **packed,
                )
        finally:
            hook.remove()
        return output.logits[0, : wanted.sum()]

    def _packs(self) -> bool:
        """Unsloth's kernels on a GPU take the place of the attention that would have to know."""
        kernels = "unsloth" in loaded_patchers() and self.network.device.type == "cuda"
        return self.config._attn_implementation in _NAMES and not kernels

    @contextmanager
    def _during(self, rows: slice, packed: "Packed | None" = None) -> Iterator[None]:
        self.now, self.packed = rows, packed
        try:
            with attending(self.config, _NAMES) if packed is not None else nullcontext():
                yield
        finally:
            self.packed = None

    def _as_model_wants(self, allowed: torch.Tensor) -> torch.Tensor:
        if self.config._attn_implementation == "sdpa":
            return allowed
        mask = torch.zeros(allowed.shape, dtype=self.network.dtype, device=allowed.device)
        return mask.masked_fill_(~allowed, torch.finfo(mask.dtype).min)


def beginning(network: Any, texts: Sequence[Sequence[int]]) -> Context:
    """One row, which has read what all texts begin with."""
    start = shared_start(texts)
    context = Context(network, 1, start)
    if start:
        with torch.inference_mode():
            context.read_texts([texts[0][:start]])
    return context


def shared_start(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens all texts begin with; one is left to each, whose logits are the first to be wanted. A text alone
    shares nothing."""
    if len(texts) == 1:
        return 0
    first, last = min(map(tuple, texts)), max(map(tuple, texts))
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))))
    return min(shared, min(map(len, texts)) - 1)


class _Room(DynamicLayer):
    """Keys and values of one layer, with room for what comes: appending does not copy what is there."""

    def __init__(self, context: Context):
        super().__init__()
        self.context = context

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        context, given = self.context, (key_states, value_states)
        if context.packed is not None:
            given = (context.packed.laid_out(key_states), context.packed.laid_out(value_states))
        before, new = context.positions.shape[1], given[0].shape[2]
        if not self.is_initialized:
            self.lazy_initialization(*given)
            room = len(context.positions), given[0].shape[1], max(new, context.capacity)
            self.keys, self.values = (x.new_empty(*room, x.shape[-1]) for x in given)
        if before + new > self.keys.shape[2]:
            more = (0, 0, 0, max(new, self.keys.shape[2] // 2))
            self.keys, self.values = (torch.nn.functional.pad(held, more) for held in (self.keys, self.values))
        for held, x in zip((self.keys, self.values), given, strict=True):
            held[context.now, :, before : before + new] = x
            # Rows that are read later have shorter texts. Nobody looks at what they leave, but it has to be a number.
            held[context.now.stop :, :, before : before + new] = 0
        return self.keys[context.now, :, : before + new], self.values[context.now, :, : before + new]

    def get_seq_length(self) -> int:
        return self.context.positions.shape[1]

    def take(self, rows: torch.Tensor) -> None:
        columns = self.context.positions.shape[1]
        for held in (self.keys, self.values):
            held[: len(rows), :, :columns] = held[:, :, :columns].index_select(0, rows)
        self.keys, self.values = self.keys[: len(rows)], self.values[: len(rows)]


@dataclass(frozen=True)
class Packed:
    """Where tokens that follow each other without padding stand in their rows."""

    rows: int
    spread: torch.Tensor | None
    """For each place of the rows, its token; padding repeats the one before it. None: there is no padding."""
    back: torch.Tensor | None
    """For each token, its place; the first of all for those that belong to nobody."""

    @classmethod
    def of(cls, real: np.ndarray, length: int, device: Any) -> "Packed":
        """`length` tokens, of which the first are those of the rows."""
        flat = real.ravel()
        if flat.all() and flat.size == length:
            return cls(len(real), None, None)
        spread, back = np.maximum(flat.cumsum() - 1, 0), flat.nonzero()[0]
        back = np.pad(back, (0, length - len(back)))
        return cls(len(real), torch.from_numpy(spread).to(device), torch.from_numpy(back).to(device))

    def laid_out(self, x: torch.Tensor) -> torch.Tensor:
        """1 x heads x tokens x width -> rows x heads x places x width."""
        tokens = x[0].transpose(0, 1)
        places = tokens if self.spread is None else tokens.index_select(0, self.spread)
        return places.unflatten(0, (self.rows, -1)).transpose(1, 2)

    def in_one_row(self, made: torch.Tensor) -> torch.Tensor:
        """rows x places x heads x width -> 1 x tokens x heads x width."""
        places = made.flatten(0, 1)
        return (places if self.back is None else places.index_select(0, self.back))[None]


def _attend(
    usual: Callable[..., Any],
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    packed: Packed,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if query.is_cpu and module.config._attn_implementation == _NAMES["sdpa"]:
        usual = _shared_heads
    made = usual(module, packed.laid_out(query), key, value, attention_mask, **kwargs)[0]
    return packed.in_one_row(made), None


def _shared_heads(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it; which, where there is a mask, first copies keys and values for every head that shares
    them, since a GPU's kernels want that."""
    made = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
    return made.transpose(1, 2), None


_NAMES = attentions("packed rows", _attend)


def slices(texts: Sequence[Sequence[int]], at_once: int) -> Iterator[slice]:
    """Of texts whose lengths fall, as many rows as have so many places, padding among them."""
    start = 0
    while start < len(texts):
        rows = slice(start, min(len(texts), start + max(1, at_once // len(texts[start]))))
        yield rows
        start = rows.stop


def _kinds(config: Any) -> bool:
    """Whether layers differ in what they may look at, and want one mask per kind."""
    return "sliding_attention" in (getattr(config, "layer_types", None) or ())
