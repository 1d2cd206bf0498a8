"""A number of 64 bits for each text of a column, the same for identical ones. Made from the column's bytes, eight at a
time and without a Python object for any text, so that threads can do it beside each other.
"""

import numpy as np

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def fingerprints(data: np.ndarray, ends: np.ndarray, secret: int) -> np.ndarray:
    """`ends`: where in the data each text ends, after where the first begins. The secret, another one each time, keeps
    files from being written in which two texts get one number; by chance that happens once in some 100,000 files of ten
    million rows."""
    starts, lengths = ends[:-1].astype(np.int64), np.diff(ends).astype(np.int64)
    # One word more than the whole ones: it holds what is left of the text, if only nothing.
    words = lengths // 8 + 1
    last = np.cumsum(words) - 1
    first = last - words + 1
    place = np.arange(int(words.sum())) - np.repeat(first, words)
    padded = np.concatenate([data, np.zeros(8, np.uint8)])
    windows = np.lib.stride_tricks.as_strided(padded, (len(data) + 1, 8), (1, 1))
    found = windows[np.repeat(starts, words) + 8 * place].view(np.uint64)[:, 0]
    found[last] &= (np.uint64(1) << (lengths % 8 * 8).astype(np.uint64)) - np.uint64(1)
    # Each word is mixed with its place, and only then summed: words that trade places would have the same sum.
    mixed = _mixed(found ^ (np.uint64(secret) + place.astype(np.uint64) * _STEP))
    return _mixed(np.add.reduceat(mixed, first) + lengths.astype(np.uint64)).view(np.int64)


def _mixed(words: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: every bit of the outcome hangs on every bit of the word."""
    words = (words ^ (words >> np.uint64(30))) * _FIRST
    words = (words ^ (words >> np.uint64(27))) * _SECOND
    return words ^ (words >> np.uint64(31))
