"""What a store hands out, and what it asks of whatever holds the rows: a disk, memory, or a ring that is refilled."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from .shuffle import EpochOrder, Span


class Statistics(NamedTuple):
    """Averages over all rows of a store, per site."""

    mean: dict[str, torch.Tensor]
    """[L, D] float32."""
    mean_square: dict[str, torch.Tensor]
    """[L] float32, E|x|^2."""
    rows: int

    def select(self, places: list[int]) -> "Statistics":
        """The same for some layers, by their place in the store."""
        return Statistics(
            {site: mean[places] for site, mean in self.mean.items()},
            {site: square[places] for site, square in self.mean_square.items()},
            self.rows,
        )


@dataclass
class Batch:
    """Some rows: activations [B, L, D] of each site, and where each row came from [B].

    In memory the activations lie layer by layer (`x[:, l]` is contiguous), as training reads them.
    """

    sites: dict[str, torch.Tensor]
    token: torch.Tensor
    position: torch.Tensor
    document: torch.Tensor

    def __len__(self) -> int:
        return len(self.token)

    @property
    def resid(self) -> torch.Tensor:
        return self.sites["resid"]

    @property
    def mlp_in(self) -> torch.Tensor:
        return self.sites["mlp_in"]

    @property
    def mlp_out(self) -> torch.Tensor:
        return self.sites["mlp_out"]

    @property
    def x(self) -> torch.Tensor:
        """What a transcoder reads: the first site that is not `mlp_out`."""
        return next(values for site, values in self.sites.items() if site != "mlp_out")

    @property
    def y(self) -> torch.Tensor:
        """What a transcoder writes."""
        return self.mlp_out

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None, non_blocking: bool = False) -> "Batch":
        """The same rows on a device; `dtype` concerns the activations alone and is changed there."""
        sites = {}
        for site, values in self.sites.items():
            sites[site] = values.to(device, non_blocking=non_blocking).to(dtype or values.dtype)
        rest = (t.to(device, non_blocking=non_blocking) for t in (self.token, self.position, self.document))
        return Batch(sites, *rest)


class Order(Protocol):
    """The rows of one epoch in order."""

    def spans(self, start: int, stop: int) -> list[Span]: ...


class RowSource(Protocol):
    """Where the rows are."""

    rows: int
    sites: tuple[str, ...]
    layers: tuple[int, ...]
    d_model: int
    dtype: torch.dtype
    attributes: dict[str, Any]
    statistics: Statistics

    def order(self, epoch: int) -> Order: ...

    def stored_order(self) -> Order: ...

    def read(self, spans: list[Span], sites: tuple[str, ...], places: list[int], pin: bool = False) -> Batch:
        """Rows in the order of the spans, for some layers by their place in `layers`."""
        ...

    def verify(self, progress: Any) -> None:
        """Read everything once and refuse what is damaged."""
        ...

    def close(self) -> None:
        """Stop what goes on behind the rows."""
        ...


class MemorySource:
    """Rows that are tensors [N, L, D] already: tests and small experiments."""

    def __init__(self, sites: dict[str, torch.Tensor], where: dict[str, torch.Tensor], layers: list[int], seed: int):
        first = next(iter(sites.values()))
        self.rows, _, self.d_model = first.shape
        self.sites, self.layers, self.dtype = tuple(sites), tuple(layers), first.dtype
        self.seed = seed
        self.attributes: dict[str, Any] = {}
        self.tensors, self.where = sites, where
        self.statistics = Statistics(
            {site: x.double().mean(0).float() for site, x in sites.items()},
            {site: x.double().square().sum(-1).mean(0).float() for site, x in sites.items()},
            self.rows,
        )

    def order(self, epoch: int) -> EpochOrder:
        return EpochOrder(self.rows, 1, self.seed, epoch)

    def stored_order(self) -> Order:
        return Straight(self.rows, 1)

    def read(self, spans: list[Span], sites: tuple[str, ...], places: list[int], pin: bool = False) -> Batch:
        rows = torch.tensor([span.block for span in spans], dtype=torch.long)
        every = places == list(range(len(self.layers)))
        picked = {}
        for site in sites:
            values = self.tensors[site]
            picked[site] = values[rows] if every else values[:, places][rows]
        return Batch(picked, *(self.where[name][rows] for name in ("token", "position", "document")))

    def verify(self, progress: Any) -> None:
        """Memory is not checked."""

    def close(self) -> None:
        """Nothing goes on behind them."""


class Straight:
    """Rows as they lie, block after block."""

    def __init__(self, rows: int, block_rows: int):
        self.rows, self.block_rows = rows, block_rows

    def spans(self, start: int, stop: int) -> list[Span]:
        found = []
        while start < stop:
            block, first = divmod(start, self.block_rows)
            last = min(self.block_rows, first + stop - start)
            found.append(Span(block, first, last))
            start += last - first
        return found
