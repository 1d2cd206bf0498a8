"""The exact probability of every code, given a text.

The codes' tokens form a tree. What all prompts begin with runs through the model once, each text once, and then
the tree is walked from the most probable branch down, over the keys and values already computed, until what has
not been looked at cannot matter any more. Nothing is sampled and nothing is parsed: the answer is always a code.
"""

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from recipes.stages.contexts import Context, beginning
from recipes.stages.loading import Model
from recipes.stages.processes import ALONE, Team
from recipes.stages.recipe import Message, UserError
from recipes.stages.render import Renderer

TOLERANCE = 1e-4
"""Share of the probability that may be left unexplored."""
MOST_TOKENS = 32768
CACHE_BYTES = 2**30
"""Keys and values held at one time, where the user does not say how many tokens."""
# Branches of one text read in one pass: the first may have settled what the others were for.
_BRANCHES = 8
# Columns of such a pass beyond what its best guesses need.
_WIDER = 6
# Rows of logits turned into float32 at one time, and bytes of all that one pass may leave.
_LOGITS_AT_ONCE = 64
_LOGITS_BYTES = 2**29


@dataclass
class Branch:
    """Tokens after which codes part, or one ends."""

    tokens: tuple[int, ...] = ()
    code: int | None = None
    """Index of the code that ends here."""
    children: list["Branch"] = field(default_factory=list)
    rows: int = 0
    """Training rows of the codes below: which way to look first."""

    @property
    def settled(self) -> bool:
        """Its parent's distribution alone tells its probability."""
        return self.code is not None and len(self.tokens) == 1


def grow(answers: Sequence[Sequence[int]], rows: Sequence[int]) -> Branch:
    """The tree of the answers' tokens, with unbranching stretches in one piece. None is the beginning of another."""

    def below(members: list[int], depth: int, tokens: tuple[int, ...]) -> Branch:
        branch = Branch(tokens, rows=sum(rows[m] for m in members))
        if len(members) == 1 and depth == len(answers[members[0]]):
            branch.code = members[0]
            return branch
        by_token: dict[int, list[int]] = {}
        for member in members:
            by_token.setdefault(answers[member][depth], []).append(member)
        for some in by_token.values():
            first = answers[some[0]]
            end = depth + 1
            while end < len(first) and all(end < len(answers[m]) and answers[m][end] == first[end] for m in some):
                end += 1
            branch.children.append(below(some, end, tuple(first[depth:end])))
        branch.children.sort(key=lambda child: -child.rows)
        return branch

    return below(list(range(len(answers))), 0, ())


class Codes:
    """A closed set of answers as this model's tokens."""

    def __init__(self, renderer: Renderer, train_rows: Mapping[str, int]):
        self.names = list(train_rows)
        self.index = {name: i for i, name in enumerate(self.names)}
        self.answers = distinguishing([renderer.answer(name) for name in self.names])
        twins = sorted(n for n, a in zip(self.names, self.answers, strict=True) if self.answers.count(a) > 1)
        if twins:
            raise UserError(f"the codes {', '.join(twins)} are the same tokens to this model; merge or rename them")
        self.root = grow(self.answers, list(train_rows.values()))
        self.alphabet = sorted({token for answer in self.answers for token in answer})
        self.column = {token: i for i, token in enumerate(self.alphabet)}


def distinguishing(answers: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[int]]:
    """Of answers and what ends each, the tokens that tell it from every other. The end belongs to them only where an
    answer is the beginning of another: after the last token of any other there is nothing left to choose."""
    beginnings = {tuple(code[:length]) for code, _ in answers for length in range(len(code))}
    return [[*code, *(end if tuple(code) in beginnings else ())] for code, end in answers]


@dataclass
class Scores:
    """Natural logarithm of each code's probability, a row per text and a column per code; -inf where it was not
    looked at."""

    log_p: np.ndarray
    expansions: int = 0
    """Branches looked into, over all texts."""


def score(
    model: Model,
    codes: Codes,
    prompts: Sequence[Sequence[Message]],
    max_length: int | None = None,
    tolerance: float = TOLERANCE,
    batch_tokens: int | None = None,
    done: Callable[[int], None] = lambda count: None,
    include: Sequence[str] | None = None,
    team: Team = ALONE,
) -> Scores:
    """Log-probabilities of codes in the order of the prompts.

    tolerance 0 looks at all codes; `include` names, for each prompt, a code that is looked at in any case. A team
    shares the batches that one process would make, so that no number depends on how many there are.
    """
    encoded = list(map(tuple, model.renderer.prompts(prompts, max_length)))
    wanted = [codes.index[name] for name in include] if include is not None else [-1] * len(encoded)
    same: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for row, key in enumerate(zip(encoded, wanted, strict=True)):
        same.setdefault(key, []).append(row)
    different = sorted(same, key=lambda key: len(key[0]), reverse=True)
    scores = Scores(np.full((len(encoded), len(codes.names)), -np.inf))
    if not different:
        return scores
    walk = _Walk(codes, tolerance)
    batch_tokens = batch_tokens or affordable_tokens(model.network)
    with torch.inference_mode():
        prefix = beginning(model.network, [text for text, _ in different])
        start = prefix.positions.shape[1]
        found: list[tuple[int, tuple[np.ndarray, int]]] = []
        for _, batch in team.mine(list(_batches(different, walk.room, batch_tokens, _most_rows(model.network, codes)))):
            context = Context(model.network, len(batch), len(batch[0][0]) + walk.room)
            context.begin_with(prefix)
            logits = context.read_texts([text[start:] for text, _ in batch])
            states = walk.through(context, logits, [code for _, code in batch])
            for key, state in zip(batch, states, strict=True):
                found.append((same[key][0], (state.closed, state.expansions)))
                done(len(same[key]))
    for row, (log_p, expansions) in zip(sorted(rows[0] for rows in same.values()), team.together(found), strict=True):
        alike = same[encoded[row], wanted[row]]
        scores.log_p[alike] = log_p
        scores.expansions += expansions * len(alike)
    return scores


def affordable_tokens(network: Any, most: int = MOST_TOKENS) -> int:
    """As many tokens as CACHE_BYTES holds keys and values of, up to `most`."""
    config = network.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * width * network.dtype.itemsize
    return max(1024, min(most, CACHE_BYTES // per_token))


def _most_rows(network: Any, codes: Codes) -> int:
    """Whose guesses' logits can be held at one time, be each as wide as a pass may be."""
    width = _WIDER + max(map(len, codes.answers))
    vocabulary = network.config.get_text_config().vocab_size
    return max(1, _LOGITS_BYTES // (width * vocabulary * network.dtype.itemsize))


def _batches(different: list[Any], room: int, batch_tokens: int, most_rows: int) -> Iterator[list[Any]]:
    """Like lengths together, as many rows as batch_tokens holds."""
    at = 0
    while at < len(different):
        rows = max(1, min(most_rows, batch_tokens // (len(different[at][0]) + room)))
        yield different[at : at + rows]
        at += rows


@dataclass
class _State:
    """How far the walk has come for one text."""

    closed: np.ndarray
    open: list[tuple[float, int, Branch, tuple[int, ...]]]
    """A heap of (-log of what is known of its probability, order, branch, columns of the path above it)."""
    length: int
    """Position of the first answer token."""
    include: int
    expansions: int = 0


@dataclass(frozen=True)
class _Guess:
    """Branches to be looked into one after the other, each the first one's continuation."""

    log_p: float
    branches: list[Branch]
    above: tuple[int, ...]
    """Columns of the path that leads there."""

    @property
    def tokens(self) -> list[int]:
        """What has to be read to know each branch's probability and what follows it: of a code, all but its last."""
        return [t for b in self.branches for t in (b.tokens[:-1] if b.code is not None else b.tokens)]


class _Walk:
    def __init__(self, codes: Codes, tolerance: float):
        self.codes, self.tolerance = codes, tolerance
        self.room = 4 * max(1, len(self.codes.alphabet))
        self.order = 0

    def through(self, context: Context, logits: torch.Tensor, include: Sequence[int]) -> list[_State]:
        states = [
            _State(np.full(len(self.codes.names), -np.inf), [], int(context.positions[row].max()) + 1, code)
            for row, code in enumerate(include)
        ]
        for state, known in zip(states, self._known(logits), strict=True):
            self._open(state, self.codes.root, 0.0, known, ())
        texts = context.positions.shape[1]
        active = [row for row, state in enumerate(states) if not self._finished(state)]
        here = list(range(len(states)))
        while active:
            if active != here:
                context.keep([here.index(row) for row in active])
                here = active
            self._expand(context, [states[row] for row in active], texts)
            active = [row for row in active if not self._finished(states[row])]
        return states

    def _known(self, logits: torch.Tensor) -> np.ndarray:
        """Log-probabilities of the tokens that codes are made of; the others only take part in the sum."""
        chosen = logits[:, torch.tensor(self.codes.alphabet, device=logits.device)].float()
        total = torch.cat([some.float().logsumexp(-1, keepdim=True) for some in logits.split(_LOGITS_AT_ONCE)])
        return (chosen - total).double().cpu().numpy()

    def _open(self, state: _State, branch: Branch, log_p: float, known: np.ndarray, path: tuple[int, ...]) -> None:
        """A branch's children, now that the distribution after it is known."""
        for child in branch.children:
            bound = log_p + float(known[self.codes.column[child.tokens[0]]])
            if child.settled:
                assert child.code is not None
                state.closed[child.code] = bound
            else:
                self._push(state, bound, child, path)

    def _push(self, state: _State, log_p: float, branch: Branch, path: tuple[int, ...]) -> None:
        self.order += 1
        heapq.heappush(state.open, (-log_p, self.order, branch, path))

    def _finished(self, state: _State) -> bool:
        if not state.open:
            return True
        if state.include >= 0 and state.closed[state.include] == -np.inf:
            return False
        left = sum(np.exp(-bound) for bound, *_ in state.open)
        return bool(left < self.tolerance * np.exp(state.closed).sum())

    def _chosen(self, state: _State) -> list["_Guess"]:
        """The most probable branches: no more than have to be looked into in any case, and a few at a time; and on
        from the best of them down the way most training rows went, which costs a few tokens, and saves a round where
        it is right."""
        missing = state.include if state.include >= 0 and state.closed[state.include] == -np.inf else -1
        some: list[Any] = []
        closed = np.exp(state.closed).sum()
        left = sum(np.exp(-bound) for bound, *_ in state.open)
        # With all that is open counted as found, this much may stay open; if that asks for nothing, without it.
        for enough in (self.tolerance * (closed + left), self.tolerance * closed):
            while state.open and len(some) < _BRANCHES and left >= enough:
                some.append(heapq.heappop(state.open))
                left -= np.exp(-some[-1][0])
            if some:
                break
        if not some:
            at = next(i for i, entry in enumerate(state.open) if _leads_to(entry[2], missing))
            some.append(state.open.pop(at))
            heapq.heapify(state.open)
        return [
            _Guess(-negative, _spine(branch) if place == 0 else [branch], path)
            for place, (negative, _, branch, path) in enumerate(some)
        ]

    def _fitting(self, chosen: list[list["_Guess"]], states: list[_State]) -> int:
        """Put back what would make the batch wider than the best guesses need, and a little: every column of it is
        computed for all rows. Returns the width."""
        most = _WIDER + max(len(guesses[0].tokens) for guesses in chosen)
        for state, guesses in zip(states, chosen, strict=True):
            while sum(len(guess.tokens) for guess in guesses) > most:
                last = guesses.pop()
                self._push(state, last.log_p, last.branches[0], last.above)
        return max(sum(len(guess.tokens) for guess in guesses) for guesses in chosen)

    def _expand(self, context: Context, states: list[_State], texts: int) -> None:
        """Look into some branches of every text."""
        chosen = [self._chosen(state) for state in states]
        width = self._fitting(chosen, states)
        before = context.positions.shape[1]
        shape = (len(states), width)
        tokens, positions, groups = np.zeros(shape, dtype=np.int64), np.full(shape, -1), np.full(shape, -1)
        path = np.zeros((*shape, before), dtype=bool)
        path[:, :, :texts] = context.positions[:, None, :texts] >= 0
        for row, (state, guesses) in enumerate(zip(states, chosen, strict=True)):
            column = width - sum(len(guess.tokens) for guess in guesses)
            for group, guess in enumerate(guesses):
                here = slice(column, column + len(guess.tokens))
                tokens[row, here], groups[row, here] = guess.tokens, group
                positions[row, here] = state.length + len(guess.above) + np.arange(len(guess.tokens))
                path[row, here, list(guess.above)] = True
                column += len(guess.tokens)
        read = positions >= 0
        known = np.full((*shape, len(self.codes.alphabet)), np.nan)
        known[read] = self._known(context.read(tokens, positions, path, groups, read))
        for row, (state, guesses) in enumerate(zip(states, chosen, strict=True)):
            column = width - sum(len(guess.tokens) for guess in guesses)
            for guess in guesses:
                log_p, above = guess.log_p, guess.above
                for place, branch in enumerate(guess.branches):
                    if place:
                        # The next branch of the spine was opened a moment ago, and is looked into right away.
                        log_p = self._take(state, branch)
                    for token in branch.tokens[1:]:
                        log_p += float(known[row, column, self.codes.column[token]])
                        above = (*above, before + column)
                        column += 1
                    state.expansions += 1
                    if branch.code is not None:
                        state.closed[branch.code] = log_p
                    else:
                        above = (*above, before + column)
                        self._open(state, branch, log_p, known[row, column], above)
                        column += 1

    def _take(self, state: _State, branch: Branch) -> float:
        at = next(i for i, entry in enumerate(state.open) if entry[2] is branch)
        negative, *_ = state.open.pop(at)
        heapq.heapify(state.open)
        return -negative


def _leads_to(branch: Branch, code: int) -> bool:
    return branch.code == code or any(_leads_to(child, code) for child in branch.children)


def _spine(branch: Branch) -> list[Branch]:
    spine = [branch]
    while spine[-1].children and not spine[-1].children[0].settled:
        spine.append(spine[-1].children[0])
    return spine
