"""What is in a store and how it is cut: Zarr v3 arrays whose inner chunks are one shuffle block of one layer.

    STORE/            attributes: what it is, model, text, versions, `complete`
      train/          attributes: rows, what was masked
        resid, mlp_out            [row, layer, channel]     in shards; int8 has SITE_scale [row, layer, group] beside it
        token, position, document [row]                     in shards; -1 in rows that no activation belongs to
        windows                   [window, 2]               first row and number of rows of each window
        resid_mean, ...           [layer, channel]          statistics: SITE_mean, SITE_mean_square [layer]
        layer                     [layer]                   the model's numbers of the layers
      held_out/       the same again

A shard is a run of blocks, a block has a chunk and its crc32c for each layer in turn, and the shard's index stands at
its end. A window begins at a shard of its own and may be shorter than was foreseen: the rows from there to the next
window are empty.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from zarr.codecs import Crc32cCodec
from zarr.errors import ContainsArrayError

from ..errors import UserError, check_choice
from .codecs import CODECS, DTYPES, group_count

FORMAT = "crosslace-activations"
VERSION = 2
BLOCK_ROWS = 256
SHARD_BYTES = 128 << 20
CRC_BYTES = 4
COLUMNS = ("token", "position", "document")


class ArraySpec(NamedTuple):
    """One array of the group: rows of `layers` runs of `width` values, or rows of one number."""

    name: str
    dtype: np.dtype
    layers: int
    """Inner chunks per block."""
    width: int
    dimensions: tuple[str, ...]
    numbers: str
    """What its numbers are."""

    @property
    def flat(self) -> bool:
        """The array has rows alone."""
        return len(self.dimensions) == 1

    @property
    def fill(self) -> int:
        """What stands where nothing was written."""
        return -1 if self.flat else 0

    @property
    def run_bytes(self) -> int:
        """Bytes of one row in one layer."""
        return self.width * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return self.layers * self.run_bytes

    def shape(self, rows: int) -> tuple[int, ...]:
        return (rows,) if self.flat else (rows, self.layers, self.width)

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
        count, codec = len(self.layers), CODECS[self.dtype]
        for site in self.sites:
            says = codec.says.replace("SITE", site)
            yield ArraySpec(site, codec.stored, count, self.d_model, ("row", "layer", "channel"), says)
            if self.dtype == "int8":
                groups, half = group_count(self.d_model), np.dtype("<f2")
                yield ArraySpec(f"{site}_scale", half, count, groups, ("row", "layer", "group"), f"scales of {site}")
        for name, dtype in zip(COLUMNS, ("<i4", "<i4", "<i8")):
            yield ArraySpec(name, np.dtype(dtype), 1, 1, ("row",), f"{name} of each row")

    @property
    def blocks_per_shard(self) -> int:
        return self.shard_rows // self.block_rows

    @property
    def row_bytes(self) -> int:
        return sum(spec.row_bytes for spec in self.arrays.values())

    def shards(self, rows: int) -> int:
        return -(-rows // self.shard_rows)

    def chunk_bytes(self, spec: ArraySpec) -> int:
        """One block of one layer, with its checksum."""
        return self.block_rows * spec.run_bytes + CRC_BYTES

    def index_bytes(self, spec: ArraySpec) -> int:
        return self.blocks_per_shard * spec.layers * 16 + CRC_BYTES

    def total_bytes(self, rows: int) -> int:
        """What the shards of so many rows weigh."""
        blocks, shards = -(-rows // self.block_rows), self.shards(rows)
        return sum(
            blocks * spec.layers * self.chunk_bytes(spec) + shards * self.index_bytes(spec)
            for spec in self.arrays.values()
        )

    def chunk_shape(self, spec: ArraySpec) -> tuple[int, ...]:
        return (self.block_rows,) if spec.flat else (self.block_rows, 1, spec.width)

    def create(self, group: Any, rows: int) -> None:
        """The arrays of a split, or the ones that are there with room for so many rows."""
        for spec in self.arrays.values():
            if spec.name in group:
                if rows > group[spec.name].shape[0]:
                    group[spec.name].resize(spec.shape(rows))
                continue
            with suppress(ContainsArrayError):  # by another process, just now
                group.create_array(
                    spec.name,
                    shape=spec.shape(rows),
                    chunks=self.chunk_shape(spec),
                    shards=spec.shape(self.shard_rows),
                    dtype=spec.dtype,
                    filters=None,
                    compressors=Crc32cCodec(),
                    fill_value=spec.fill,
                    dimension_names=spec.dimensions,
                    attributes={"numbers": spec.numbers},
                )

    def is_direct(self, spec: ArraySpec, metadata: dict[str, Any]) -> bool:
        """Whether an array is cut as `create` does it: another program may have compressed or re-cut a copy."""
        sharding, grid = metadata["codecs"][0], metadata["chunk_grid"]["configuration"]
        inside = sharding.get("configuration", {})
        return (
            sharding["name"] == "sharding_indexed"
            and inside["index_location"] == "end"
            and tuple(inside["chunk_shape"]) == self.chunk_shape(spec)
            and [codec["name"] for codec in inside["codecs"]] == ["bytes", "crc32c"]
            and tuple(grid["chunk_shape"]) == spec.shape(self.shard_rows)
        )

    def to_attributes(self) -> dict[str, Any]:
        return {
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
        version = attributes.get("version")
        if version != VERSION:
            name = attributes.get("model", {}).get("name", "MODEL")
            raise UserError(
                f"{path} has version {version} of the store format and this crosslace reads version {VERSION}: harvest "
                f"it anew with `crosslace cache model={name} dataset=... store=NEW` and the settings in its config.yaml"
            )
        kept = {name: attributes[name] for name in ("d_model", "dtype", "block_rows", "shard_rows")}
        return cls(tuple(attributes["sites"]), tuple(attributes["layers"]), **kept)
