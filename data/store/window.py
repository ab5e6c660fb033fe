"""Rows on their way into a store: gathered in a window of a million or more, in an order that mixes them.

A permutation of a window's rows (a function of the seed and the window's number) says which row goes where, so each is
put at its place when it comes. A window that memory has no room for lies in files of a scratch folder.
"""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..device import in_float64
from ..layout import CODECS, StoreLayout, permutation, quantise


class Moments:
    """Sums over rows, in float64, from which a store's statistics come."""

    def __init__(self, layout: StoreLayout):
        shape = len(layout.layers), layout.d_model
        self.total = {site: np.zeros(shape) for site in layout.sites}
        self.square = {site: np.zeros(shape[0]) for site in layout.sites}

    def add(self, site: str, x: Tensor) -> None:
        """Rows [B, L, D] of a site, summed where they lie, a layer at a time to spare memory."""
        totals, squares = [], []
        for layer in range(x.shape[1]):
            wide = in_float64(x[:, layer].detach())
            totals.append(wide.new_ones(len(wide)) @ wide)  # as products, in half the time of sums
            squares.append(torch.dot(wide.flatten(), wide.flatten()))
        self.total[site] += torch.stack(totals).cpu().numpy()
        self.square[site] += torch.stack(squares).cpu().numpy()

    def merge(self, other: "Moments") -> None:
        for site in self.total:
            self.total[site] += other.total[site]
            self.square[site] += other.square[site]


class Window:
    """The rows of one window while they arrive, at the places where they will lie."""

    def __init__(
        self,
        layout: StoreLayout,
        rows: int,
        seed: int,
        number: int,
        channel_scale: dict[str, Tensor] | None = None,
        scratch: Path | None = None,
    ):
        self.layout, self.rows = layout, rows
        self.channel_scale = channel_scale or {}
        self.codec = CODECS[layout.dtype]
        self.moments = Moments(layout)
        self.counts: dict[str, int] = {}
        self.filled = 0
        self.scratch = scratch
        self.places = np.empty(rows, np.int64)
        self.places[permutation(rows, seed, 0x57494E44, number)] = np.arange(rows)
        whole = layout.shards(rows) * layout.shard_rows
        self.arrays = {name: self._room(name, spec.shape(whole), spec.dtype) for name, spec in layout.arrays.items()}

    def _room(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        if self.scratch is None:
            return np.empty(shape, dtype)
        self.scratch.mkdir(parents=True, exist_ok=True)
        with open(self.scratch / name, "wb") as out:
            size = int(np.prod(shape)) * dtype.itemsize
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(out.fileno(), 0, size)  # a full disk is found now, and not by a broken mapping
            else:
                os.ftruncate(out.fileno(), size)
        return np.memmap(self.scratch / name, dtype, "r+", shape=shape)

    def append(
        self, sites: dict[str, Tensor], columns: dict[str, Tensor], counts: dict[str, int] | None = None
    ) -> None:
        """Take rows [B, L, D] of every site, as many as there is room for; `counts` says what was left out."""
        count = min(len(columns["token"]), self.rows - self.filled)
        places = self.places[self.filled : self.filled + count]
        for site in self.layout.sites:
            x = sites[site][:count]
            self.moments.add(site, x)
            if self.layout.dtype == "int8":
                self.arrays[site][places], self.arrays[f"{site}_scale"][places] = quantise(x, self.channel_scale[site])
            else:
                self.arrays[site][places] = self.codec.to_stored(x)
        for name, values in columns.items():
            self.arrays[name][places] = values[:count].cpu().numpy()
        for reason, number in (counts or {}).items():
            self.counts[reason] = self.counts.get(reason, 0) + number
        self.filled += count

    def close(self, wanted: int | None = None) -> None:
        """No more rows will come: those that did close ranks, in the order that they have. Up to `wanted` rows, the
        first ones come once more."""
        taken = np.sort(self.places[: self.filled])
        wanted = max(self.filled, wanted or 0)
        for name, values in self.arrays.items():
            if self.filled < self.rows:
                step = self.layout.block_rows
                for start in range(0, self.filled, step):
                    # never from a place that has been written already: a row only moves towards the beginning
                    part = taken[start : start + step]
                    values[start : start + len(part)] = values[part]
            for row in range(self.filled, wanted, max(1, self.filled)):
                count = min(self.filled, wanted - row)
                values[row : row + count] = values[:count]
            values[wanted:] = self.layout.arrays[name].fill

    def record(self, start: int) -> bytes:
        """What the store has to remember of this window, which begins at row `start`."""
        return pack_record({"start": start, "rows": self.filled, "counts": self.counts}, self.moments)

    def drop(self) -> None:
        """Forget the rows."""
        self.arrays = {}
        if self.scratch is not None:
            for path in self.scratch.iterdir():
                path.unlink()
            self.scratch.rmdir()


def pack_record(facts: dict[str, Any], moments: Moments) -> bytes:
    out = io.BytesIO()
    arrays: dict[str, Any] = {"facts": np.array(json.dumps(facts))}
    arrays |= {f"{site}.total": values for site, values in moments.total.items()}
    arrays |= {f"{site}.square": values for site, values in moments.square.items()}
    np.savez(out, **arrays)
    return out.getvalue()


def read_record(layout: StoreLayout, data: bytes) -> tuple[dict[str, Any], Moments]:
    """The facts and the moments of a window's record."""
    moments = Moments(layout)
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        for site in layout.sites:
            moments.total[site], moments.square[site] = arrays[f"{site}.total"], arrays[f"{site}.square"]
        return json.loads(str(arrays["facts"])), moments
