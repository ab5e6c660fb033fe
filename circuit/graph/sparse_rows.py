"""Rows of a graph that hold only each target's strongest edges from features.

Edges from features are held as values and columns; all other sources (errors, embeddings, biases) have a value in every
row, side by side with those. So totals and edge scores are those of one matrix, `values`, and only what is summed by
source looks at the columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 2**20  # numbers that are looked at together: bounds what a pass needs beyond the rows


def rows_at_once(width: int) -> int:
    """How many rows of this width are looked at together."""
    return max(1, CHUNK // max(1, width))


def row_blocks(rows: Tensor) -> list[slice]:
    """All of `rows [R, W]`, as many at once as are looked at together."""
    step = rows_at_once(rows.shape[1])
    return [slice(start, start + step) for start in range(0, len(rows), step)]


@dataclass(frozen=True, eq=False)
class SparseRows:
    """`[R, N]` edges, the features being the first columns of N."""

    values: Tensor
    """[R, k + M]: the k edges from features, then those from the M other nodes."""
    columns: Tensor
    """[R, k] int32: where the edges from features come from; where a value is zero, any feature."""
    n_features: int

    def __len__(self) -> int:
        return len(self.values)

    @property
    def width(self) -> int:
        """How many sources there are, N."""
        return self.n_features + self.values.shape[1] - self.columns.shape[1]

    def nonzero(self) -> int:
        """How many edges there are."""
        return int((self.values != 0).sum())

    def dense(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """These rows as a matrix over all sources."""
        values, columns = self.values[rows], self.columns[rows].long()
        full = values.new_zeros(len(values), self.width)
        full.scatter_add_(1, columns, values[:, : columns.shape[1]])
        full[:, self.n_features :] = values[:, columns.shape[1] :]
        return full

    def add_by_source(self, total_N: Tensor, rows: Tensor | slice, weighted: Tensor) -> None:
        """Add up by source what belongs to the values of these rows, `weighted [C, k + M]`."""
        k = self.columns.shape[1]
        total_N[self.n_features :] += weighted[:, k:].sum(0)
        total_N.index_add_(0, self.columns[rows].long().flatten(), weighted[:, :k].flatten())

    def sources(self) -> Tensor:
        """[R, k + M] the source of every value."""
        others = torch.arange(self.n_features, self.width, device=self.columns.device)
        return torch.cat([self.columns.long(), others.expand(len(self), -1)], 1)

    def moved_to_errors(self, gone: Tensor, left_out: Tensor, error_of: Tensor) -> tuple["SparseRows", Tensor]:
        """The rows without the values `gone [R, k + M]`, which are added to the error of their source's place,
        `error_of [N]`; what cancels there is added to `left_out`."""
        k = self.columns.shape[1]
        values, left_out = torch.empty_like(self.values), left_out.clone()
        for some in row_blocks(values):
            moved = self.values[some] * gone[some]
            before = self.values[some].masked_fill(gone[some], 0)
            part = SparseRows(before, self.columns[some], self.n_features)
            place = (error_of[part.sources()] - self.n_features + k).clamp(min=0)
            after = before.scatter_add(1, place, moved)
            left_out[some] += (before.abs() - after.abs()).sum(1) + moved.abs().sum(1)
            values[some] = after
        return SparseRows(values, self.columns, self.n_features), left_out.clamp_(min=0)

    def subset(
        self, rows: Tensor, keep: Tensor, left_out: Tensor, error_of: Tensor
    ) -> tuple["SparseRows | Tensor", Tensor]:
        """These rows, with the features of `keep [n_features]` alone; the others' edges go to the errors.

        Gives a matrix where that takes no more memory."""
        k = self.columns.shape[1]
        chosen = SparseRows(self.values[rows], self.columns[rows], self.n_features)
        gone = torch.zeros_like(chosen.values, dtype=torch.bool)
        gone[:, :k] = ~keep[chosen.columns.long()]
        moved, left_out = chosen.moved_to_errors(gone, left_out[rows], error_of)
        count = int(keep.sum())
        place = (keep.cumsum(0) - 1).clamp(min=0)
        columns = place[chosen.columns.long()]
        if count <= 2 * k:
            rest = moved.values[:, k:]
            features = rest.new_zeros(len(rest), count)
            if count:
                features.scatter_add_(1, columns, moved.values[:, :k])
            return torch.cat([features, rest], 1), left_out
        return SparseRows(moved.values, columns.int(), count), left_out
