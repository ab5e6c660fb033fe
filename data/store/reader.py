"""Rows straight from the shards of a store on disk or at a URL, every byte checked before its first use.

The one loop over a store's bytes that is written by hand. Places come from the index of each shard; neighbouring
layers of a block are one read, from the page cache into the batch, layer by layer; at a URL all reads of a batch are
asked for at once. An array that another program has compressed or cut anew is read by Zarr, to the same rows.
"""

import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import torch
import zarr

from ..errors import Progress, UserError
from ..layout import CODECS, CRC_BYTES, ArraySpec, Blocks, Int8Rows, Order, Place, Span, StoreLayout
from .batch import Batch, Statistics

_AT_ONCE = 32  # blocks that Zarr reads side by side
_KEPT = 16


class Run(NamedTuple):
    """Neighbouring bytes of a shard and where they go."""

    shard: int
    offset: int
    buffers: list[np.ndarray]


class ArrayReader:
    """One array of a store: blocks of rows into given memory, checked against their crc32c on first touch."""

    def __init__(self, place: Place, prefix: str, layout: StoreLayout, spec: ArraySpec, foreign: zarr.Array | None):
        self.place, self.prefix, self.layout, self.spec = place, prefix, layout, spec
        self.foreign = foreign
        """The array as Zarr reads it, where its bytes do not lie as `layout` has them."""
        self._chunk = layout.chunk_bytes(spec)
        self._offsets: dict[int, np.ndarray] = {}
        self._checked: dict[int, np.ndarray] = {}

    def read(self, spans: list[Span], places: list[int], into: np.ndarray) -> None:
        """Rows of some blocks, for each wanted layer, into uint8 memory [layers, bytes]."""
        if self.foreign is not None:
            self._read_foreign(self.foreign, spans, places, into)
            return
        run, per_shard = self.spec.run_bytes, self.layout.blocks_per_shard
        begins = np.cumsum([0, *(len(span) * run for span in spans)]).tolist()
        self._learn(sorted({span.block // per_shard for span in spans}))
        sums = np.empty((len(spans), len(places), CRC_BYTES), np.uint8)
        targets, runs = [], []
        for i, span in enumerate(spans):
            target = into[:, begins[i] : begins[i + 1]]
            if len(span) < self.layout.block_rows:  # a chunk comes whole, so that it can be checked
                target = np.empty((len(places), self.layout.block_rows * run), np.uint8)
            targets.append(target)
            runs += self._runs(span.block, places, target, sums[i])
        self._fetch(runs)
        for i, span in enumerate(spans):
            self._check(span.block, places, targets[i], sums[i])
            if len(span) < self.layout.block_rows:
                into[:, begins[i] : begins[i + 1]] = targets[i][:, span.start * run : span.stop * run]

    def _runs(self, block: int, places: list[int], target: np.ndarray, sums: np.ndarray) -> list[Run]:
        """The reads of one block; chunks that were never written are what Zarr's fill value says."""
        shard, within = divmod(block, self.layout.blocks_per_shard)
        offsets = self._offsets[shard][within]
        found: list[Run] = []
        end = -1
        for i, place in enumerate(places):
            offset = int(offsets[place])
            if offset < 0:
                target[i].view(self.spec.dtype)[:] = self.spec.fill
                continue
            if offset == end:
                found[-1].buffers.extend((target[i], sums[i]))
            else:
                found.append(Run(shard, offset, [target[i], sums[i]]))
            end = offset + self._chunk
        return found

    def _fetch(self, runs: list[Run]) -> None:
        try:
            if self.place.local:
                for run in runs:
                    self.place.read_into(self._name(run.shard), run.offset, run.buffers)
                return
            wanted = [(self._name(run.shard), run.offset, sum(b.nbytes for b in run.buffers)) for run in runs]
            for run, got in zip(runs, self.place.ranges(wanted)):
                for buffer in run.buffers:
                    buffer[:], got = got[: buffer.nbytes], got[buffer.nbytes :]
        except (FileNotFoundError, EOFError) as cause:
            raise self._cut_short(cause) from cause

    def _learn(self, shards: list[int]) -> None:
        """Read and check the indices of shards, where that has not been done."""
        new = [shard for shard in shards if shard not in self._offsets]
        size = self.layout.index_bytes(self.spec)
        try:
            if self.place.local:
                found = [np.empty(size, np.uint8) for _ in new]
                for shard, index in zip(new, found):
                    self.place.read_into(self._name(shard), self._weight(shard) - size, [index])
            else:
                found = self.place.ranges([(self._name(shard), -size, size) for shard in new])
        except (OSError, EOFError) as cause:
            raise self._cut_short(cause) from cause
        for shard, index in zip(new, found):
            entries = index[:-CRC_BYTES].view("<u8").reshape(-1, self.spec.layers, 2).astype(np.int64)  # absent: -1
            written = entries[..., 0] >= 0
            whole = google_crc32c.value(index[:-CRC_BYTES]) == int(index[-CRC_BYTES:].view("<u4")[0])
            if not whole or not (entries[written, 1] == self._chunk).all():
                raise self._damaged(f"the index of shard {self._name(shard)} ({self._rows_of(shard)}) is not")
            self._checked[shard] = ~written
            self._offsets[shard] = entries[..., 0]  # last: by it another thread sees that this shard is known

    def is_whole(self, shard: int, size: int) -> bool:
        """Whether a file of this size has all that its index speaks of: chunks of zeros are left out of it."""
        self._learn([shard])
        written = int((self._offsets[shard] >= 0).sum())
        return size == written * self._chunk + self.layout.index_bytes(self.spec)

    def _weight(self, shard: int) -> int:
        return (self.place.folder / self._name(shard)).stat().st_size

    def _check(self, block: int, places: list[int], target: np.ndarray, sums: np.ndarray) -> None:
        shard, within = divmod(block, self.layout.blocks_per_shard)
        checked, expected = self._checked[shard][within], sums.view("<u4")[:, 0]
        for i, place in enumerate(places):
            if checked[place]:
                continue
            if google_crc32c.value(target[i]) != expected[i]:
                start = block * self.layout.block_rows
                layer = "" if self.spec.flat else f" of layer {self.layout.layers[place]}"
                rows = f"rows {start} to {start + self.layout.block_rows - 1}{layer}"
                raise self._damaged(f"in shard {self._name(shard)}, {rows} are not")
            checked[place] = True

    def _read_foreign(self, array: zarr.Array, spans: list[Span], places: list[int], into: np.ndarray) -> None:
        def read(span: Span) -> np.ndarray:
            start = span.block * self.layout.block_rows
            rows = slice(start + span.start, start + span.stop)
            return np.asarray(array[rows])[None] if self.spec.flat else np.asarray(array[rows]).swapaxes(0, 1)[places]

        shaped = into.view(self.spec.dtype).reshape(len(places), -1, self.spec.width)
        begin = 0
        try:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                for part in pool.map(read, spans):
                    shaped[:, begin : begin + part.shape[1]] = part.reshape(len(places), -1, self.spec.width)
                    begin += part.shape[1]
        except (ValueError, RuntimeError) as cause:
            raise UserError(f"{self.place.root} is damaged: {self.prefix}{self.spec.name}: {cause}") from cause

    def forget(self, shards: range) -> None:
        """These shards are no longer the files that were checked."""
        for shard in shards:
            self._offsets.pop(shard, None)

    def _name(self, shard: int) -> str:
        return self.prefix + self.spec.shard_key(shard)

    def _rows_of(self, shard: int) -> str:
        start = shard * self.layout.shard_rows
        return f"rows {start} to {start + self.layout.shard_rows - 1}"

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"{self.place.root} is damaged: {what} what was written (checksum); copy the shard again or cache the "
            "store anew"
        )

    def _cut_short(self, cause: Exception) -> UserError:
        name = getattr(cause, "filename", None) or str(cause).split(" ends")[0]
        name = str(name).removeprefix(f"{self.place.folder}/")
        return UserError(
            f"{self.place.root} is damaged: shard {name} is missing or cut short; copy it again or cache the store anew"
        )


class ShardedRows:
    """Rows in the shards of one split, wherever an order of them comes from."""

    def __init__(
        self,
        place: Place,
        prefix: str,
        layout: StoreLayout,
        windows: list[tuple[int, int]],
        channel_scale: dict[str, torch.Tensor],
        foreign: dict[str, zarr.Array] | None = None,
    ):
        self.place, self.prefix, self.layout, self.channel_scale = place, prefix, layout, channel_scale
        self.blocks = Blocks.of(windows, layout.block_rows)
        self.rows = int(self.blocks.lengths.sum())
        self.sites, self.layers, self.d_model = layout.sites, layout.layers, layout.d_model
        self.codec = CODECS[layout.dtype]
        self.dtype = self.codec.read
        self.arrays = {
            name: ArrayReader(place, prefix, layout, spec, (foreign or {}).get(name))
            for name, spec in layout.arrays.items()
        }

    def forget(self, shards: range) -> None:
        """Check these shards again when they are next read."""
        for array in self.arrays.values():
            array.forget(shards)

    def stored_order(self) -> Order:
        return self.blocks.in_order()

    def read(self, spans: list[Span], sites: tuple[str, ...], places: list[int], pin: bool = False) -> Batch:
        found: dict[str, Any] = {}
        for site in sites:
            values = self._gather(site, spans, places, pin)
            if self.layout.dtype == "int8":
                scale = self._gather(f"{site}_scale", spans, places, pin)
                found[site] = Int8Rows(values, scale, self.channel_scale[site][places])
            else:
                found[site] = values
        return Batch(found, lambda name: self._gather(name, spans, [0])[:, 0, 0])

    def _gather(self, name: str, spans: list[Span], places: list[int], pin: bool = False) -> torch.Tensor:
        """[rows, layers, width] of one array; in memory layer by layer."""
        array = self.arrays[name]
        run, count = array.spec.run_bytes, sum(map(len, spans))
        raw = _memory(len(places) * count * run, pin)
        array.read(spans, places, raw.reshape(len(places), count * run))
        shaped = raw.view(array.spec.dtype).reshape(len(places), count, array.spec.width)
        return (self.codec.to_torch(shaped) if name in self.sites else torch.from_numpy(shaped)).transpose(0, 1)

    def verify(self, progress: Progress) -> None:
        """Check every block of every array against its checksum, used before or not."""
        self.forget(range(1 + int(self.blocks.ids.max(initial=0)) // self.layout.blocks_per_shard))
        for number, (block, length) in enumerate(zip(self.blocks.ids.tolist(), self.blocks.lengths.tolist())):
            for name, array in self.arrays.items():
                self._gather(name, [Span(block, 0, length)], list(range(array.spec.layers)))
            progress("checking the store", number + 1, len(self.blocks.ids))


_spare: dict[int, list[torch.Tensor]] = {}  # without a lock: the operations of a list are atomic


def _memory(size: int, pin: bool) -> np.ndarray:
    """Memory for a batch. PyTorch keeps pinned memory for the next one; pages of other memory that the system has just
    given cost more than what is copied into them, so that comes back here when nobody holds it any more."""
    if pin:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
    waiting = _spare.setdefault(size, [])
    try:
        owner = waiting.pop()
    except IndexError:
        owner = torch.from_numpy(np.empty(size, np.uint8))  # numpy asks for huge pages, which are sooner there
    lent = owner.numpy()  # every view of it keeps this very array alive
    weakref.finalize(lent, lambda: waiting.append(owner) if len(waiting) < _KEPT else None).atexit = False
    return lent


def read_small(group: Any, name: str) -> torch.Tensor:
    """A small array, whole."""
    try:
        return torch.from_numpy(np.asarray(group[name][...]))
    except (KeyError, ValueError, RuntimeError) as cause:
        raise UserError(
            f"the store is damaged: {group.path}/{name} is missing or not what was written ({cause}); copy it again or "
            "cache the store anew"
        ) from cause


def read_statistics(group: Any, sites: tuple[str, ...], rows: int) -> Statistics:
    """From a split's arrays."""
    read = lambda name: read_small(group, name).float()
    return Statistics(
        {site: read(f"{site}_mean") for site in sites}, {site: read(f"{site}_mean_square") for site in sites}, rows
    )
