"""Where each byte of a store lies: Zarr v3 arrays whose inner chunks are one shuffle block of one layer.

    resid/c/K/0/0 =  [block 0: layer 0 | crc32c, layer 1 | crc32c, ...] [block 1: ...] ...  index | crc32c

Blocks are uncompressed and in order, so a reader of all layers reads one run of bytes per block, a reader of one layer
one run per block and layer, and both know the places without asking: what the shard's index says is checked once
against what it must say. To every other reader of Zarr it is an ordinary sharded array.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError, check_choice
from .codecs import CODECS, DTYPES, crc32c, group_count

FORMAT = "crosslace-activations"
VERSION = 1
BLOCK_ROWS = 256
SHARD_BYTES = 128 << 20
CRC_BYTES = 4
_ABSENT = 2**64 - 1


class ArraySpec(NamedTuple):
    """One array of the group: rows of `layers` runs of `width` values, or rows of one number."""

    name: str
    dtype: np.dtype
    layers: int
    """Inner chunks per block."""
    width: int
    flat: bool
    """The array has rows alone."""

    @property
    def run_bytes(self) -> int:
        """Bytes of one row in one layer."""
        return self.width * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return self.layers * self.run_bytes

    def shard_key(self, shard: int) -> str:
        return f"{self.name}/c/{shard}" if self.flat else f"{self.name}/c/{shard}/0/0"


@dataclass(frozen=True)
class StoreLayout:
    """What is in a store and how it is cut."""

    sites: tuple[str, ...]
    layers: tuple[int, ...]
    """The model's layers that are kept, in order."""
    d_model: int
    dtype: str = "float16"
    block_rows: int = BLOCK_ROWS
    shard_rows: int = 0
    """Rows a shard; 0 chooses about 128 MiB of one site."""
    arrays: dict[str, ArraySpec] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        check_choice("store.dtype", self.dtype, DTYPES)
        if not self.shard_rows:
            row = len(self.layers) * self.d_model * CODECS[self.dtype].stored.itemsize
            blocks = max(1, SHARD_BYTES // (row * self.block_rows))
            object.__setattr__(self, "shard_rows", self.block_rows * 2 ** (blocks.bit_length() - 1))
        if self.shard_rows % self.block_rows:
            raise ValueError(f"a shard of {self.shard_rows} rows is no whole number of blocks of {self.block_rows}")
        object.__setattr__(self, "arrays", {spec.name: spec for spec in self._specs()})

    def _specs(self):
        count = len(self.layers)
        for site in self.sites:
            yield ArraySpec(site, CODECS[self.dtype].stored, count, self.d_model, False)
            if self.dtype == "int8":
                yield ArraySpec(f"{site}_scale", np.dtype("<f2"), count, group_count(self.d_model), False)
        for name, dtype in (("token", "<i4"), ("position", "<i4"), ("document", "<i8")):
            yield ArraySpec(name, np.dtype(dtype), 1, 1, True)

    @property
    def blocks_per_shard(self) -> int:
        return self.shard_rows // self.block_rows

    @property
    def row_bytes(self) -> int:
        return sum(spec.row_bytes for spec in self.arrays.values())

    def shards(self, rows: int) -> int:
        return -(-rows // self.shard_rows)

    def blocks_in(self, shard: int, rows: int) -> int:
        """Blocks that a shard of a store of `rows` rows really holds."""
        held = min(self.shard_rows, rows - shard * self.shard_rows)
        return -(-held // self.block_rows)

    def chunk_bytes(self, spec: ArraySpec) -> int:
        """One block of one layer, with its checksum."""
        return self.block_rows * spec.run_bytes + CRC_BYTES

    def index(self, spec: ArraySpec, blocks: int) -> bytes:
        """The index at the end of a shard: (offset, length) of every chunk, and its checksum."""
        entries = np.full((self.blocks_per_shard * spec.layers, 2), _ABSENT, dtype="<u8")
        present, size = blocks * spec.layers, self.chunk_bytes(spec)
        entries[:present, 0] = np.arange(present) * size
        entries[:present, 1] = size
        body = entries.tobytes()
        return body + crc32c(np.frombuffer(body, np.uint8)).to_bytes(CRC_BYTES, "little")

    def shard_bytes(self, spec: ArraySpec, blocks: int) -> int:
        """What the file of a shard weighs."""
        return blocks * spec.layers * self.chunk_bytes(spec) + self.index_bytes(spec)

    def index_bytes(self, spec: ArraySpec) -> int:
        return self.blocks_per_shard * spec.layers * 16 + CRC_BYTES

    def total_bytes(self, rows: int) -> int:
        """What all shards weigh."""
        whole, rest = divmod(rows, self.shard_rows)
        size = sum(whole * self.shard_bytes(spec, self.blocks_per_shard) for spec in self.arrays.values())
        if rest:
            size += sum(self.shard_bytes(spec, -(-rest // self.block_rows)) for spec in self.arrays.values())
        return size

    def array_metadata(self, spec: ArraySpec, rows: int) -> dict[str, Any]:
        """The `zarr.json` of an array."""
        tail = [] if spec.flat else [spec.layers, spec.width]
        inner = [self.block_rows] + ([] if spec.flat else [1, spec.width])
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        codec = little if spec.dtype.itemsize > 1 else {"name": "bytes"}
        sharding = {
            "chunk_shape": inner,
            "codecs": [codec, {"name": "crc32c"}],
            "index_codecs": [little, {"name": "crc32c"}],
            "index_location": "end",
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [rows, *tail],
            "data_type": spec.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self.shard_rows, *tail]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {},
            "dimension_names": ["row"] if spec.flat else ["row", "layer", "channel"],
        }

    def to_attributes(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "sites": list(self.sites),
            "layers": list(self.layers),
            "d_model": self.d_model,
            "dtype": self.dtype,
            "block_rows": self.block_rows,
            "shard_rows": self.shard_rows,
        }

    @classmethod
    def from_attributes(cls, attributes: dict[str, Any], path: str) -> "StoreLayout":
        """The layout that a store's attributes tell of, or the sentence that says why it cannot be read."""
        if attributes.get("format") != FORMAT:
            raise UserError(f"{path} is a Zarr group but no activation store; make one with `crosslace cache`")
        if attributes.get("version") != VERSION:
            raise UserError(
                f"{path} has version {attributes.get('version')} of the store format and this crosslace reads version "
                f"{VERSION}: write the store again or use the crosslace that wrote it"
            )
        return cls(
            sites=tuple(attributes["sites"]),
            layers=tuple(attributes["layers"]),
            d_model=attributes["d_model"],
            dtype=attributes["dtype"],
            block_rows=attributes["block_rows"],
            shard_rows=attributes["shard_rows"],
        )
