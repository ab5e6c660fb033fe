"""The store of activations as training sees it: rows, batches that are functions of (seed, epoch, step), statistics.

    writing: rows [N, L, D] by site -> a window of a million, shuffled (`window.py`) -> shards (`writer.py`)
    reading: (epoch, step) -> spans of blocks (`shuffle.py`) -> shards (`reader.py`) -> Batch, sites [B, L, D]

A store is a Zarr v3 group (`layout.py` has its bytes). The same interface stands before rows in memory and before the
ring of `harvest/streaming.py`.

Batches. The rows of an epoch come block by block in an order that is the epoch's own; batch `step` is rows
`step * size` to `(step + 1) * size` of that order, and rank r of W takes the r-th of W parts of it. So each row comes
once an epoch, any step can be had at once, and the union over ranks does not depend on W. Where the rows are no
multiple of the batch, the rest of an epoch is one short batch, `batch(epoch, steps_per_epoch(size), size)`; a `loader`
leaves it out, so that each training step has a full batch, and other rows are in it every epoch.
"""

from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Any

import torch

from ..errors import Progress, UserError, silent
from ..layout import Place, read_json
from .batch import Batch, MemorySource, RowSource, Statistics
from .disk import DiskSource, JoinedSource
from .loader import Loader

__all__ = ["ActivationStore", "Batch", "Loader", "Statistics", "in_memory_store"]


class ActivationStore:
    """Rows of activations: `len`, shapes, statistics, batches."""

    def __init__(self, source: RowSource, layers: Sequence[int] | None = None, sites: Sequence[str] | None = None):
        self.source = source
        self.layers = list(source.layers if layers is None else layers)
        self.sites = tuple(source.sites if sites is None else sites)
        missing = [site for site in self.sites if site not in source.sites]
        if missing:
            raise UserError(f"the store holds {', '.join(source.sites)} and not {missing[0]}: cache it with that site")
        self._places = self._find(self.layers)

    @classmethod
    def open(
        cls,
        path: str | PathLike | Sequence[str | PathLike],
        split: str = "train",
        layers: Sequence[int] | None = None,
        sites: Sequence[str] | None = None,
    ) -> "ActivationStore":
        """A store in a folder or at an fsspec URL, if it is whole; `split` is `train` or `held_out`. Several stores of
        one model, a list of them or `a + b`, are read as one."""
        paths = str(path).split(" + ") if isinstance(path, str | PathLike) else list(path)
        parts = [DiskSource(part, split) for part in paths]
        return cls(parts[0] if len(parts) == 1 else JoinedSource(parts), layers, sites)

    def select(self, layers: Sequence[int], sites: Sequence[str]) -> "ActivationStore":
        """The same rows, of some layers and sites."""
        return ActivationStore(self.source, layers, sites)

    def __len__(self) -> int:
        return self.source.rows

    def __repr__(self) -> str:
        return (
            f"ActivationStore({len(self)} rows x {self.n_layers} layers x {self.d_model}, {self.dtype}, {self.sites})"
        )

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def d_model(self) -> int:
        return self.source.d_model

    @property
    def dtype(self) -> torch.dtype:
        """What batches come in."""
        return self.source.dtype

    @property
    def attributes(self) -> dict[str, Any]:
        """Where the rows came from: model, tokenizer, dataset, seed, what was masked and why."""
        return self.source.attributes

    @property
    def statistics(self) -> Statistics:
        """Mean and mean square of each site over all rows, for this store's layers."""
        return self.source.statistics.select(self._places)

    def check_model(self, fingerprint: str, name: str = "") -> None:
        """Refuse a store of another model than the one with these weights."""
        held = self.attributes.get("model", {})
        if held.get("fingerprint") not in (None, fingerprint):
            raise UserError(
                f"the store holds activations of {held.get('name')} (weights {held['fingerprint'][:12]}) and not of "
                f"{name or 'this model'} (weights {fingerprint[:12]}): cache this model's or load that one"
            )

    def steps_per_epoch(self, size: int) -> int:
        """Full batches in an epoch."""
        steps = len(self) // size
        if not steps:
            raise UserError(
                f"a batch of {size} rows is more than the {len(self)} rows of the store: lower trainer.batch"
            )
        return steps

    def batch(
        self,
        epoch: int,
        step: int,
        size: int,
        layers: Sequence[int] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> Batch:
        """Rank's part of one batch; `layers` are the model's numbers."""
        return self._batch(epoch, step, size, layers, rank, world, False).to("cpu")

    def _batch(
        self, epoch: int, step: int, size: int, layers: Sequence[int] | None, rank: int, world: int, pin: bool
    ) -> Batch:
        """The same as it is stored, perhaps int8."""
        start, stop = step * size, min((step + 1) * size, len(self))
        if not 0 <= start < stop:
            raise UserError(f"step {step} of {size} rows is outside an epoch of {len(self)} rows")
        n = stop - start
        spans = self.source.order(epoch).spans(start + rank * n // world, start + (rank + 1) * n // world)
        return self.source.read(spans, self.sites, self._find(layers), pin)

    def loader(
        self,
        size: int,
        start_step: int = 0,
        steps: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        layers: Sequence[int] | None = None,
        rank: int = 0,
        world: int = 1,
        prefetch: int = 3,
    ) -> Loader:
        """Batches of steps `start_step, ...` over endless epochs (or `steps` of them), read ahead in threads."""
        per_epoch = self.steps_per_epoch(size)
        pin = torch.device(device).type == "cuda"

        def fetch(step: int) -> Batch:
            epoch, within = divmod(step, per_epoch)
            return self._batch(epoch, within, size, layers, rank, world, pin)

        return Loader(fetch, start_step, steps, prefetch, torch.device(device), dtype)

    def rows_in_order(self, size: int, layers: Sequence[int] | None = None) -> Iterator[Batch]:
        """All rows once as they lie, `size` at a time, the last batch short: for evaluation."""
        order = self.source.stored_order()
        for start in range(0, len(self), size):
            spans = order.spans(start, min(start + size, len(self)))
            yield self.source.read(spans, self.sites, self._find(layers)).to("cpu")

    def verify(self, progress: Progress = silent) -> None:
        """Read all of the store and refuse it, naming shard and rows, if a byte is not what was written."""
        self.source.verify(progress)

    def close(self) -> None:
        """Stop the harvest behind a streaming store; other stores need no closing."""
        self.source.close()

    def _find(self, layers: Sequence[int] | None) -> list[int]:
        if layers is None:
            return self._places
        held = list(self.source.layers)
        missing = [layer for layer in layers if layer not in held]
        if missing:
            raise UserError(f"the store has no layer {missing[0]}; it holds {', '.join(map(str, held))}")
        return [held.index(layer) for layer in layers]


def in_memory_store(
    resid: torch.Tensor,
    mlp_out: torch.Tensor,
    token: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    document: torch.Tensor | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    read: str = "resid",
    attributes: dict[str, Any] | None = None,
) -> ActivationStore:
    """A store of tensors [N, L, D]; `read` names the site that the first of them is."""
    n, n_layers, _ = resid.shape
    where = {
        "token": torch.zeros(n, dtype=torch.int32) if token is None else token,
        "position": torch.arange(n, dtype=torch.int32) if position is None else position,
        "document": torch.zeros(n, dtype=torch.int64) if document is None else document,
    }
    source = MemorySource({read: resid, "mlp_out": mlp_out}, where, list(layers or range(n_layers)), seed)
    source.attributes = {"sites": [read, "mlp_out"], "layers": list(source.layers), "seed": seed, **(attributes or {})}
    return ActivationStore(source)


def is_complete(path: str | PathLike) -> bool:
    """Whether a store is there and whole."""
    held = read_json(Place(path), "zarr.json")
    return bool(held and held["attributes"].get("complete"))
