"""Windows into the arrays of a split: Zarr's part of the writing."""

from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from ..layout import Place, StoreLayout
from .window import Window


def window_sizes(stages: list[int], window_rows: int) -> list[list[int]]:
    """The rows of every window, for each time that a split was asked for so many rows. What is too little for a window
    of its own joins the one before it."""
    sizes = []
    for rows in stages:
        count = max(1, rows // window_rows)
        sizes.append([window_rows] * (count - 1) + [rows - (count - 1) * window_rows] if rows else [])
    return sizes


class ShardWriter:
    """Writes windows into the arrays of one split. At a URL their shards are made in a local folder first: there zarrs
    writes them, and they arrive whole."""

    def __init__(self, place: Place, layout: StoreLayout, split: str, rows: int, aside: Path | None):
        self.place, self.layout, self.prefix = place, layout, f"{split}/"
        layout.create(place.group(split, mode="a"), rows)
        self.made = place if aside is None else Place(aside)
        if aside is not None:
            layout.create(self.made.group(split, mode="a"), rows)
        self.arrays = self.made.shard_writers(split, layout.arrays)

    def write(self, start: int, rows: int, window: Window, durable: bool) -> None:
        """A closed window, from row `start` on."""
        size = self.layout.shard_rows
        tasks = [(name, shard) for shard in range(self.layout.shards(rows)) for name in self.layout.arrays]

        def put(task: tuple[str, int]) -> None:
            name, shard = task
            first = start + shard * size
            key = self.prefix + self.layout.arrays[name].shard_key(first // size)
            values, place = window.arrays[name][shard * size : (shard + 1) * size], slice(first, first + size)
            self.arrays[name][place] = values
            if not (self.made.folder / key).exists():  # zeros throughout, which Zarr leaves out
                self.arrays[name].with_config({"write_empty_chunks": True})[place] = values
            if durable:
                self.made.flush(key)
            if self.made is not self.place:
                self.place.write(key, (self.made.folder / key).read_bytes())
                self.made.remove(key)

        with ThreadPoolExecutor(min(4, cpu_count() or 1), thread_name_prefix="crosslace-shards") as pool:
            for _ in pool.map(put, tasks):
                pass


def put_array(group: zarr.Group, name: str, values: np.ndarray, dimensions: tuple[str, ...]) -> None:
    """A small array, in one chunk."""
    array = group.create_array(
        name,
        shape=values.shape,
        chunks=tuple(max(1, size) for size in values.shape),
        dtype=values.dtype,
        compressors=Crc32cCodec(),
        filters=None,
        fill_value=0,
        dimension_names=dimensions,
        overwrite=True,
    )
    array[...] = values
