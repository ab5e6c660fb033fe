"""The order in which rows come: permutations that are pure functions of a key, the same on every machine for ever.

Two shuffles meet in a store. Before rows are written they are permuted across a window of a million rows or more;
when they are read, whole blocks of rows are visited in an order of the epoch's own. Both come from `permutation`,
which sorts hashed counters: unlike the generators of numpy or torch, its result cannot change with a version.
"""

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


class EpochOrder:
    """All rows of a store in the order of one epoch: blocks permuted, rows of a block together."""

    def __init__(self, rows: int, block_rows: int, *key: int):
        blocks = -(-rows // block_rows)
        self.blocks = permutation(blocks, *key)
        lengths = np.full(blocks, block_rows, dtype=np.int64)
        if blocks:
            # the store's last block may be short, wherever it falls in this epoch
            lengths[self.blocks == blocks - 1] = rows - (blocks - 1) * block_rows
        self.ends = np.cumsum(lengths)
        self.rows = rows

    def spans(self, start: int, stop: int) -> list[Span]:
        """The rows at places `start:stop` of the epoch."""
        found = []
        place = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            end = int(self.ends[place])
            begin = int(self.ends[place - 1]) if place else 0
            take = min(stop, end)
            found.append(Span(int(self.blocks[place]), start - begin, take - begin))
            start, place = take, place + 1
        return found
