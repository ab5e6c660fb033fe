"""Which sequences fill which window of a store, decided from tokens alone so that every process decides the same.

All windows but the last have a fixed number of rows, so that each process knows where its shards begin without
hearing of the others. The rows that the norm of the residual stream will mask are not known before the model runs:
a window gets some more sequences than it needs, and what is left over at its end is not used.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..models import SinkRule
from ..store import hashed, permutation
from ..text import TokenSequence


class Text(Protocol):
    """What a harvest asks of a corpus; `corpus.Corpus` is one."""

    @property
    def fingerprint(self) -> str: ...

    def sequences(self, split: str = "train", limit_tokens: int | None = None) -> Iterator[TokenSequence]:
        """The same sequences in the same order every time."""
        ...


class Sampling(NamedTuple):
    """Which positions of a sequence may become rows, as far as tokens tell."""

    rule: SinkRule
    fraction: float
    seed: int

    def masks(self, tokens: Tensor, number: int) -> dict[str, Tensor]:
        """Masks [T] by reason, disjoint, for the sequence of this number."""
        first, begins = self.rule.by_token(tokens)
        masks = {"first": first, "bos": begins}
        if self.fraction < 1:
            drawn = hashed(np.arange(len(tokens)), self.seed, 0x46524143, number) < np.uint64(self.fraction * 2**64)
            masks["left_out"] = ~torch.from_numpy(drawn) & ~first & ~begins
        return masks

    def candidates(self, tokens: Tensor, number: int) -> Tensor:
        """[T] positions that become rows unless they are sinks."""
        return ~torch.stack(list(self.masks(tokens, number).values())).any(0)


class PlannedWindow(NamedTuple):
    """One window: its sequences, with their numbers in the corpus, and the rows that are to come of them."""

    index: int
    rows: int
    """At most; exactly, in every window but the last."""
    last: bool
    candidates: int
    sequences: list[tuple[int, TokenSequence]]


def plan_windows(
    sequences: Iterable[TokenSequence], sampling: Sampling, rows: int, window_rows: int, margin: float
) -> Iterator[PlannedWindow]:
    """Windows of `window_rows` for a store of at most `rows`; the last also takes what is too little for a window."""
    count = max(1, rows // window_rows)
    waiting: PlannedWindow | None = None  # held back until it is known that the next one is not the corpus' short rest
    held: list[tuple[int, TokenSequence]] = []
    index = candidates = 0
    for number, sequence in enumerate(sequences):
        held.append((number, sequence))
        candidates += int(sampling.candidates(sequence.tokens, number).sum())
        last = index == count - 1
        wanted = rows - index * window_rows if last else window_rows
        if candidates >= wanted * (1 + margin):
            if waiting:
                yield waiting
            waiting = PlannedWindow(index, wanted, last, candidates, held)
            index, candidates, held = index + 1, 0, []
            if last:
                break
    if waiting and waiting.last:
        yield waiting
    elif waiting or held:
        # the corpus has ended: its rest joins the window before it
        before = waiting or PlannedWindow(0, 0, True, 0, [])
        total = before.candidates + candidates
        limit = min(total, rows - before.index * window_rows)
        yield PlannedWindow(before.index, limit, True, total, before.sequences + held)


def batches(
    sequences: list[tuple[int, TokenSequence]], budget: int, *key: int
) -> Iterator[list[tuple[int, TokenSequence]]]:
    """Groups of sequences of about equal length, of at most `budget` tokens with their padding, in random order.

    The order is random so that the rows which are left over when a window is full are no special ones.
    """
    groups: list[list[tuple[int, TokenSequence]]] = [[]]
    for number, sequence in sorted(sequences, key=lambda item: len(item[1].tokens)):
        if groups[-1] and (len(groups[-1]) + 1) * len(sequence.tokens) > budget:
            groups.append([])
        groups[-1].append((number, sequence))
    for place in permutation(len(groups), *key):
        yield groups[place]
