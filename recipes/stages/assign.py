"""Which of a file's rows go into which split, by numbers: a label's and a text's for every row. Millions of rows, so
what is made of them on the way is made for a part of them, or thrown away before the next is made.
"""

from typing import NamedTuple

import numpy as np

from recipes.stages.recipe import Split

_PART = 1 << 20


class Same(NamedTuple):
    """The rows whose text occurs more than once: identical ones beside each other, in the file's order."""

    rows: np.ndarray
    starts: np.ndarray
    """Where in rows each group begins."""

    @classmethod
    def of(cls, texts: np.ndarray) -> "Same":
        ordered = np.sort(texts)
        twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        del ordered
        if not len(twice):
            return cls(np.empty(0, np.int64), np.empty(0, np.int64))
        rows = np.concatenate([_among(texts[at : at + _PART], twice) + at for at in range(0, len(texts), _PART)])
        theirs = texts[rows]
        order = np.argsort(theirs, kind="stable")
        theirs = theirs[order]
        return cls(rows[order], np.flatnonzero(np.r_[True, theirs[1:] != theirs[:-1]]))

    @property
    def counts(self) -> np.ndarray:
        return np.diff(np.r_[self.starts, len(self.rows)])

    def differing(self, values: np.ndarray) -> np.ndarray:
        """Which groups have rows of different values."""
        if not len(self.starts):
            return np.empty(0, bool)
        theirs = values[self.rows]
        return np.minimum.reduceat(theirs, self.starts) != np.maximum.reduceat(theirs, self.starts)

    def rows_of(self, groups: np.ndarray) -> np.ndarray:
        """In the file's order."""
        return np.sort(self.rows[np.repeat(groups, self.counts)])


def _among(texts: np.ndarray, twice: np.ndarray) -> np.ndarray:
    place = np.minimum(np.searchsorted(twice, texts), len(twice) - 1)
    return np.flatnonzero(twice[place] == texts)


def assign(labels: np.ndarray, same: Same | None, split: Split, seed: int) -> np.ndarray:
    """0, 1 or 2 for every row: train, val, test. Identical texts go as one, if `same` names them; every class has its
    share everywhere, and something in train."""
    generator = np.random.Generator(np.random.PCG64(seed))
    belongs = np.zeros(len(labels), np.int8)
    if same is None or not len(same.rows):
        _draw(labels, None, split, generator, belongs)
        return belongs
    # A group is drawn by its first row, and the others follow.
    alone = np.ones(len(labels), bool)
    alone[same.rows] = False
    alone[same.rows[same.starts]] = True
    drawn = np.flatnonzero(alone)
    sizes = np.ones(len(drawn), np.int32)
    sizes[np.searchsorted(drawn, same.rows[same.starts])] = same.counts
    found = np.zeros(len(drawn), np.int8)
    _draw(labels[drawn], sizes, split, generator, found)
    belongs[drawn] = found
    belongs[same.rows] = np.repeat(belongs[same.rows[same.starts]], same.counts)
    # A class of which every text is drawn under another's label may be in no training row.
    untrained = (counts(labels) > 0) & (counts(labels[belongs == 0], int(labels.max()) + 1) == 0)
    for label in np.flatnonzero(untrained):
        place = np.flatnonzero(labels[same.rows] == label)[0]
        group = int(np.searchsorted(same.starts, place, side="right")) - 1
        belongs[same.rows[same.starts[group] :][: same.counts[group]]] = 0
    return belongs


def _draw(
    labels: np.ndarray, sizes: np.ndarray | None, split: Split, generator: np.random.Generator, belongs: np.ndarray
) -> None:
    """One class after the other, by lot: the first of it is for training; then validation takes its share, then the
    test. `sizes`: how many rows each stands for, if not one."""
    lots = generator.random(len(labels))
    by_label = np.argsort(labels, kind="stable")
    ends = np.cumsum(counts(labels))
    for label, (start, end) in enumerate(zip(np.r_[0, ends[:-1]], ends, strict=True)):
        if start == end:
            continue
        members = by_label[start:end]
        members = members[np.argsort(label + lots[members])]
        size = np.ones(len(members), np.int32) if sizes is None else sizes[members]
        # Where the middle of each lies in a line of all rows, the first left away.
        middle = np.cumsum(size, dtype=np.float64)
        validation, test = np.rint(middle[-1] * split.validation), np.rint(middle[-1] * split.test)
        middle -= size / 2 + size[0]
        first, last = np.maximum(1, np.searchsorted(middle, [validation, validation + test]))
        belongs[members[1:first]] = 1
        belongs[members[first:last]] = 2


def counts(labels: np.ndarray, most: int = 0) -> np.ndarray:
    """Rows by label; of `most` labels at least."""
    most = max(most, int(labels.max(initial=-1)) + 1)
    parts = (np.bincount(labels[at : at + _PART], minlength=most) for at in range(0, len(labels), _PART))
    return sum(parts, np.zeros(most, np.int64))
