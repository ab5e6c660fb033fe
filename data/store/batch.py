"""What a store hands out, and what it asks of whatever holds the rows: a disk, memory, or a ring that is refilled."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..layout import Blocks, Int8Rows, Order, Span


class Statistics(NamedTuple):
    """Averages over all rows of a store, per site."""

    mean: dict[str, Tensor]
    """[L, D] float32."""
    mean_square: dict[str, Tensor]
    """[L] float32, E|x|^2."""
    rows: int

    def select(self, places: list[int]) -> "Statistics":
        """The same for some layers, by their place in the store."""
        return Statistics(
            {site: mean[places] for site, mean in self.mean.items()},
            {site: square[places] for site, square in self.mean_square.items()},
            self.rows,
        )


class Batch:
    """Some rows: activations [B, L, D] of each site, and, read when asked for, where each row came from [B].

    In memory the activations lie layer by layer (`x[:, l]` is contiguous), as training reads them. As a source hands
    them out they may still be int8; `to` makes them numbers, on the device.
    """

    def __init__(self, sites: dict[str, Any], column: Callable[[str], Tensor]):
        self.sites: dict[str, Tensor] = sites
        self._column, self._columns = column, {}

    def __len__(self) -> int:
        first: Any = next(iter(self.sites.values()))
        return len(first.values if isinstance(first, Int8Rows) else first)

    def column(self, name: str) -> Tensor:
        """`token`, `position` or `document` of each row, on the CPU."""
        if name not in self._columns:
            self._columns[name] = self._column(name)
        return self._columns[name]

    @property
    def token(self) -> Tensor:
        return self.column("token")

    @property
    def position(self) -> Tensor:
        return self.column("position")

    @property
    def document(self) -> Tensor:
        return self.column("document")

    @property
    def resid(self) -> Tensor:
        return self.sites["resid"]

    @property
    def mlp_in(self) -> Tensor:
        return self.sites["mlp_in"]

    @property
    def mlp_out(self) -> Tensor:
        return self.sites["mlp_out"]

    @property
    def x(self) -> Tensor:
        """What a transcoder reads: the first site that is not `mlp_out`."""
        return next(values for site, values in self.sites.items() if site != "mlp_out")

    @property
    def y(self) -> Tensor:
        """What a transcoder writes."""
        return self.mlp_out

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None, non_blocking: bool = False) -> "Batch":
        """The same activations on a device; `dtype` is changed there."""
        sites = {}
        for site, values in self.sites.items():
            if isinstance(values, Int8Rows):
                sites[site] = values.to(device, dtype, non_blocking)
            else:
                sites[site] = values.to(device, non_blocking=non_blocking).to(dtype or values.dtype)
        return Batch(sites, self.column)


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
        """Rows in the order of the spans, for some layers by their place in `layers`; int8 as it is stored."""
        ...

    def verify(self, progress: Any) -> None:
        """Read everything once and refuse what is damaged."""
        ...

    def close(self) -> None:
        """Stop what goes on behind the rows."""
        ...


class MemorySource:
    """Rows that are tensors [N, L, D] already: tests and small experiments."""

    def __init__(self, sites: dict[str, Tensor], where: dict[str, Tensor], layers: list[int], seed: int):
        first = next(iter(sites.values()))
        self.rows, _, self.d_model = first.shape
        self.sites, self.layers, self.dtype = tuple(sites), tuple(layers), first.dtype
        self.seed = seed
        self.attributes: dict[str, Any] = {}
        self.tensors, self.where = sites, where
        self.blocks = Blocks(np.arange(self.rows), np.ones(self.rows, np.int64))
        self.statistics = Statistics(
            {site: x.double().mean(0).float() for site, x in sites.items()},
            {site: x.double().square().sum(-1).mean(0).float() for site, x in sites.items()},
            self.rows,
        )

    def order(self, epoch: int) -> Order:
        return self.blocks.shuffled(self.seed, epoch)

    def stored_order(self) -> Order:
        return self.blocks.in_order()

    def read(self, spans: list[Span], sites: tuple[str, ...], places: list[int], pin: bool = False) -> Batch:
        rows = torch.tensor([span.block for span in spans], dtype=torch.long)
        every = places == list(range(len(self.layers)))
        picked = {}
        for site in sites:
            values = self.tensors[site]
            picked[site] = values[rows] if every else values[:, places][rows]
        return Batch(picked, lambda name: self.where[name][rows])

    def verify(self, progress: Any) -> None:
        """Memory is not checked."""

    def close(self) -> None:
        """Nothing goes on behind them."""
