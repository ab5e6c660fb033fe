"""Stores in folders or at URLs as sources of rows: one of them, or several of the same model read as one."""

from os import PathLike
from typing import Any

import numpy as np
import torch
import zarr

from ..errors import Progress, UserError
from ..layout import Order, Place, Span, StoreLayout, permutation, read_json
from .batch import Batch, Statistics
from .reader import ShardedRows, read_small, read_statistics


class DiskSource(ShardedRows):
    """One store."""

    def __init__(self, path: str | PathLike, split: str = "train"):
        place = Place(path)
        attributes = self._attributes(place)
        layout = StoreLayout.from_attributes(attributes, place.root)
        if place.read(f"{split}/zarr.json") is None:
            raise UserError(f"{place.root} has no {split} split; cache it with held-out tokens or use split=train")
        group = place.group(split)
        try:
            windows = [(start, rows) for start, rows in read_small(group, "windows").tolist()]
            int8 = layout.sites if layout.dtype == "int8" else ()
            scales = {site: read_small(group, f"{site}_channel_scale") for site in int8}
            foreign = {name: group[name] for name in layout.arrays if not _direct(layout, name, group[name])}
            super().__init__(place, f"{split}/", layout, windows, scales, foreign)
            self.statistics = read_statistics(group, layout.sites, self.rows)
        except (KeyError, ValueError) as cause:
            raise UserError(f"{place.root} is damaged: {cause}; copy it again or cache the store anew") from cause
        own = dict(group.attrs)
        masked = {**attributes.get("masked", {}), "rows": own["masked_rows"], "kept": self.rows}
        self.attributes = attributes | attributes["identity"] | {"rows": self.rows, "masked": masked}
        self._check_files()
        self._order: tuple[int, Order] | None = None

    @staticmethod
    def _attributes(place: Place) -> dict[str, Any]:
        root = place.root
        try:
            top = read_json(place, "zarr.json")
        except ValueError as cause:
            raise UserError(f"{root} is damaged: its zarr.json is no JSON; cache the store anew") from cause
        if top is None:
            raise UserError(f"there is no store at {root}; make one with `crosslace cache store={root}`")
        attributes = top.get("attributes", {})
        if "format" in attributes and not attributes.get("complete"):
            raise UserError(f"{root} is incomplete: run `crosslace cache` with the same settings and it goes on")
        return attributes

    def _check_files(self) -> None:
        """Every shard stands there whole: what was lost or cut off is found before training starts. A URL is not
        listed; there it is found on reading."""
        if not self.place.local:
            return
        held = self.place.sizes(self.prefix)
        counts = np.unique(self.blocks.ids // self.layout.blocks_per_shard, return_counts=True)
        for array in (array for array in self.arrays.values() if array.foreign is None):
            index, chunk = self.layout.index_bytes(array.spec), self.layout.chunk_bytes(array.spec)
            for shard, blocks in zip(*(part.tolist() for part in counts)):
                size, whole = held.get(array.name(shard)), blocks * array.spec.layers * chunk + index
                if size is not None and index < size < whole:  # what is zero throughout is not written
                    self.learn([array], [shard])
                    whole = array.written_bytes(shard)
                if size != whole:
                    state = "is missing" if size is None else f"has {size} bytes instead of {whole}"
                    raise UserError(
                        f"{self.place.root} is damaged: shard {array.name(shard)} ({array.rows_of(shard)}) {state}; "
                        "copy it again or cache the store anew"
                    )

    def order(self, epoch: int) -> Order:
        held = self._order
        if held is None or held[0] != epoch:
            held = self._order = epoch, self.blocks.shuffled(self.attributes["seed"], epoch)
        return held[1]

    def close(self) -> None:
        """Nothing goes on behind the files."""


def _direct(layout: StoreLayout, name: str, array: zarr.Array) -> bool:
    return layout.is_direct(layout.arrays[name], array.metadata.to_dict())  # type: ignore[arg-type]


class JoinedSource:
    """Several stores one after another: more text of the same model than one harvest has read."""

    def __init__(self, parts: list[DiskSource]):
        first = parts[0]
        for other in parts[1:]:
            for what in ("sites", "layers", "d_model", "model"):
                held, wanted = (part.attributes.get(what) for part in (other, first))
                if held != wanted:
                    raise UserError(
                        f"{other.place.root} and {first.place.root} cannot be read as one: their {what} differ "
                        f"({held}, {wanted})"
                    )
        self.parts, self.attributes = parts, first.attributes
        self.sites, self.layers, self.d_model, self.dtype = first.sites, first.layers, first.d_model, first.dtype
        self.rows = sum(part.rows for part in parts)
        share: Any = lambda read: sum(read(part.statistics) * (part.rows / self.rows) for part in parts)
        self.statistics = Statistics(
            {site: share(lambda s, site=site: s.mean[site]) for site in self.sites},
            {site: share(lambda s, site=site: s.mean_square[site]) for site in self.sites},
            self.rows,
        )
        # blocks are numbered through: part p's begin at firsts[p]
        self.firsts = np.cumsum([0, *(int(part.blocks.ids.max(initial=-1)) + 1 for part in parts)]).tolist()
        self.ids = np.concatenate([part.blocks.ids + first for part, first in zip(parts, self.firsts)])
        self.lengths = np.concatenate([part.blocks.lengths for part in parts])

    def order(self, epoch: int) -> Order:
        picked = permutation(len(self.ids), self.attributes["seed"], epoch)
        return Order(self.ids[picked], self.lengths[picked])

    def stored_order(self) -> Order:
        return Order(self.ids, self.lengths)

    def read(self, spans: list[Span], sites: tuple[str, ...], places: list[int], pin: bool = False) -> Batch:
        batches, rows = [], []
        begins = np.cumsum([0, *map(len, spans)])
        for part, first, end in zip(self.parts, self.firsts, self.firsts[1:]):
            own = [i for i, span in enumerate(spans) if first <= span.block < end]
            if own:
                moved = [Span(spans[i].block - first, spans[i].start, spans[i].stop) for i in own]
                batches.append(part.read(moved, sites, places).to("cpu", self.dtype))
                rows += [np.arange(begins[i], begins[i + 1]) for i in own]
        back = torch.from_numpy(np.argsort(np.concatenate(rows)))

        by_layer = lambda site: torch.cat([batch.sites[site].transpose(0, 1) for batch in batches], 1)
        found = {site: by_layer(site)[:, back].transpose(0, 1) for site in sites}
        return Batch(found, lambda name: torch.cat([batch.column(name) for batch in batches])[back])

    def verify(self, progress: Progress) -> None:
        for part in self.parts:
            part.verify(progress)

    def close(self) -> None:
        """Nothing goes on behind the files."""
