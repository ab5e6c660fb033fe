"""What a harvest is asked for, and what it will weigh."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..errors import SettingsError, check_choice, check_range
from ..memory import host_memory
from ..models import SITES, check_sinks
from ..store import BLOCK_ROWS, DTYPES, SHUFFLE_ROWS, Place, StoreLayout
from ..units import parse_bytes, parse_count


@dataclass(frozen=True)
class HarvestSettings:
    path: str = ""
    """Folder or fsspec URL of the store."""

    mode: str = "disk"
    """`disk` keeps all rows; `streaming` keeps a ring of them that is refilled while training goes on."""

    budget: str = "50GB"
    """Disk that a streaming store may take."""

    dtype: str = "auto"
    """`float32`, `float16`, `bfloat16`, `int8`, or `auto`: float16 where the sample's largest value is an eighth of its
    largest number at most, else bfloat16 (and for a bfloat16 model)."""

    tokens: str = "10M"
    """Rows to keep for training, such as 200K, 100M or 1B; fewer where the corpus ends before."""

    held_out: str = "auto"
    """Rows to keep for evaluation; `auto` is a twentieth of the training rows, at most 256K; 0 for none."""

    layers: list[int] | None = None
    """Layers to keep, negative ones counted from the last; all if not given."""

    sites: list[str] = field(default_factory=lambda: ["resid", "mlp_out"])
    """Sites to keep, of `resid`, `mlp_in` and `mlp_out`."""

    fraction: float = 1.0
    """Share of the positions to keep, drawn at random."""

    sinks: str = "auto"
    """What is masked: `auto`, first positions, the token that begins texts, and rows whose norm stands apart; `first`,
    none by their norm; `none`, nothing; or a number, rows above so many medians of the residual stream's norm."""

    sample_tokens: int = 16384
    """Tokens of a first sample, on which attention sinks are found and the dtype is chosen."""

    batch_tokens: int = 16384
    """Tokens per forward pass."""

    shuffle_rows: int = SHUFFLE_ROWS
    """Rows are shuffled among at least so many others before they are written."""

    memory: str = "auto"
    """Memory for rows that wait to be shuffled, such as 8GB; by default a quarter of what this job may take."""

    scratch: str = ""
    """Folder of a fast local disk for rows that wait beyond that memory; beside the store if not given."""

    block_rows: int = BLOCK_ROWS
    """Rows that lie together on disk and are read together in every epoch."""

    shard_rows: int = 0
    """Rows per file; 0 chooses about 128 MiB of each site."""

    seed: int = 0
    """Seed of the shuffle."""

    def __post_init__(self):
        check_choice("store.mode", self.mode, ["disk", "streaming"])
        check_choice("store.dtype", self.dtype, ["auto", *DTYPES])
        for site in self.sites:
            check_choice("store.sites", site, SITES)
        if self.layers == []:
            raise SettingsError("store.layers is empty; leave it out to keep all layers")
        if not self.sites:
            raise SettingsError("store.sites is empty; it takes some of resid, mlp_in, mlp_out")
        check_range("store.tokens", parse_count(self.tokens), low=1)
        parse_bytes(self.budget)
        check_range("store.fraction", self.fraction, low=1e-6, high=1.0)
        check_sinks(self.sinks)
        for name in ("sample_tokens", "batch_tokens", "shuffle_rows", "block_rows"):
            check_range(f"store.{name}", getattr(self, name), low=1)
        if self.shard_rows % self.block_rows:
            raise SettingsError(
                f"store.shard_rows={self.shard_rows} is no multiple of store.block_rows={self.block_rows}"
            )

    @property
    def train_rows(self) -> int:
        return parse_count(self.tokens)

    @property
    def held_out_rows(self) -> int:
        if self.held_out == "auto":
            return min(self.train_rows // 20, 1 << 18)
        return parse_count(self.held_out, "store.held_out")

    def memory_bytes(self, processes: int = 1) -> int:
        return (host_memory() // 4 if self.memory == "auto" else parse_bytes(self.memory, "store.memory")) // processes


def make_layout(settings: HarvestSettings, n_layers: int, d_model: int, dtype: torch.dtype) -> StoreLayout:
    """The layout of a model's store."""
    layers = range(n_layers) if settings.layers is None else settings.layers
    for layer in layers:
        if not -n_layers <= layer < n_layers:
            raise SettingsError(f"store.layers={settings.layers} names layer {layer} of a model of {n_layers} layers")
    # until the sample has told `auto` which; bfloat16 takes as much room as float16
    guess = "bfloat16" if dtype == torch.bfloat16 else "float16"
    return StoreLayout(
        tuple(dict.fromkeys(settings.sites)),
        tuple(sorted({layer % n_layers for layer in layers})),
        d_model,
        guess if settings.dtype == "auto" else settings.dtype,
        settings.block_rows,
        settings.shard_rows,
    )


class Weight(NamedTuple):
    """What a harvest takes, in bytes."""

    store: int
    window: int
    """Rows that are shuffled together, at most."""
    spill: int
    """Room for windows that wait on the store's disk since memory has none for them."""
    free: int | None
    """What the store's disk has left, what lies there of this store included; None where nobody can tell."""

    @property
    def fits(self) -> bool:
        return self.free is None or self.store + self.spill <= self.free


def weigh(layout: StoreLayout, settings: HarvestSettings, processes: int = 1) -> Weight:
    """What the store that the settings ask for will take at most."""
    window = min(settings.train_rows, 2 * settings.shuffle_rows) * layout.row_bytes
    spills = 2 * window > settings.memory_bytes(processes) and not settings.scratch
    place = Place(settings.path)
    free = place.free() if settings.path else None
    there = sum(place.sizes("").values()) if free is not None else 0
    size = layout.total_bytes(settings.train_rows) + layout.total_bytes(settings.held_out_rows)
    return Weight(size, window, 2 * window * spills, None if free is None else free + there)
