"""Rows on their way into a store: gathered in a window of a million or more, shuffled, written shard by shard.

A permutation of a window's rows (a function of the seed and the window's number) says which row goes where. Where two
windows fit into memory, each row is put at once at its place in an image of the shards, and a full window has but to
be written. Else rows wait in files beside the shards, as they arrived, with a journal, so that a window that was cut
off goes on, and are gathered when it is full.
"""

import io
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ..device import in_float64
from . import kernels
from .codecs import CODECS, quantise
from .files import Files, room, write_parts
from .image import Image, Rows
from .layout import ArraySpec, StoreLayout
from .outfile import OutFile
from .shuffle import permutation

JOURNAL_SECONDS = 20.0
_GATHER_BYTES = 2 << 20


class Moments:
    """Sums over rows, in float64, from which a store's statistics come."""

    def __init__(self, layout: StoreLayout):
        shape = len(layout.layers), layout.d_model
        self.total = {site: np.zeros(shape) for site in layout.sites}
        self.square = {site: np.zeros(shape[0]) for site in layout.sites}

    def add(self, site: str, x: torch.Tensor) -> None:
        """Rows [B, L, D] of a site, summed where they lie, a layer at a time to spare memory."""
        totals, squares = [], []
        for layer in range(x.shape[1]):
            wide = in_float64(x[:, layer].detach())
            totals.append(wide.sum(0))
            squares.append(wide.square_().sum())
        self.total[site] += torch.stack(totals).cpu().numpy()
        self.square[site] += torch.stack(squares).cpu().numpy()

    def merge(self, other: "Moments") -> None:
        for site in self.total:
            self.total[site] += other.total[site]
            self.square[site] += other.square[site]

    def to_arrays(self) -> dict[str, np.ndarray]:
        total = {f"{site}.total": values for site, values in self.total.items()}
        return total | {f"{site}.square": values for site, values in self.square.items()}

    @classmethod
    def from_arrays(cls, layout: StoreLayout, arrays: dict[str, np.ndarray]) -> "Moments":
        moments = cls(layout)
        for site in layout.sites:
            moments.total[site], moments.square[site] = arrays[f"{site}.total"], arrays[f"{site}.square"]
        return moments


class Window:
    """The rows of one window while they arrive, in memory at the places where they will lie.

    `batches` counts the appends that are safe, for who goes on later.
    """

    def __init__(
        self,
        layout: StoreLayout,
        rows: int,
        order: np.ndarray,
        channel_scale: dict[str, torch.Tensor] | None = None,
        spare: dict[str, np.ndarray] | None = None,
    ):
        self.layout, self.rows, self.order = layout, rows, order
        self.channel_scale = channel_scale or {}
        self.codec = CODECS[layout.dtype]
        self.moments = Moments(layout)
        self.counts: dict[str, int] = {}
        self.filled = self.batches = 0
        self._open(spare or {})

    def _open(self, spare: dict[str, np.ndarray]) -> None:
        arrays = self.layout.arrays
        self._images = {name: Image(self.layout, arrays[name], self.rows, spare.get(name)) for name in arrays}
        self._places = np.empty(self.rows, np.int64)
        self._places[self.order] = np.arange(self.rows)

    def append(
        self,
        sites: Mapping[str, torch.Tensor | Rows],
        token: torch.Tensor,
        position: torch.Tensor,
        document: torch.Tensor,
        counts: dict[str, int] | None = None,
    ) -> None:
        """Take rows [B, L, D] of every site, as many as there is room for; `counts` says what was left out."""
        room = min(len(token), self.rows - self.filled)
        for site in self.layout.sites:
            self._take(site, Rows.of(sites[site]).first(room))
        for name, values in zip(("token", "position", "document"), (token, position, document)):
            self._put(name, values[:room].cpu().numpy().astype(self.layout.arrays[name].dtype)[:, None])
        for reason, count in (counts or {}).items():
            self.counts[reason] = self.counts.get(reason, 0) + count
        self.filled += room
        self.batches += 1

    def _take(self, site: str, rows: Rows) -> None:
        """Rows of a site, summed, converted and put."""
        if self.layout.dtype != "int8" and kernels.puts(rows.layers[0], self.codec.read):
            sums = self.moments.total[site], self.moments.square[site]
            self.codec.check_range(self._convert(site, rows, *sums))
            return
        x = rows.stacked()
        self.moments.add(site, x)
        if self.layout.dtype == "int8":
            values, scale = quantise(x, self.channel_scale[site])
            self._put(f"{site}_scale", scale.reshape(len(x), -1))
        else:
            values = self.codec.to_stored(x)
        self._put(site, values.reshape(len(x), -1))

    def _new_places(self, count: int) -> np.ndarray:
        return self._places[self.filled : self.filled + count]

    def _convert(self, site: str, rows: Rows, total: np.ndarray, square: np.ndarray) -> float:
        """Rows of a site by the kernel that sums and converts as well; the largest of what was narrowed."""
        places, picked = self._new_places(len(rows)), rows.picked_array()
        image, blocks = self._images[site].chunks, self.layout.block_rows
        return kernels.put_rows(rows.layers, picked, image, places, blocks, self.codec.read, total, square)

    def _put(self, name: str, values: np.ndarray) -> None:
        """Rows [B, layers * width] of an array as they are stored."""
        self._images[name].put(values, self._new_places(len(values)))

    def close(self) -> None:
        """No more rows will come: those that did close ranks, in the order that they have."""
        if self.filled < self.rows:
            places = np.flatnonzero(self.order < self.filled)
            for image in self._images.values():
                image.close_up(places)
        for image in self._images.values():
            image.clear(self.filled)

    def write_shard(self, files: Files, key: str, name: str, shard: int, sync: bool) -> None:
        """Write one of the window's own shards of an array, when the window is closed."""
        spec, first = self.layout.arrays[name], shard * self.layout.blocks_per_shard
        blocks = self.layout.blocks_in(shard, self.filled)
        with files.writing(key, sync, self.layout.shard_bytes(spec, blocks)) as out:
            self._write(out, spec, first, blocks)
            write_parts(out, [np.frombuffer(self.layout.index(spec, blocks), np.uint8)])

    def _write(self, out: IO[bytes] | OutFile, spec: ArraySpec, first: int, blocks: int) -> None:
        self._images[spec.name].write(out, first, blocks)

    def record(self) -> bytes:
        """What the store has to remember of this window."""
        return _pack({"filled": self.filled, "batches": self.batches, "counts": self.counts}, self.moments)

    def drop(self) -> dict[str, np.ndarray] | None:
        """Forget the rows; what comes back is memory for another window."""
        images, self._images = self._images, {}
        return {name: image.memory for name, image in images.items()}


class SpilledWindow(Window):
    """A window whose rows lie, as they arrived, in files of a local folder, and which goes on from its journal."""

    def __init__(
        self, layout: StoreLayout, rows: int, order: np.ndarray, channel_scale: dict | None, files: Files, name: str
    ):
        self._files, self._journal, self._name = files, f"{name}.journal", name
        self._folder = Path(files.root, name)
        self._open_files: dict[str, int] = {}
        super().__init__(layout, rows, order, channel_scale)
        journal = files.read(self._journal)
        if journal is not None:
            facts, self.moments = read_record(layout, journal)
            self.filled, self.batches, self.counts = facts["filled"], facts["batches"], facts["counts"]
        self._saved = time.monotonic()

    def _open(self, spare: dict[str, np.ndarray]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._open_files = {n: os.open(self._folder / n, os.O_RDWR | os.O_CREAT) for n in self.layout.arrays}

    def append(self, *args: Any, **kwargs: Any) -> None:
        with room(self._files):
            super().append(*args, **kwargs)
            self._note()

    def _note(self) -> None:
        """Now and then, put down in the journal what is safe."""
        if time.monotonic() - self._saved >= JOURNAL_SECONDS:
            # the rows first: a journal never speaks of rows that a power cut could take
            for descriptor in self._open_files.values():
                os.fsync(descriptor)
            with self._files.writing(self._journal) as out:
                out.write(self.record())
            self._saved = time.monotonic()

    def _convert(self, site: str, rows: Rows, total: np.ndarray, square: np.ndarray) -> float:
        spec = self.layout.arrays[site]
        # as an image whose blocks have one row
        image = np.empty((len(rows), spec.layers, spec.run_bytes), np.uint8)
        places = np.arange(len(rows))
        largest = kernels.put_rows(rows.layers, rows.picked_array(), image, places, 1, self.codec.read, total, square)
        self._put(site, image.reshape(len(rows), -1))
        return largest

    def _put(self, name: str, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values).data.cast("B")
        place = self.filled * self.layout.arrays[name].row_bytes
        while data:
            done = os.pwrite(self._open_files[name], data, place)
            data, place = data[done:], place + done

    def close(self) -> None:
        self.order = self.order[self.order < self.filled]

    def _write(self, out: IO[bytes] | OutFile, spec: ArraySpec, first: int, blocks: int) -> None:
        if not blocks:
            return
        rows = np.memmap(self._folder / spec.name, spec.dtype, "r", shape=(self.filled, spec.layers * spec.width))
        step = self.layout.block_rows
        at_once = max(1, _GATHER_BYTES // (step * spec.row_bytes))
        image = Image(self.layout, spec, at_once * step)
        for block in range(first, first + blocks, at_once):
            count = min(at_once, first + blocks - block)
            picked = self.order[block * step : (block + count) * step]
            image.gather(rows, picked, np.arange(len(picked)))
            image.clear(len(picked))
            image.write(out, 0, count)

    def drop(self) -> None:
        for descriptor in self._open_files.values():
            os.close(descriptor)
        self._open_files = {}
        self._files.remove(self._journal)
        self._files.remove(self._name)

    def __del__(self):
        for descriptor in self._open_files.values():
            os.close(descriptor)


def _pack(facts: dict[str, Any], moments: Moments) -> bytes:
    out = io.BytesIO()
    arrays: dict[str, Any] = {"facts": np.array(json.dumps(facts)), **moments.to_arrays()}
    np.savez(out, **arrays)
    return out.getvalue()


def read_record(layout: StoreLayout, data: bytes) -> tuple[dict[str, Any], Moments]:
    """The facts and the moments of a window's record."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return json.loads(str(arrays["facts"])), Moments.from_arrays(layout, dict(arrays))


def window_order(rows: int, seed: int, window: int) -> np.ndarray:
    """Which row of the arrivals stands at each place of a window."""
    return permutation(rows, seed, 0x57494E44, window)
