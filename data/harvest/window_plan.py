"""Which sequences fill which window of a store, decided from tokens alone so that every process decides the same.

All windows but the last have a fixed number of rows, so that each process knows where its shards begin without
hearing of the others. The rows that the norm of the residual stream will mask are not known before the model runs:
a window gets some more sequences than it needs, and what is left over at its end is not used. One that has more sinks
than that is shorter.
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
    def name(self) -> str: ...

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
    """At most: fewer where more rows are sinks than was foreseen."""
    candidates: int
    sequences: list[tuple[int, TokenSequence]]


def plan_windows(
    sequences: Iterable[TokenSequence], sampling: Sampling, sizes: list[list[int]], margin: float
) -> Iterator[PlannedWindow]:
    """Windows of the wanted `sizes`, a list for each time that the store was to grow. A corpus that ends before gives
    fewer; what is left of it joins the window before, if that one was asked for at the same time."""
    waiting: PlannedWindow | None = None  # held back until it is known that the next one is not the corpus' short rest
    held: list[tuple[int, TokenSequence]] = []
    numbered = enumerate(sequences)
    index = candidates = 0
    for stage in sizes:
        for place, wanted in enumerate(stage):
            for number, sequence in numbered:
                held.append((number, sequence))
                candidates += int(sampling.candidates(sequence.tokens, number).sum())
                if candidates >= wanted * (1 + margin):
                    break
            else:  # the corpus has ended
                rest = sum(stage[place:])
                if waiting:
                    total = waiting.candidates + candidates
                    limit = min(total, waiting.rows + rest)
                    yield PlannedWindow(waiting.index, limit, total, waiting.sequences + held)
                elif held:
                    yield PlannedWindow(index, min(candidates, rest), candidates, held)
                return
            if waiting:
                yield waiting
            waiting = PlannedWindow(index, wanted, candidates, held)
            index, candidates, held = index + 1, 0, []
        if waiting:
            yield waiting
        waiting = None


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
