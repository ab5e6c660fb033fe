"""Rows straight from the shards of a store on disk or at a URL, every byte checked before its first use."""

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import Progress, UserError
from . import kernels
from .batch import Batch, Statistics, Straight
from .codecs import CODECS, crc32c, dequantise
from .files import Files, LocalFiles, open_files, read_json
from .layout import CRC_BYTES, ArraySpec, StoreLayout
from .shuffle import EpochOrder, Span

HELD_OUT = "held_out"


class BufferPool:
    """Memory for batches that goes round: a fresh batch of 100 MB costs more in page faults than in copying.

    No lock: arrays come back from wherever the last reference to them dies, the middle of `take` included, and the
    operations of a list are atomic.
    """

    def __init__(self, keep: int = 16):
        self._free: dict[tuple[int, bool], list[torch.Tensor]] = {}
        self._keep = keep

    def take(self, size: int, pin: bool) -> np.ndarray:
        """`size` bytes that come back to the pool when nobody holds the array, or a tensor made of it, any more."""
        try:
            owner = self._free[size, pin].pop()
        except (KeyError, IndexError):
            # numpy asks for huge pages, which are sooner there
            owner = torch.empty(size, dtype=torch.uint8, pin_memory=True) if pin else torch.from_numpy(_bytes(size))
        lent = owner.numpy()
        weakref.finalize(lent, self._back, owner, pin).atexit = False
        return lent

    def _back(self, owner: torch.Tensor, pin: bool) -> None:
        waiting = self._free.setdefault((len(owner), pin), [])
        if len(waiting) < self._keep:
            waiting.append(owner)


def _bytes(*shape: int) -> np.ndarray:
    return np.empty(shape, np.uint8)


_POOL = BufferPool()


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]  # several times as fast as `array.ctypes.data`


class ArrayReader:
    """One array of a store: blocks of rows into given memory, checked against their crc32c on first touch."""

    def __init__(self, files: Files, prefix: str, layout: StoreLayout, spec: ArraySpec, rows: int):
        self.files, self.layout, self.spec, self.rows = files, layout, spec, rows
        self.prefix = prefix
        self._chunk = layout.chunk_bytes(spec)
        self._index_checked = np.zeros(layout.shards(rows), dtype=bool)
        self._checked = np.zeros((layout.shards(rows) * layout.blocks_per_shard, spec.layers), dtype=bool)

    def read(self, spans: list[Span], places: list[int], into: np.ndarray) -> None:
        """Rows of some blocks, for each wanted layer, into uint8 memory [layers, bytes]."""
        for shard in {span.block // self.layout.blocks_per_shard for span in spans}:
            self._check_index(shard)
        run = self.spec.run_bytes
        lengths = [len(span) * run for span in spans]
        begins = np.cumsum([0, *lengths[:-1]])
        # a chunk comes whole, so that it can be checked, even where only some of its rows are wanted
        parts = {i: self._whole(len(places)) for i, span in enumerate(spans) if len(span) < self.layout.block_rows}
        if isinstance(self.files, LocalFiles) and kernels.load() is not None:
            at = _address(into) + begins[:, None] + np.arange(len(places)) * into.strides[0]
            for i, whole in parts.items():
                at[i] = _address(whole) + np.arange(len(places)) * whole.strides[0]
            self._read_chunks(self.files, [span.block for span in spans], places, at)
        else:
            for i, span in enumerate(spans):
                self._read_block(span.block, places, parts.get(i, into[:, begins[i] : begins[i] + lengths[i]]))
        for i, whole in parts.items():
            span = spans[i]
            into[:, begins[i] : begins[i] + lengths[i]] = whole[:, span.start * run : span.stop * run]

    def _whole(self, layers: int) -> np.ndarray:
        return np.empty((layers, self.layout.block_rows * self.spec.run_bytes), np.uint8)

    def forget(self, first_shard: int, shards: int) -> None:
        per_shard = self.layout.blocks_per_shard
        self._index_checked[first_shard : first_shard + shards] = False
        self._checked[first_shard * per_shard : (first_shard + shards) * per_shard] = False

    def _read_chunks(self, files: LocalFiles, blocks: list[int], places: list[int], into: np.ndarray) -> None:
        """Chunks of every block and layer to addresses [blocks, layers], in one call without Python's lock."""
        which, columns = np.array(blocks)[:, None], np.array(places)
        shards, within = np.divmod(which, self.layout.blocks_per_shard)
        used, number = np.unique(shards, return_inverse=True)
        with self._descriptors(files, used.tolist()) as held:
            chunks = kernels.Chunks(
                files=np.repeat(np.array(held, np.int32)[number.ravel()], len(places)),
                offsets=((within * self.spec.layers + columns) * self._chunk).ravel(),
                into=into.ravel().astype(np.uintp),
                trusted=self._checked[which, columns].ravel(),
            )
            outcome, at, code = kernels.read_chunks(chunks, self._chunk - CRC_BYTES)
        block, place = blocks[at // len(places)], places[at % len(places)]
        shard = block // self.layout.blocks_per_shard
        if outcome == "damaged":
            self._refuse(shard, block, place)
        if outcome == "short":
            raise self._cut_short(self._name(shard))
        if outcome == "failed":
            raise OSError(code, os.strerror(code), self._name(shard))
        self._checked[which, columns] = True

    def _read_block(self, block: int, places: list[int], target: np.ndarray) -> None:
        """The same for one block, in plain Python, wherever the files are."""
        shard, within = divmod(block, self.layout.blocks_per_shard)
        sums = np.empty((len(places), CRC_BYTES), np.uint8)
        first = 0
        while first < len(places):
            # neighbouring layers lie side by side: one read
            last = first + 1
            while last < len(places) and places[last] == places[last - 1] + 1:
                last += 1
            buffers = [b for i in range(first, last) for b in (target[i], sums[i])]
            self._fetch(shard, (within * self.spec.layers + places[first]) * self._chunk, buffers)
            first = last
        for place, run, expected in zip(places, target, sums.view("<u4")[:, 0]):
            if not self._checked[block, place]:
                if crc32c(run) != expected:
                    self._refuse(shard, block, place)
                self._checked[block, place] = True

    def _check_index(self, shard: int) -> None:
        if self._index_checked[shard]:
            return
        blocks = self.layout.blocks_in(shard, self.rows)
        index = np.empty(self.layout.index_bytes(self.spec), np.uint8)
        self._fetch(shard, blocks * self.spec.layers * self._chunk, [index])
        if index.tobytes() != self.layout.index(self.spec, blocks):
            start = shard * self.layout.shard_rows
            stop = min(start + self.layout.shard_rows, self.rows)
            raise UserError(
                f"{self.files.root} is damaged: the index of shard {self._name(shard)} (rows {start} to {stop - 1}) is "
                "not what was written; copy the shard again or cache the store anew"
            )
        self._index_checked[shard] = True

    @contextmanager
    def _descriptors(self, files: LocalFiles, shards: list[int]) -> Iterator[list[int]]:
        try:
            with files.descriptors([self._name(shard) for shard in shards]) as held:
                yield held
        except FileNotFoundError as cause:
            raise self._cut_short(str(Path(cause.filename).relative_to(files.folder))) from cause

    def _fetch(self, shard: int, offset: int, buffers: list[np.ndarray]) -> None:
        try:
            self.files.read_into(self._name(shard), offset, buffers)
        except (FileNotFoundError, EOFError) as cause:
            raise self._cut_short(self._name(shard)) from cause

    def _name(self, shard: int) -> str:
        return self.prefix + self.spec.shard_key(shard)

    def _cut_short(self, name: str) -> UserError:
        return UserError(
            f"{self.files.root} is damaged: shard {name} is missing or cut short; copy it again or cache the store anew"
        )

    def _refuse(self, shard: int, block: int, place: int) -> None:
        start = block * self.layout.block_rows
        stop = min(start + self.layout.block_rows, self.rows)
        layer = "" if self.spec.flat else f" of layer {self.layout.layers[place]}"
        raise UserError(
            f"{self.files.root} is damaged: in shard {self._name(shard)}, rows {start} to {stop - 1}{layer} do not "
            "match their checksum; copy the shard again or cache the store anew"
        )


class ShardedRows:
    """Rows in the shards of one group, wherever an order of them comes from."""

    def __init__(self, files: Files, prefix: str, layout: StoreLayout, rows: int, attributes: dict[str, Any]):
        self.layout, self.rows = layout, rows
        self.sites, self.layers, self.d_model = layout.sites, layout.layers, layout.d_model
        self.codec = CODECS[layout.dtype]
        self.dtype = self.codec.read
        self.arrays = {name: ArrayReader(files, prefix, layout, spec, rows) for name, spec in layout.arrays.items()}
        if layout.dtype == "int8":
            scales = attributes["int8"]["channel_scale"]
            self.channel_scale = {site: torch.tensor(scales[site], dtype=torch.float32) for site in self.sites}

    def forget(self, first_shard: int, shards: int) -> None:
        """Check these shards again when they are next read: they are no longer the files that were checked."""
        for array in self.arrays.values():
            array.forget(first_shard, shards)

    def stored_order(self) -> Straight:
        return Straight(self.rows, self.layout.block_rows)

    def read(self, spans: list[Span], sites: tuple[str, ...], places: list[int], pin: bool = False) -> Batch:
        found = {}
        for site in sites:
            values = self._gather(site, spans, places, pin)
            if self.layout.dtype == "int8":
                scale = self._gather(f"{site}_scale", spans, places, False)
                values = dequantise(values, scale, self.channel_scale[site][places])
            found[site] = values.transpose(0, 1)
        where = (self._gather(name, spans, [0], False)[0, :, 0] for name in ("token", "position", "document"))
        return Batch(found, *where)

    def _gather(self, name: str, spans: list[Span], places: list[int], pin: bool) -> torch.Tensor:
        """[layers, rows, width] of one array."""
        array = self.arrays[name]
        run, count = array.spec.run_bytes, sum(map(len, spans))
        raw = _POOL.take(len(places) * count * run, pin)
        array.read(spans, places, raw.reshape(len(places), count * run))
        shaped = raw.view(array.spec.dtype).reshape(len(places), count, array.spec.width)
        return self.codec.to_torch(shaped) if name in self.sites else torch.from_numpy(shaped)

    def verify(self, progress: Progress) -> None:
        """Check every block of every array against its checksum, used before or not."""
        blocks = -(-self.rows // self.layout.block_rows)
        self.forget(0, self.layout.shards(self.rows))
        for block in range(blocks):
            span = Span(block, 0, min(self.layout.block_rows, self.rows - block * self.layout.block_rows))
            for name, array in self.arrays.items():
                self._gather(name, [span], list(range(array.spec.layers)), False)
            progress("checking the store", block + 1, blocks)


class DiskSource(ShardedRows):
    """A store in a folder or at an fsspec URL."""

    def __init__(self, path: str | PathLike, split: str = "train"):
        self.files = open_files(path)
        self.prefix = "" if split == "train" else f"{split}/"
        self.attributes = self._attributes(split)
        layout = StoreLayout.from_attributes(self.attributes, self.files.root)
        super().__init__(self.files, self.prefix, layout, self.attributes["rows"], self.attributes)
        self._check_files()
        self.statistics = read_statistics(self.attributes)
        self._order: tuple[int, EpochOrder] | None = None

    def close(self) -> None:
        """Nothing goes on behind the files."""

    def _attributes(self, split: str) -> dict[str, Any]:
        root = self.files.root
        try:
            top, own = read_json(self.files, "zarr.json"), read_json(self.files, f"{self.prefix}zarr.json")
        except ValueError as cause:
            raise UserError(f"{root} is damaged: its zarr.json is no JSON; cache the store anew") from cause
        if top is None:
            raise UserError(f"there is no store at {root}; make one with `crosslace cache store={root}`")
        attributes = top.get("attributes", {})
        if "format" in attributes and not attributes.get("complete"):
            raise UserError(f"{root} is incomplete: run `crosslace cache` with the same settings and it goes on")
        if own is None:
            raise UserError(f"{root} has no {split} split; cache it with held-out tokens or use split=train")
        return own["attributes"]

    def _check_files(self) -> None:
        """Every shard stands there with its size: what was lost or cut off is found before training starts."""
        found = {}
        for spec in self.layout.arrays.values():
            found |= self.files.sizes(self.prefix + spec.name)
        for spec in self.layout.arrays.values():
            for shard in range(self.layout.shards(self.rows)):
                name = self.prefix + spec.shard_key(shard)
                expected = self.layout.shard_bytes(spec, self.layout.blocks_in(shard, self.rows))
                if found.get(name) != expected:
                    state = "is missing" if name not in found else f"has {found[name]} bytes instead of {expected}"
                    start = shard * self.layout.shard_rows
                    stop = min(start + self.layout.shard_rows, self.rows)
                    raise UserError(
                        f"{self.files.root} is damaged: shard {name} (rows {start} to {stop - 1}) {state}; copy it "
                        "again or cache the store anew"
                    )

    def order(self, epoch: int) -> EpochOrder:
        held = self._order
        if held is None or held[0] != epoch:
            held = epoch, EpochOrder(self.rows, self.layout.block_rows, self.attributes["seed"], epoch)
            self._order = held
        return held[1]


def read_statistics(attributes: dict[str, Any]) -> Statistics:
    held = attributes["statistics"]
    return Statistics(
        {site: torch.tensor(held[site]["mean"], dtype=torch.float32) for site in attributes["sites"]},
        {site: torch.tensor(held[site]["mean_square"], dtype=torch.float32) for site in attributes["sites"]},
        attributes["rows"],
    )
