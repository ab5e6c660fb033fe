"""The order in which rows come: permutations that are pure functions of a key, the same on every machine for ever.

Two shuffles meet in a store. Before rows are written they are permuted across a window of a million rows or more;
when they are read, whole blocks of rows are visited in an order of the epoch's own. Both come from `permutation`,
which sorts hashed counters: unlike the generators of numpy or torch, its result cannot change with a version.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Span(NamedTuple):
    """Rows `start:stop` of one block."""

    block: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def hashed(values: np.ndarray, *key: int) -> np.ndarray:
    """A 64-bit hash of each value under a key of whole numbers (the finaliser of splitmix64)."""
    with np.errstate(over="ignore"):
        state = np.uint64(0)
        for part in key:
            state = _finalise(np.asarray(state + np.uint64(part % 2**64) + _GOLDEN))
        return _finalise(state + (values.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def _finalise(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of 0..n-1 that depends on nothing but n and the key."""
    return np.argsort(hashed(np.arange(n), *key), kind="stable")


class Order:
    """Rows block after block: `blocks` says which, `lengths` how many rows each of them has."""

    def __init__(self, blocks: np.ndarray, lengths: np.ndarray):
        self.blocks, self.ends = blocks, np.cumsum(lengths)

    def spans(self, start: int, stop: int) -> list[Span]:
        """The rows at places `start:stop`."""
        found = []
        place = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            end = int(self.ends[place])
            begin = int(self.ends[place - 1]) if place else 0
            take = min(stop, end)
            found.append(Span(int(self.blocks[place]), start - begin, take - begin))
            start, place = take, place + 1
        return found


class Blocks(NamedTuple):
    """The blocks of some rows as they lie, the last one of each window perhaps short."""

    ids: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, windows: Iterable[tuple[int, int]], block_rows: int) -> "Blocks":
        """Of windows (first row, rows); each begins at a block of its own."""
        ids, lengths = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for start, rows in windows:
            count = -(-rows // block_rows)
            ids.append(start // block_rows + np.arange(count))
            lengths.append(np.minimum(block_rows, rows - np.arange(count) * block_rows))
        return cls(np.concatenate(ids), np.concatenate(lengths))

    def in_order(self) -> Order:
        return Order(*self)

    def shuffled(self, *key: int) -> Order:
        picked = permutation(len(self.ids), *key)
        return Order(self.ids[picked], self.lengths[picked])
