"""What one rank needs from the others, as an object handed in from outside.

The numeric code of this room calls these methods and knows nothing of process groups; `SINGLE` is the answer on one
process, and `mesh.py` builds the distributed ones. Two axes: *feature* ranks hold different features of each
layer and see the same tokens; *data* ranks hold the same features and see different tokens.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor


class Collectives(Protocol):
    """The seam between the mathematics and the processes. Every rank makes the same calls in the same order."""

    data_rank: int
    data_ranks: int
    feature_rank: int
    feature_ranks: int
    slices: int
    """Into how many slices decoders are cut along their width: 1 where they are cut by feature, else feature_ranks."""
    files: Any
    """The processes as a group for what surrounds files: its waits may be long, and a thread may use it beside the
    training."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs and shared files."""
        ...

    def all_reduce_features(self, x: Tensor) -> Tensor:
        """Sum over feature shards. Backward is the identity, since every shard computes the same loss from the sum."""
        ...

    def all_reduce_data(self, x: Tensor) -> Tensor:
        """Sum over data ranks, without gradient (counts)."""
        ...

    def mean_data(self, x: Tensor) -> Tensor:
        """Mean over data ranks, without gradient."""
        ...

    def max_all(self, x: Tensor, files: bool = False) -> Tensor:
        """Largest over all ranks, elementwise (flags: a bad gradient, a request to stop)."""
        ...

    def reduce_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each gradient by its mean over data ranks, in place."""
        ...

    def top_threshold(self, values: Tensor, count: int) -> Tensor:
        """The count-th largest over all ranks' `values`: []. Fewer than that: the smallest of them.

        Each rank gives at least its `count` largest entries, or all it has.
        """
        ...

    def row_threshold(self, h_BF: Tensor, k: int) -> Tensor:
        """Each row's k-th largest over feature shards: [B, 1]. Fewer than k: the smallest."""
        ...

    def cat_features(self, x: Tensor, dim: int = 0) -> Tensor:
        """Concatenate the shards' `x` along its feature dimension (rare: export, resampling), without gradient."""
        ...

    def all_gather_features(self, x: Tensor) -> Tensor:
        """[m, ...]: every feature rank's `x`, all of one shape, without gradient."""
        ...

    def reduce_scatter_features(self, x: Tensor) -> Tensor:
        """[m, ...] -> [...]: of the sum over feature ranks, the entry of this one, without gradient."""
        ...

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This feature rank's part `x` as a DTensor of the whole, cut along `dim`, that shares its memory."""
        ...

    def barrier(self, files: bool = False) -> None:
        """Wait for every rank; `files` as in `max_all`: by the group for files."""
        ...

    def broadcast(self, value: Any) -> Any:
        """The main rank's plain value (numbers, strings, lists), on every rank."""
        ...


class SingleProcess:
    """One process: every collective is the identity."""

    data_rank = feature_rank = 0
    data_ranks = feature_ranks = slices = 1
    is_main = True
    files = None

    def all_reduce_features(self, x: Tensor) -> Tensor:
        return x

    def all_reduce_data(self, x: Tensor) -> Tensor:
        return x

    def mean_data(self, x: Tensor) -> Tensor:
        return x

    def max_all(self, x: Tensor, files: bool = False) -> Tensor:
        return x

    def reduce_gradients(self, parameters: Iterable[Tensor]) -> None:
        return None

    def top_threshold(self, values: Tensor, count: int) -> Tensor:
        return values.topk(min(count, values.numel())).values[-1]

    def row_threshold(self, h_BF: Tensor, k: int) -> Tensor:
        return h_BF.topk(min(k, h_BF.shape[-1]), dim=-1).values[..., -1:]

    def cat_features(self, x: Tensor, dim: int = 0) -> Tensor:
        return x

    def all_gather_features(self, x: Tensor) -> Tensor:
        return x[None]

    def reduce_scatter_features(self, x: Tensor) -> Tensor:
        return x[0]

    def shard(self, x: Tensor, dim: int) -> Tensor:
        return x

    def barrier(self, files: bool = False) -> None:
        return None

    def broadcast(self, value: Any) -> Any:
        return value


SINGLE: Collectives = SingleProcess()


def whole_rows(x: Tensor, comm: Collectives) -> Tensor:
    """[b, L, D] of each feature rank, which has read its own part -> [m b, L, D], layer by layer as batches lie.
    Bytes travel: whatever a store holds."""
    if comm.feature_ranks == 1:
        return x
    layers = x.transpose(0, 1).contiguous()
    parts = comm.all_gather_features(layers.view(torch.uint8)).view(x.dtype)
    return parts.transpose(0, 1).flatten(1, 2).transpose(0, 1)


def whole_batch(x: Tensor, comm: Collectives) -> Tensor:
    """All data ranks' rows [B, ...] in the order of the batch, of which each rank holds one stretch."""
    if comm.data_ranks == 1:
        return x
    slots = x.new_zeros(comm.data_ranks, *x.shape)
    slots[comm.data_rank] = x
    return comm.all_reduce_data(slots).flatten(0, 1)
