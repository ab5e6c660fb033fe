"""Rows of a graph: the edges into each target, as a matrix or as each target's strongest edges alone.

Both kinds hold `values [R, W]`, one row a target: a row's numbers are what its target's input is made of, so totals and
edge scores are those of that matrix. In `DenseRows` the columns are the graph's N nodes. In `SparseRows` the first k
columns are the strongest edges from features, whichever those are, and the other columns are all nodes that are no
feature: errors, embeddings and biases have a value in every row. What must know where a value comes from (sums by
source, paths, files) asks the rows.
"""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...data.errors import UserError

CHUNK = 2**20  # numbers that are looked at together: bounds what a pass needs beyond the rows
LISTED_BELOW = 0.25  # share of non-zero edges below which a matrix is stored as a list of edges


def rows_at_once(width: int) -> int:
    """How many rows of this width are looked at together."""
    return max(1, CHUNK // max(1, width))


def row_blocks(rows: Tensor) -> list[slice]:
    """All of `rows [R, W]`, as many at once as are looked at together."""
    step = rows_at_once(rows.shape[1])
    return [slice(start, start + step) for start in range(0, len(rows), step)]


def move_to_errors(rows: Tensor, cancelled: Tensor, moved: Tensor, error_of: Tensor) -> None:
    """Add the edges `moved [R, M]` of sources that go to the error column `error_of [M]` of their place, in place.

    Sums stay what they were; what cancels on the way is booked in `cancelled`, as absolute input from errors.
    """
    # features in a graph's order come place by place: then nothing has to be sorted
    in_order = bool((error_of[1:] >= error_of[:-1]).all())
    places, column = (torch.unique_consecutive if in_order else torch.unique)(error_of, return_inverse=True)
    if len(places) and places[0] < 0:
        raise UserError("this graph has no error nodes to add to what is left out of it")
    for some in row_blocks(moved):
        part_MR = moved[some].T
        before = rows[some, places]
        added = torch.zeros(len(places), part_MR.shape[1], dtype=rows.dtype, device=rows.device)
        after = before + added.index_add_(0, column, part_MR.contiguous()).T
        cancelled[some] += (before.abs() - after.abs()).sum(1) + part_MR.abs().sum(0)
        rows[some, places] = after
    cancelled.clamp_(min=0)  # rounding


class EdgeList(NamedTuple):
    """Edges side by side."""

    row: Tensor
    """[E] the target, as a row of the graph."""
    source: Tensor
    """[E] the node that it comes from."""
    value: Tensor
    """[E] what the source adds to the target."""


@dataclass(frozen=True, eq=False)
class Rows(ABC):
    """What both kinds of rows can do."""

    values: Tensor
    """[R, W]: each row sums to its target's input."""

    def __len__(self) -> int:
        return len(self.values)

    @property
    @abstractmethod
    def width(self) -> int:
        """How many sources there are, N."""

    @abstractmethod
    def dense(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """These rows as a matrix over all sources, [C, N]."""

    @abstractmethod
    def add_by_source(self, total_N: Tensor, rows: Tensor | slice, size_CW: Tensor, weight_C: Tensor) -> None:
        """Add up by source the values of these rows, each row times its weight; may change `size_CW`."""

    @abstractmethod
    def sources(self) -> Tensor:
        """The source of every value: [N], or [R, W] where rows differ in it."""

    @abstractmethod
    def sources_at(self, rows: slice, row: Tensor, column: Tensor) -> Tensor:
        """The sources of single values of some rows."""

    @abstractmethod
    def over_values(self, mask_N: Tensor) -> Tensor:
        """[W] for each column of the values what a mask over the nodes says, which is true of all features."""

    @abstractmethod
    def linked(self) -> Tensor:
        """[N] the nodes that an edge comes from."""

    @abstractmethod
    def moved_to_errors(self, gone: Tensor, cancelled: Tensor, error_of: Tensor) -> tuple["Rows", Tensor]:
        """The rows without the values `gone [R, W]`, which are added to the error of their source's place,
        `error_of [N]`; what cancels there is added to `cancelled`."""

    @abstractmethod
    def subset(self, rows: Tensor, keep: Tensor, cancelled: Tensor, error_of: Tensor) -> tuple["Rows", Tensor]:
        """These rows, with the features of `keep [n_features]` alone; the others' edges go to the errors."""

    @abstractmethod
    def to(self, device: torch.device | str) -> "Rows":
        """The rows on a device."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of them; `rows_of_tensors` reads it."""

    def blocks(self) -> list[slice]:
        """All rows, as many at once as are looked at together."""
        return row_blocks(self.values)

    def edges(self) -> Iterator[EdgeList]:
        """All edges that are not zero, row by row, a block at a time."""
        for some in self.blocks():
            yield self._listed(some, self.values[some] != 0)

    def count(self) -> int:
        """How many edges are not zero."""
        return sum(int(self.values[some].count_nonzero()) for some in self.blocks())

    def strongest(self, weight_R: Tensor, most: int) -> tuple[EdgeList, Tensor]:
        """The `most` edges with the largest |value| times their row's weight, the largest first, and those products."""
        none = torch.zeros(0, dtype=torch.long, device=self.values.device)
        carried = self.values.new_zeros(0)
        best = EdgeList(none, none, carried)
        for some in self.blocks():
            strength_CW = self.values[some].abs() * weight_R[some, None]
            chosen = strength_CW > (carried[-1] if 0 < len(carried) == most else 0)
            both = EdgeList(*map(torch.cat, zip(best, self._listed(some, chosen))))
            strength = torch.cat([carried, strength_CW[chosen]])
            carried, order = strength.topk(min(most, len(strength)))
            best = EdgeList(*(column[order] for column in both))
        return best, carried

    def _listed(self, rows: slice, chosen: Tensor) -> EdgeList:
        """The edges at places `chosen [C, W]` of some rows."""
        row, column = chosen.nonzero(as_tuple=True)
        return EdgeList(row + rows.start, self.sources_at(rows, row, column), self.values[rows][row, column])


@dataclass(frozen=True, eq=False)
class DenseRows(Rows):
    """`[R, N]` edges as a matrix, the features being the first columns of N."""

    @property
    def width(self) -> int:
        return self.values.shape[1]

    def dense(self, rows: Tensor | slice = slice(None)) -> Tensor:
        return self.values[rows]

    def add_by_source(self, total_N: Tensor, rows: Tensor | slice, size_CW: Tensor, weight_C: Tensor) -> None:
        total_N += weight_C @ size_CW

    def sources(self) -> Tensor:
        return torch.arange(self.width, device=self.values.device)

    def sources_at(self, rows: slice, row: Tensor, column: Tensor) -> Tensor:
        return column

    def over_values(self, mask_N: Tensor) -> Tensor:
        return mask_N

    def linked(self) -> Tensor:
        linked = torch.zeros(self.width, dtype=torch.bool, device=self.values.device)
        for some in self.blocks():
            linked |= (self.values[some] != 0).any(0)
        return linked

    def moved_to_errors(self, gone: Tensor, cancelled: Tensor, error_of: Tensor) -> tuple[Rows, Tensor]:
        rows, cancelled = self.values.masked_fill(gone, 0), cancelled.clone()
        sources = (gone.any(0) & (self.values != 0).any(0)).nonzero().squeeze(1)
        if len(sources):
            move_to_errors(rows, cancelled, self.values[:, sources] * gone[:, sources], error_of[sources])
        return DenseRows(rows), cancelled

    def subset(self, rows: Tensor, keep: Tensor, cancelled: Tensor, error_of: Tensor) -> tuple[Rows, Tensor]:
        stays = torch.cat([keep, keep.new_ones(self.width - len(keep))])
        ids, gone = stays.nonzero().squeeze(1), (~stays).nonzero().squeeze(1)
        chosen, cancelled = self.values[rows][:, ids], cancelled[rows].clone()
        if len(gone):
            place = torch.where(error_of < 0, -1, (stays.cumsum(0) - 1)[error_of])
            move_to_errors(chosen, cancelled, self.values[rows][:, gone], place[gone])
        return DenseRows(chosen), cancelled

    def to(self, device: torch.device | str) -> Rows:
        return DenseRows(self.values.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """The matrix as it is, or as a list of edges where most are zero."""
        rows = self.values
        edges = (rows != 0).sum()
        if edges > LISTED_BELOW * rows.numel():
            return {"rows": rows}
        places = rows.flatten().nonzero().squeeze(1)
        values, scale = rows.flatten()[places], row_scales(rows)
        of_edges = scale.repeat_interleave((rows != 0).sum(1))
        halves = (values / of_edges).half()
        if torch.equal(halves.to(rows) * of_edges, values):  # as `rounded` leaves them
            packed = {"rows.halves": halves, "rows.scales": scale}
        else:
            packed = {"rows.values": values}
        return packed | {"rows.shape": torch.tensor(rows.shape), "rows.gaps": packed_places(places)}

    def rounded(self) -> "DenseRows":
        """Each value to the nearest that takes two bytes in a file: off by 1 in 2,000 of itself, or by 2 in 10^12 of
        the row's largest."""
        scale = row_scales(self.values)[:, None]
        return DenseRows((self.values / scale).half().to(self.values).mul_(scale))


@dataclass(frozen=True, eq=False)
class SparseRows(Rows):
    """`[R, N]` edges of which those from features are each row's strongest: `values [R, k + M]`, the k edges from
    features, then those from the M other nodes."""

    columns: Tensor
    """[R, k] int32: where the edges from features come from; where a value is zero, any feature."""
    n_features: int

    @property
    def width(self) -> int:
        return self.n_features + self.values.shape[1] - self.columns.shape[1]

    def dense(self, rows: Tensor | slice = slice(None)) -> Tensor:
        values, columns = self.values[rows], self.columns[rows].long()
        full = values.new_zeros(len(values), self.width)
        full.scatter_add_(1, columns, values[:, : columns.shape[1]])
        full[:, self.n_features :] = values[:, columns.shape[1] :]
        return full

    def add_by_source(self, total_N: Tensor, rows: Tensor | slice, size_CW: Tensor, weight_C: Tensor) -> None:
        k, weighted = self.columns.shape[1], size_CW.mul_(weight_C[:, None])
        total_N[self.n_features :] += weighted[:, k:].sum(0)
        total_N.index_add_(0, self.columns[rows].long().flatten(), weighted[:, :k].flatten())

    def sources(self) -> Tensor:
        others = torch.arange(self.n_features, self.width, device=self.columns.device)
        return torch.cat([self.columns.long(), others.expand(len(self), -1)], 1)

    def sources_at(self, rows: slice, row: Tensor, column: Tensor) -> Tensor:
        k = self.columns.shape[1]
        from_feature = column < k
        source = column + (self.n_features - k)
        source[from_feature] = self.columns[rows][row[from_feature], column[from_feature]].long()
        return source

    def over_values(self, mask_N: Tensor) -> Tensor:
        return torch.cat([mask_N.new_ones(self.columns.shape[1]), mask_N[self.n_features :]])

    def linked(self) -> Tensor:
        k = self.columns.shape[1]
        linked = torch.zeros(self.width, dtype=torch.bool, device=self.values.device)
        linked[self.columns[self.values[:, :k] != 0].long()] = True
        for some in self.blocks():
            linked[self.n_features :] |= (self.values[some, k:] != 0).any(0)
        return linked

    def moved_to_errors(self, gone: Tensor, cancelled: Tensor, error_of: Tensor) -> tuple["SparseRows", Tensor]:
        k = self.columns.shape[1]
        values, cancelled = torch.empty_like(self.values), cancelled.clone()
        for some in self.blocks():
            moved = self.values[some] * gone[some]
            before = self.values[some].masked_fill(gone[some], 0)
            part = SparseRows(before, self.columns[some], self.n_features)
            place = (error_of[part.sources()] - self.n_features + k).clamp(min=0)
            after = before.scatter_add(1, place, moved)
            cancelled[some] += (before.abs() - after.abs()).sum(1) + moved.abs().sum(1)
            values[some] = after
        return SparseRows(values, self.columns, self.n_features), cancelled.clamp_(min=0)

    def subset(self, rows: Tensor, keep: Tensor, cancelled: Tensor, error_of: Tensor) -> tuple[Rows, Tensor]:
        """Gives a matrix where that takes no more memory."""
        k = self.columns.shape[1]
        chosen = SparseRows(self.values[rows], self.columns[rows], self.n_features)
        gone = torch.zeros_like(chosen.values, dtype=torch.bool)
        gone[:, :k] = ~keep[chosen.columns.long()]
        moved, cancelled = chosen.moved_to_errors(gone, cancelled[rows], error_of)
        count = int(keep.sum())
        place = (keep.cumsum(0) - 1).clamp(min=0)
        columns = place[chosen.columns.long()]
        if count <= 2 * k:
            rest = moved.values[:, k:]
            features = rest.new_zeros(len(rest), count)
            if count:
                features.scatter_add_(1, columns, moved.values[:, :k])
            return DenseRows(torch.cat([features, rest], 1)), cancelled
        return SparseRows(moved.values, columns.int(), count), cancelled

    def to(self, device: torch.device | str) -> Rows:
        return SparseRows(self.values.to(device), self.columns.to(device), self.n_features)

    def tensors(self) -> dict[str, Tensor]:
        sizes = torch.tensor([self.n_features])
        return {"strongest.values": self.values, "strongest.columns": self.columns, "strongest.features": sizes}


def row_scales(rows: Tensor) -> Tensor:
    """[R] powers of two of which each row's largest value is 2^14 to 2^15, which two bytes hold."""
    largest = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))
    exponent = torch.frexp(largest).exponent.clamp(min=-100)
    return torch.ldexp(torch.ones_like(largest), exponent - 15)


def packed_places(places: Tensor) -> Tensor:
    """Rising places as compressed bytes: the gaps between them, 255 for each whole 255 of a gap, then what is left."""
    gaps = torch.diff(places.cpu(), prepend=torch.tensor([-1]))
    length = gaps // 255 + 1
    gap_bytes = torch.full((int(length.sum()),), 255, dtype=torch.uint8)
    gap_bytes[length.cumsum(0) - 1] = (gaps % 255).to(torch.uint8)
    return as_tensor(zlib.compress(gap_bytes.numpy().tobytes(), 1))


def unpacked_places(packed: Tensor) -> Tensor:
    """What `packed_places` was given."""
    gap_bytes = as_tensor(zlib.decompress(packed.cpu().numpy().tobytes()))
    return gap_bytes.long().cumsum(0)[gap_bytes < 255] - 1


def as_tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())


def rows_of_tensors(tensors: dict[str, Tensor]) -> Rows:
    """The rows that `Rows.tensors` gave to a file."""
    if "strongest.values" in tensors:
        features = int(tensors["strongest.features"])
        return SparseRows(tensors["strongest.values"], tensors["strongest.columns"], features)
    if "rows" in tensors:
        return DenseRows(tensors["rows"])
    places = unpacked_places(tensors["rows.gaps"])
    shape = tensors["rows.shape"].tolist()
    if "rows.halves" in tensors:
        scale = tensors["rows.scales"][(places // shape[1]).to(tensors["rows.scales"].device)]
        values = tensors["rows.halves"].to(scale) * scale
    else:
        values = tensors["rows.values"]
    rows = values.new_zeros(shape)
    rows.view(-1)[places.to(rows.device)] = values
    return DenseRows(rows)
