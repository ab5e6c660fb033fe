"""Rows straight from the shards of a store on disk or at a URL, every byte checked before its first use.

The one loop over a store's bytes that is written by hand. Places come from the index of each shard; neighbouring
layers of a block are one read, from the page cache into the batch, layer by layer; at a URL all reads of a batch are
asked for at once. An array that another program has compressed or cut anew is read by Zarr, to the same rows.
"""

import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import torch
import zarr

from ..errors import Progress, UserError
from ..layout import CODECS, CRC_BYTES, ArraySpec, Blocks, Int8Rows, Order, Place, Read, Span, StoreLayout
from .batch import Batch, Statistics

_AT_ONCE = 32  # blocks that Zarr reads side by side
_KEPT = 16


class Part(NamedTuple):
    """A block of an array on its way into a batch."""

    array: "ArrayReader"
    span: Span
    target: np.ndarray
    """[layers, bytes] memory for the rows of the span."""
    whole: np.ndarray
    """[layers, bytes] memory for the block, which comes whole so that it can be checked."""
    sums: np.ndarray
    """[layers, 4] its checksums."""


class ArrayReader:
    """One array of a store: where its blocks lie, and which of them were checked."""

    def __init__(self, place: Place, prefix: str, layout: StoreLayout, spec: ArraySpec, foreign: zarr.Array | None):
        self.place, self.prefix, self.layout, self.spec = place, prefix, layout, spec
        self.foreign = foreign
        """The array as Zarr reads it, where its bytes do not lie as `layout` has them."""
        self._chunk = layout.chunk_bytes(spec)
        self.offsets: dict[int, np.ndarray] = {}
        """Shard -> [blocks, layers]; -1 where nothing was written."""
        self._checked: dict[int, np.ndarray] = {}

    def index_read(self, shard: int) -> Read:
        size = self.layout.index_bytes(self.spec)
        return Read(self.name(shard), -size, [np.empty(size, np.uint8)])

    def learn(self, shard: int, index: np.ndarray) -> None:
        """Take over a shard's index, if it is what was written."""
        entries = index[:-CRC_BYTES].view("<u8").reshape(-1, self.spec.layers, 2).astype(np.int64)  # absent: -1
        written = entries[..., 0] >= 0
        whole = google_crc32c.value(index[:-CRC_BYTES]) == int(index[-CRC_BYTES:].view("<u4")[0])
        if not whole or not (entries[written, 1] == self._chunk).all():
            raise self._damaged(f"the index of shard {self.name(shard)} ({self.rows_of(shard)}) is not")
        self._checked[shard] = ~written
        self.offsets[shard] = entries[..., 0]  # last: by it another thread sees that this shard is known

    def written_bytes(self, shard: int) -> int:
        """What the shard's file weighs, by its index: chunks of zeros are left out of it."""
        return int((self.offsets[shard] >= 0).sum()) * self._chunk + self.layout.index_bytes(self.spec)

    def parts(self, spans: list[Span], into: np.ndarray) -> Iterator[Part]:
        """The blocks that fill memory [layers, bytes] with the rows of the spans."""
        begin, run = 0, self.spec.run_bytes
        for span in spans:
            target = into[:, begin : begin + len(span) * run]
            full = len(span) == self.layout.block_rows
            whole = target if full else np.empty((len(into), self.layout.block_rows * run), np.uint8)
            yield Part(self, span, target, whole, np.empty((len(into), CRC_BYTES), np.uint8))
            begin += len(span) * run

    def reads(self, part: Part, places: list[int]) -> list[Read]:
        """Neighbouring layers are one read; chunks that were never written are what Zarr's fill value says."""
        shard, within = divmod(part.span.block, self.layout.blocks_per_shard)
        found: list[Read] = []
        end = -1
        for i, offset in enumerate(self.offsets[shard][within][places].tolist()):
            if offset < 0:
                part.whole[i].view(self.spec.dtype)[:] = self.spec.fill
            elif offset == end:
                found[-1].buffers.extend((part.whole[i], part.sums[i]))
            else:
                found.append(Read(self.name(shard), offset, [part.whole[i], part.sums[i]]))
            end = offset + self._chunk
        return found

    def finish(self, part: Part, places: list[int]) -> None:
        """Check what was not checked before, and leave the rows of the span in the batch."""
        shard, within = divmod(part.span.block, self.layout.blocks_per_shard)
        checked = self._checked[shard][within]
        for i, place in enumerate(places):
            if checked[place]:
                continue
            if google_crc32c.value(part.whole[i]) != part.sums[i].view("<u4")[0]:
                start = part.span.block * self.layout.block_rows
                layer = "" if self.spec.flat else f" of layer {self.layout.layers[place]}"
                rows = f"rows {start} to {start + self.layout.block_rows - 1}{layer}"
                raise self._damaged(f"in shard {self.name(shard)}, {rows} are not")
            checked[place] = True
        if part.whole is not part.target:
            run = self.spec.run_bytes
            part.target[:] = part.whole[:, part.span.start * run : part.span.stop * run]

    def read_foreign(self, array: zarr.Array, spans: list[Span], places: list[int], into: np.ndarray) -> None:
        def read(span: Span) -> np.ndarray:
            start = span.block * self.layout.block_rows
            rows = np.asarray(array[start + span.start : start + span.stop])
            return rows[None] if self.spec.flat else rows.swapaxes(0, 1)[places]

        try:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                rows = np.concatenate(list(pool.map(read, spans)), 1)
        except (ValueError, RuntimeError) as cause:
            raise UserError(f"{self.place.root} is damaged: {self.prefix}{self.spec.name}: {cause}") from cause
        into.view(self.spec.dtype).reshape(len(places), -1, self.spec.width)[:] = rows.reshape(
            len(places), -1, self.spec.width
        )

    def name(self, shard: int) -> str:
        return self.prefix + self.spec.shard_key(shard)

    def rows_of(self, shard: int) -> str:
        start = shard * self.layout.shard_rows
        return f"rows {start} to {start + self.layout.shard_rows - 1}"

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"{self.place.root} is damaged: {what} what was written (checksum); copy the shard again or cache the "
            "store anew"
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
        """These shards are no longer the files that were checked."""
        for array in self.arrays.values():
            for shard in shards:
                array.offsets.pop(shard, None)

    def stored_order(self) -> Order:
        return self.blocks.in_order()

    def read(self, spans: list[Span], sites: tuple[str, ...], places: list[int], pin: bool = False) -> Batch:
        int8 = self.layout.dtype == "int8"
        found: dict[str, Any] = self._gather([*sites, *(f"{site}_scale" for site in sites if int8)], spans, places, pin)
        if int8:
            found = {s: Int8Rows(found[s], found[f"{s}_scale"], self.channel_scale[s][places]) for s in sites}
        return Batch(found, lambda name: self._gather([name], spans, [0])[name][:, 0, 0])

    def _gather(
        self, names: list[str], spans: list[Span], places: list[int], pin: bool = False
    ) -> dict[str, torch.Tensor]:
        """[rows, layers, width] of some arrays; in memory layer by layer."""
        count, found = sum(map(len, spans)), {}
        arrays = [self.arrays[name] for name in names]
        self.learn(arrays, sorted({span.block // self.layout.blocks_per_shard for span in spans}))
        parts: list[Part] = []
        for name, array in zip(names, arrays):
            raw = _memory(len(places) * count * array.spec.run_bytes, pin)
            into = raw.reshape(len(places), -1)
            if array.foreign is not None:
                array.read_foreign(array.foreign, spans, places, into)
            else:
                parts += array.parts(spans, into)
            shaped = raw.view(array.spec.dtype).reshape(len(places), count, array.spec.width)
            values = self.codec.to_torch(shaped) if name in self.sites else torch.from_numpy(shaped)
            found[name] = values.transpose(0, 1)
        self._fill([read for part in parts for read in part.array.reads(part, places)])
        for part in parts:
            part.array.finish(part, places)
        return found

    def learn(self, arrays: list[ArrayReader], shards: list[int]) -> None:
        """Read and check the indices of shards, where that has not been done."""
        new = [(a, shard) for a in arrays if a.foreign is None for shard in shards if shard not in a.offsets]
        reads = [array.index_read(shard) for array, shard in new]
        self._fill(reads)
        for (array, shard), read in zip(new, reads):
            array.learn(shard, read.buffers[0])

    def _fill(self, reads: list[Read]) -> None:
        try:
            self.place.fill(reads)
        except (OSError, EOFError) as cause:
            name = str(getattr(cause, "filename", None) or cause).removeprefix(f"{self.place.folder}/")
            raise UserError(
                f"{self.place.root} is damaged: shard {name} is missing or cut short; copy it again or cache the store "
                "anew"
            ) from cause

    def verify(self, progress: Progress) -> None:
        """Check every block of every array against its checksum, used before or not."""
        self.forget(range(1 + int(self.blocks.ids.max(initial=0)) // self.layout.blocks_per_shard))
        for number, (block, length) in enumerate(zip(self.blocks.ids.tolist(), self.blocks.lengths.tolist())):
            for name, array in self.arrays.items():
                self._gather([name], [Span(block, 0, length)], list(range(array.spec.layers)))
            progress("checking the store", number + 1, len(self.blocks.ids))


_spare: dict[int, list[torch.Tensor]] = {}  # without a lock: the operations of a list are atomic


def _memory(size: int, pin: bool) -> np.ndarray:
    """Memory for a batch. PyTorch keeps pinned memory for the next one; fresh pages of other memory cost more than what
    is copied into them, so that comes back here when nobody holds it any more."""
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
