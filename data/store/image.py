"""Blocks of one array in memory as they will lie in its shards: rows go to their places, checksums behind the chunks.

[blocks, layers, stride] bytes, where a stride is one chunk (a block of one layer), its checksum, and what it takes for
the next chunk to begin at a cache line.
"""

from typing import IO, NamedTuple

import numpy as np
import torch

from . import kernels
from .codecs import crc32c
from .files import MAX_PARTS, write_parts
from .layout import CRC_BYTES, ArraySpec, StoreLayout
from .outfile import OutFile

_LINE = 64
_WRITE_BYTES = 1 << 20  # checked and written while they are in the cache


class Rows(NamedTuple):
    """Rows that lie layer by layer: row `picked[i]` of each of `layers` [.., width], or row i where all are meant."""

    layers: list[torch.Tensor]
    picked: torch.Tensor | None = None

    @classmethod
    def of(cls, values: "torch.Tensor | Rows") -> "Rows":
        """Rows [B, L, width], where they lie."""
        return values if isinstance(values, Rows) else cls(list(values.unbind(1)))

    def __len__(self) -> int:
        return len(self.layers[0]) if self.picked is None else len(self.picked)

    def first(self, count: int) -> "Rows":
        if self.picked is None:
            return Rows([layer[:count] for layer in self.layers])
        return Rows(self.layers, self.picked[:count])

    def largest(self) -> float:
        """The largest absolute value."""
        return max(float((x if self.picked is None else x[self.picked]).abs().amax()) for x in self.layers)

    def picked_array(self) -> np.ndarray | None:
        return None if self.picked is None else self.picked.numpy()

    def stacked(self) -> torch.Tensor:
        """[B, L, width]."""
        first = self.layers[0]
        rows = first.new_empty(len(self), len(self.layers), first.shape[-1])
        for place, layer in enumerate(self.layers):
            rows[:, place] = layer if self.picked is None else layer[self.picked]
        return rows


class Image:
    """Room for `rows` rows of one array."""

    def __init__(self, layout: StoreLayout, spec: ArraySpec, rows: int, spare: np.ndarray | None = None):
        self.spec, self.block_rows = spec, layout.block_rows
        self.size = layout.chunk_bytes(spec) - CRC_BYTES
        stride = -(-(self.size + CRC_BYTES) // _LINE) * _LINE
        shape = -(-rows // self.block_rows), spec.layers, stride
        wanted = shape[0] * shape[1] * shape[2]
        # memory that an earlier window has left is there already; fresh memory costs more than what is copied into it
        if spare is None or len(spare) < wanted + _LINE:
            spare = np.empty(wanted + _LINE, np.uint8)
        self.memory = spare
        begin = -spare.ctypes.data % _LINE
        self.chunks = spare[begin : begin + wanted].reshape(shape)

    def rows(self) -> np.ndarray:
        """[blocks, layers, block_rows, width], a view."""
        blocks, layers, _ = self.chunks.shape
        values = self.chunks[..., : self.size].view(self.spec.dtype)
        return values.reshape(blocks, layers, self.block_rows, self.spec.width)

    def put(self, values: np.ndarray, places: np.ndarray) -> None:
        """Take rows [B, layers * width] of the array's own dtype to their places."""
        if kernels.load() is not None and not self.spec.flat:
            self.gather(np.ascontiguousarray(values), None, places)
        else:
            block, within = np.divmod(places, self.block_rows)
            self.rows()[block, :, within] = values.reshape(len(places), self.spec.layers, self.spec.width)

    def gather(self, values: np.ndarray, picked: np.ndarray | None, places: np.ndarray) -> None:
        """Take the picked ones of rows [N, layers * width] of the array's own dtype to their places."""
        if kernels.load() is None or self.spec.flat:
            self.put(values if picked is None else values[picked], places)
            return
        kernels.put_bytes(values, picked, self.chunks, places, self.block_rows)

    def clear(self, start: int) -> None:
        """Zeros in the rows from `start` to the end of its block."""
        block, within = divmod(start, self.block_rows)
        if within:
            self.rows()[block, :, within:] = 0

    def close_up(self, places: np.ndarray) -> None:
        """Move the rows at these places, in order, to the beginning."""
        rows = self.rows()
        for block, start in enumerate(range(0, len(places), self.block_rows)):
            # never from a place that has been written already: a row only moves towards the beginning
            taken = np.divmod(places[start : start + self.block_rows], self.block_rows)
            rows[block, :, : len(taken[0])] = rows[taken[0], :, taken[1]].swapaxes(0, 1)
        self.clear(len(places))

    def write(self, out: IO[bytes] | OutFile, first: int, blocks: int) -> None:
        """Write blocks with their checksums."""
        chunks = self.chunks[first : first + blocks].reshape(-1, self.chunks.shape[-1])
        if kernels.load() is not None and isinstance(out, OutFile):
            done, whole = 0, len(chunks) * (self.size + CRC_BYTES)
            while done < whole:
                done += out.took(kernels.pack_chunks(chunks, self.size, done, out.room()))
            return
        at_once = min(MAX_PARTS, max(1, _WRITE_BYTES // self.size))
        for start in range(0, len(chunks), at_once):
            group = chunks[start : start + at_once]
            sums = [crc32c(chunk[: self.size]) for chunk in group]
            group[:, self.size : self.size + CRC_BYTES] = np.array(sums, "<u4")[:, None].view(np.uint8)
            write_parts(out, list(group[:, : self.size + CRC_BYTES]))
