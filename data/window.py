"""Rows on their way into a store: gathered in a window of a million or more, shuffled, written shard by shard.

A window holds rows in the order in which the model made them. When it is full, a permutation of its rows (a function of
the seed and the window's number) says which row goes where, and its shards are written. It lies in memory where
two of them fit; else in files beside the shards, with a journal, so that a window that was cut off goes on.
"""

import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .codecs import CODECS, crc32c, quantise
from .files import Files
from .layout import CRC_BYTES, ArraySpec, StoreLayout
from .shuffle import permutation

JOURNAL_SECONDS = 20.0
_WRITE_BYTES = 2 << 20


class Moments:
    """Sums over rows, in float64, from which a store's statistics come."""

    def __init__(self, layout: StoreLayout):
        shape = len(layout.layers), layout.d_model
        self.total = {site: np.zeros(shape) for site in layout.sites}
        self.square = {site: np.zeros(shape[0]) for site in layout.sites}

    def add(self, sites: dict[str, torch.Tensor]) -> None:
        """Rows [B, L, D] of each site, summed where they lie, a layer at a time to spare memory."""
        for site, x in sites.items():
            totals, squares = [], []
            for layer in range(x.shape[1]):
                wide = x[:, layer].detach().float()
                totals.append(wide.sum(0))
                squares.append(torch.linalg.vector_norm(wide, dim=-1).double().square().sum())
            self.total[site] += torch.stack(totals).double().cpu().numpy()
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
    """The rows of one window while they arrive. `batches` counts the appends that are safe, for who goes on later."""

    def __init__(
        self,
        layout: StoreLayout,
        rows: int,
        channel_scale: dict[str, torch.Tensor] | None = None,
        spare: dict[str, np.ndarray] | None = None,
    ):
        self.layout, self.rows = layout, rows
        self.channel_scale = channel_scale or {}
        self.moments = Moments(layout)
        self.counts: dict[str, int] = {}
        self.filled = self.batches = 0
        # memory that an earlier window has left is there already; fresh memory costs more than what is copied into it
        fits = spare is not None and all(len(buffer) >= rows for buffer in spare.values())
        self._buffers = spare if spare and fits else _empty(layout, rows)

    def append(
        self,
        sites: dict[str, torch.Tensor],
        token: torch.Tensor,
        position: torch.Tensor,
        document: torch.Tensor,
        counts: dict[str, int] | None = None,
        moments: bool = True,
    ) -> None:
        """Take rows [B, L, D] of every site, as many as there is room for; `counts` says what was masked beside them.

        `moments=False` is for a caller who has added them to `self.moments` already.
        """
        room = min(len(token), self.rows - self.filled)
        taken = {site: values[:room] for site, values in sites.items()}
        if moments:
            self.moments.add(taken)
        for name, values in self._stored(taken, token, position, document):
            self._put(name, values[:room].reshape(room, -1))
        for reason, count in (counts or {}).items():
            self.counts[reason] = self.counts.get(reason, 0) + count
        self.filled += room
        self.batches += 1

    def _stored(self, sites: dict[str, torch.Tensor], *where: torch.Tensor) -> Iterator[tuple[str, np.ndarray]]:
        for site in self.layout.sites:
            if self.layout.dtype == "int8":
                values, scale = quantise(sites[site], self.channel_scale[site])
                yield site, values
                yield f"{site}_scale", scale
            else:
                yield site, CODECS[self.layout.dtype].to_stored(sites[site])
        for name, values in zip(("token", "position", "document"), where):
            yield name, values.cpu().numpy().astype(self.layout.arrays[name].dtype)

    def _put(self, name: str, values: np.ndarray) -> None:
        self._buffers[name][self.filled : self.filled + len(values)] = values

    def array(self, name: str) -> np.ndarray:
        """The rows [filled, layers * width] of an array, in order of arrival."""
        return self._buffers[name][: self.filled]

    def record(self) -> bytes:
        """What the store has to remember of this window."""
        return _pack({"filled": self.filled, "batches": self.batches, "counts": self.counts}, self.moments)

    def drop(self) -> dict[str, np.ndarray] | None:
        """Forget the rows; what comes back is memory for another window."""
        buffers, self._buffers = self._buffers, {}
        return buffers


def _empty(layout: StoreLayout, rows: int) -> dict[str, np.ndarray]:
    return {spec.name: np.empty((rows, spec.layers * spec.width), spec.dtype) for spec in layout.arrays.values()}


class SpilledWindow(Window):
    """A window whose rows lie in files of a local folder, and which goes on from its journal."""

    def __init__(self, layout: StoreLayout, rows: int, channel_scale: dict | None, files: Files, name: str):
        super().__init__(layout, 0, channel_scale)
        self.rows = rows
        self._files, self._journal = files, f"{name}.journal"
        self._name = name
        self._folder = Path(files.root, name)
        self._folder.mkdir(parents=True, exist_ok=True)
        journal = files.read(self._journal)
        if journal is not None:
            facts, self.moments = read_record(layout, journal)
            self.filled, self.batches, self.counts = facts["filled"], facts["batches"], facts["counts"]
        self._open = {spec: os.open(self._folder / spec, os.O_RDWR | os.O_CREAT) for spec in layout.arrays}
        self._saved = time.monotonic()

    def append(self, *args: Any, **kwargs: Any) -> None:
        super().append(*args, **kwargs)
        if time.monotonic() - self._saved >= JOURNAL_SECONDS:
            # the rows first: a journal never speaks of rows that a power cut could take
            for descriptor in self._open.values():
                os.fsync(descriptor)
            with self._files.writing(self._journal) as out:
                out.write(self.record())
            self._saved = time.monotonic()

    def _put(self, name: str, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values).data.cast("B")
        place = self.filled * self.layout.arrays[name].row_bytes
        while data:
            done = os.pwrite(self._open[name], data, place)
            data, place = data[done:], place + done

    def array(self, name: str) -> np.ndarray:
        spec = self.layout.arrays[name]
        if not self.filled:
            return np.empty((0, spec.layers * spec.width), spec.dtype)
        return np.memmap(self._folder / name, spec.dtype, "r", shape=(self.filled, spec.layers * spec.width))

    def drop(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open = {}
        self._files.remove(self._journal)
        self._files.remove(self._name)


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


def write_shard(
    files: Files, name: str, layout: StoreLayout, spec: ArraySpec, rows: np.ndarray, source: np.ndarray, sync: bool
) -> None:
    """Write the shard that holds `rows[source]`, block by block, each layer of a block with its checksum."""
    step, chunk = layout.block_rows, layout.chunk_bytes(spec)
    blocks = -(-len(source) // step)
    at_once = min(blocks, max(1, _WRITE_BYTES // (spec.layers * chunk)))
    gathered = np.empty((at_once * step, rows.shape[1]), spec.dtype)
    runs = gathered.view(np.uint8).reshape(at_once, step, spec.layers, spec.run_bytes)
    image = np.empty((at_once, spec.layers, chunk), np.uint8)
    body = image[..., :-CRC_BYTES].reshape(at_once, spec.layers, step, spec.run_bytes)
    with files.writing(name, sync) as out:
        for first in range(0, blocks, at_once):
            picked = source[first * step : (first + at_once) * step]
            held = -(-len(picked) // step)
            np.take(rows, picked, axis=0, out=gathered[: len(picked)], mode="clip")
            gathered[len(picked) : held * step] = 0
            np.copyto(body[:held], runs[:held].transpose(0, 2, 1, 3))
            for piece in image[:held].reshape(-1, chunk):
                piece[-CRC_BYTES:] = np.frombuffer(crc32c(piece[:-CRC_BYTES]).to_bytes(CRC_BYTES, "little"), np.uint8)
            _write_all(out, image[:held].data.cast("B"))
        _write_all(out, memoryview(layout.index(spec, blocks)))


def _write_all(out: Any, data: memoryview) -> None:
    while data:
        data = data[out.write(data) :]
