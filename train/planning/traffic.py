"""What the ranks of a mesh exchange in a step, in bytes, and which of the two exchanges between feature ranks is less.

Of each collective two numbers matter: what a rank *hands in*, which `MeshCollectives` counts, and what *leaves* the
rank when the collective goes round a ring of m, which is what takes time:

    all-reduce of S         hands in S      moves 2 S (m - 1) / m
    all-gather of s each    hands in s      moves s (m - 1)
    reduce-scatter of S     hands in S      moves S (m - 1) / m
"""

from typing import NamedTuple

from ..parallel import ParallelSettings

FLOAT = COUNT = 4


class Flow(NamedTuple):
    """One collective's bytes in a step."""

    handed: float
    """What a rank hands in."""
    moved: float
    """What leaves a rank, in a ring."""


class Work(NamedTuple):
    """A step of one rank, in numbers."""

    sizes: list[int]
    """Features of each layer, all ranks' together."""
    d_model: int
    rows: int
    """Tokens of this data rank, of all pieces."""
    pieces: int
    """Micro-batches."""
    active: float
    """Features active for a token and layer."""
    auxiliary: float
    """Entries of the auxiliary loss for a token and layer; 0 without it."""
    sparse: bool
    norms: bool
    """Whether decoder norms are needed: the penalties take them."""
    activation: str
    """topk and batchtopk choose thresholds over ranks."""

    @property
    def layers(self) -> int:
        return len(self.sizes)


def all_reduce(size: float, ranks: int) -> Flow:
    return Flow(size, 2 * size * (ranks - 1) / ranks)


def all_gather(own: float, ranks: int) -> Flow:
    return Flow(own, own * (ranks - 1))


def reduce_scatter(size: float, ranks: int) -> Flow:
    return Flow(size, size * (ranks - 1) / ranks)


def exchanged(work: Work, exchange: str, ranks: int) -> dict[str, Flow]:
    """Between `ranks` feature ranks."""
    if ranks == 1:
        return {}
    written = work.rows * work.layers * work.d_model * FLOAT * (2 if work.auxiliary else 1)
    if exchange == "reconstructions":
        return {"reconstructions": all_reduce(written, ranks)}
    if work.sparse:
        entries = work.rows * work.layers * (work.active + work.auxiliary)
        listed = place_bytes(work, ranks) + FLOAT
    else:
        entries = work.rows * sum(work.sizes) * (2 if work.auxiliary else 1)
        listed = FLOAT
    flows = {
        "actives": all_gather(entries / ranks * listed, ranks),
        "active_gradients": reduce_scatter(entries * FLOAT, ranks),
    }
    if work.norms:
        squares = sum(work.sizes) * FLOAT
        back, there = all_gather(squares / ranks, ranks), reduce_scatter(squares, ranks)
        flows["actives"] = Flow(*(a + b for a, b in zip(flows["actives"], back, strict=True)))
        flows["active_gradients"] = Flow(*(a + b for a, b in zip(flows["active_gradients"], there, strict=True)))
    return flows


def place_bytes(work: Work, ranks: int) -> int:
    """Of the number that says which token and feature an entry is of."""
    rows = work.rows // work.pieces * (2 if work.auxiliary else 1)
    return 4 if rows * max(work.sizes) // ranks < 2**31 else 8


def moved(work: Work, exchange: str, ranks: int) -> float:
    """Bytes that leave a rank for the other feature ranks."""
    return sum(flow.moved for flow in exchanged(work, exchange, ranks).values())


def all_flows(work: Work, parallel: ParallelSettings, rank_parameters: int, itemsize: float) -> dict[str, Flow]:
    """Everything that a rank exchanges in a step; numbers of a batch have `itemsize` bytes."""
    flows = exchanged(work, parallel.exchange, parallel.features)
    if parallel.features > 1:  # each has read its part of the rows
        batch = 2 * work.rows * work.layers * work.d_model * itemsize
        flows["rows"] = all_gather(batch / parallel.features, parallel.features)
    if work.activation == "batchtopk" and parallel.processes > 1:
        flows["thresholds"] = all_reduce(work.layers * 4 * 256 * COUNT, parallel.processes)
    by_token = (work.activation == "topk") + bool(work.auxiliary)
    if by_token and parallel.features > 1:
        flows["token_thresholds"] = all_reduce(by_token * work.rows * work.layers * 8 * 16 * COUNT, parallel.features)
    if parallel.data > 1:
        flows["gradients"] = all_reduce(rank_parameters * FLOAT, parallel.data)
    return flows
