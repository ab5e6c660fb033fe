"""Rows of a graph while they are found: where they stand, and what is dropped when memory or a cap asks for it.

`WholeTable` has room for every feature's row, each where it stands in the graph. `CappedTable` takes rows in the order
in which they are asked for, logits first, and drops columns when the next would not fit. `StrongestTable` keeps each
row's strongest edges from features alone, in either order.
"""

import mmap
import shutil
import tempfile
from bisect import bisect_left
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from ...data.errors import UserError
from ..graph import DenseRows, Nodes, Rows, SparseRows, find_influence, move_to_errors, rows_at_once
from .backward import EdgeColumns


def allocate(rows: int, columns: int, most_bytes: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A matrix of zeros: in memory, or mapped from a file without a name where it is larger than allowed.

    On a CPU its pages take memory when they are first written to: what stays zero (nothing comes from later layers)
    costs nothing.
    """
    size = rows * columns
    if device.type != "cpu" or size == 0:
        return torch.zeros(rows, columns, dtype=dtype, device=device)
    if size * dtype.itemsize <= most_bytes:
        memory = mmap.mmap(-1, size * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(memory, dtype=dtype).view(rows, columns)
    with tempfile.TemporaryDirectory() as folder:  # the mapping keeps the file alive after its name is gone
        needed, free = size * dtype.itemsize, shutil.disk_usage(folder).free
        if needed > free:  # writing to a mapping when the disk is full ends the process
            raise UserError(
                f"the graph's rows may take {needed / 2**30:.1f} GiB, more than trace.memory={most_bytes / 2**30:g},"
                f" and {Path(folder).parent} has {free / 2**30:.1f} GiB free; set trace.max_nodes, or make it smaller"
            )
        path = Path(folder) / "rows"
        return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(rows, columns)


class RowTable:
    """What all have in common: rows over the nodes of `nodes`, features first and logits last."""

    def __init__(self, nodes: Nodes, probabilities: Tensor, run_order: Tensor, most: int, dtype: torch.dtype):
        self.nodes, self.probabilities, self.dtype = nodes, probabilities, dtype
        self.n_features, self.n_logits = len(run_order), len(probabilities)
        self.device = run_order.device
        self.capped = most < self.n_features
        self.total = min(most, self.n_features) + self.n_logits
        self.rank = torch.empty_like(run_order)
        self.rank[run_order] = torch.arange(self.n_features, device=self.device)
        errors = nodes.mask("error", "kept").nonzero().squeeze(1)
        length = int(nodes.position[errors].max()) + 1
        self.error_of = int(errors[0]) + nodes.layer[: self.n_features] * length + nodes.position[: self.n_features]

        self.error_in_run_order = self.error_of[run_order]  # features of one place are neighbours there

        self.kept = torch.arange(len(nodes), device=self.device)  # nodes that have a column
        self.row_of = torch.full((len(nodes),), -1, device=self.device)
        self.node_of = torch.empty(self.total, dtype=torch.long, device=self.device)
        self.cancelled = torch.zeros(self.total, dtype=dtype, device=self.device)
        self.filled = 0
        self.dropped = 0
        """Features whose columns went before it was known which features the graph keeps."""

    def add(self, ids: Tensor, edges: EdgeColumns, layers: list[int]) -> Tensor:
        """Store the rows of nodes `ids`, which read at `layers`, the last first; gives each one's sum."""
        if self.capped:
            place = torch.arange(self.filled, self.filled + len(ids), device=self.device)
        else:
            place = torch.where(ids < self.n_features, ids, ids - len(self.nodes) + self.total)
        self._store(place, edges, layers)
        self.row_of[ids], self.node_of[place] = place, ids
        self.filled += len(ids)
        sums = edges.features.sum(0)
        for part in edges[1:]:
            sums += part.flatten(0, 1).sum(0)
        return sums

    def _store(self, place: Tensor, edges: EdgeColumns, layers: list[int]) -> None:
        raise NotImplementedError

    def _others(self, edges: EdgeColumns) -> Tensor:
        """[B, M] edges from all that is no feature."""
        parts = [part.flatten(0, 1) for part in edges[1:]]
        return torch.cat([*parts, parts[0].new_zeros(self.n_logits, parts[0].shape[1])]).T

    def found(self) -> Rows:
        """The rows found so far, over the kept nodes."""
        raise NotImplementedError

    def influence(self) -> Tensor:
        """[number of kept nodes] influence on the logits by way of the rows found so far."""
        nodes_R = self.node_of[: self.filled]
        is_logit = nodes_R >= len(self.nodes) - self.n_logits
        depth = self.nodes.layer[nodes_R].masked_fill(is_logit, 2**31)
        weights = torch.zeros(len(self.nodes), dtype=self.dtype, device=self.device)
        weights[len(weights) - self.n_logits :] = self.probabilities.to(weights)
        cancelled = self.cancelled[: self.filled]
        return find_influence(self.found(), self._column_of()[nodes_R], depth, weights[self.kept], cancelled).nodes

    def next_features(self, count: int) -> Tensor:
        """The most influential features that have no row yet."""
        found, is_open = self.influence(), (self.kept < self.n_features) & (self.row_of[self.kept] < 0)
        candidates, strength = self.kept[is_open], found[is_open]
        best = strength.topk(min(count, len(strength)))
        return candidates[best.indices[best.values > 0]]

    def _column_of(self) -> Tensor:
        """[N] where each node's column stands, -1 for those that have none."""
        column_of = torch.full((len(self.nodes),), -1, device=self.device)
        column_of[self.kept] = torch.arange(len(self.kept), device=self.device)
        return column_of

    def finish(self) -> tuple[Nodes, Rows, Tensor]:
        """Nodes, rows and cancelled input of the graph: the features that have a row, and all other nodes."""
        raise NotImplementedError


class WholeTable(RowTable):
    """Every feature's row, at its place in the graph."""

    def __init__(self, *common, most_bytes: float):
        super().__init__(*common)
        self.rows = allocate(self.total, len(self.nodes), most_bytes, self.dtype, self.device)
        layer_of = self.nodes.layer[: self.n_features].tolist()
        self.below = [bisect_left(layer_of, layer) for layer in range(int(self.nodes.layer.max()) + 1)]
        """ActiveFeatures of earlier layers than each."""

    def _store(self, place: Tensor, edges: EdgeColumns, layers: list[int]) -> None:
        """Layer by layer, nothing but what may come from earlier ones: the rest of a row is zero already."""
        start = 0
        for layer, same in groupby(layers):
            columns = slice(start, start + len(list(same)))
            features = self.rank[: self.below[layer]]
            self._write(place[columns], 0, edges.features[:, columns][features])
            offset = self.n_features
            for part, written in zip(edges[1:], (layer, len(edges.embeddings), layer + 1)):
                self._write(place[columns], offset, part[:written, :, columns].flatten(0, 1))
                offset += part.shape[0] * part.shape[1]
            start = columns.stop

    def _write(self, place: Tensor, offset: int, part: Tensor) -> None:
        """EdgeColumns [n, C] of rows `place` from the sources that begin at `offset`."""
        if len(part):
            self.rows[:, offset : offset + len(part)].index_copy_(0, place, part.T.contiguous())

    def found(self) -> Rows:
        return DenseRows(self.rows[: self.filled])

    def finish(self) -> tuple[Nodes, Rows, Tensor]:
        return self.nodes, DenseRows(self.rows), self.cancelled


class CappedTable(RowTable):
    """Rows of the most influential features, in the order in which they are asked for.

    When the next would not fit in `most_bytes`, the columns of the least influential features are added to the errors
    for good, in place, so that all rows to come do.
    """

    def __init__(self, *common, most_bytes: float):
        super().__init__(*common)
        width = len(self.nodes)
        height = min(self.total, max(self.n_logits, int(most_bytes // (self.dtype.itemsize * width))))
        self.memory = allocate(1, height * width, torch.inf, self.dtype, self.device).view(-1)
        self.rows = self.memory.view(height, width)

    def _store(self, place: Tensor, edges: EdgeColumns, layers: list[int]) -> None:
        if self.filled + len(place) > len(self.rows):
            self._narrow()
        kept = self.rank[self.kept[self.kept < self.n_features]]
        features, others = edges.features[kept].T, self._others(edges)
        if len(kept) < self.n_features:
            others, self.cancelled[place] = self._with_dropped(others, edges.features.index_fill(0, kept, 0))
        self.rows[place] = torch.cat([features, others], 1)

    def _with_dropped(self, others: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """Edges [B, M] from all that is no feature, with those of features that have no column, `dropped [K, B]` in run
        order, added to the errors; and what cancels there."""
        errors, place = torch.unique_consecutive(self.error_in_run_order - self.n_features, return_inverse=True)
        added = dropped.new_zeros(len(errors), dropped.shape[1]).index_add_(0, place, dropped)
        before = others[:, errors]
        after = before + added.T
        cancelled = dropped.abs().sum(0) + (before.abs() - after.abs()).sum(1)
        return others.index_copy(1, errors, after), cancelled.clamp_(min=0)

    def found(self) -> Rows:
        return DenseRows(self.rows[: self.filled])

    def _narrow(self) -> None:
        """Drop the columns of the least influential features, so that all rows that may come fit."""
        width = len(self.memory) // self.total
        is_feature = self.kept < self.n_features
        room = max(self.total - self.n_logits, width - int((~is_feature).sum()))
        strength = self.influence()[is_feature]
        strength[self.row_of[self.kept[is_feature]] >= 0] = torch.inf
        best = strength.topk(min(room, len(strength))).indices.sort().values
        before = self._column_of()
        self.kept = torch.cat([self.kept[is_feature][best], self.kept[~is_feature]])
        gone = before[: self.n_features].clone()
        gone[self.kept[self.kept < self.n_features]] = -1
        gone = (gone >= 0).nonzero().squeeze(1)
        self.dropped += len(gone)
        needed = self.total * len(self.kept)
        memory = self.memory
        if needed > len(memory):  # not even the rows' own columns fit: more than was allowed
            memory = allocate(1, needed, torch.inf, self.dtype, self.device).view(-1)
        # each row's new place ends before the next one's old place begins
        into = memory[:needed].view(self.total, len(self.kept))
        self._copy(into, torch.arange(self.filled, device=self.device), before, gone)
        self.memory, self.rows = memory, into

    def _copy(self, into: Tensor, chosen: Tensor, column_of: Tensor, gone: Tensor) -> None:
        """Rows `chosen`, in that order, with the kept columns alone; those of features `gone` go to the errors."""
        step = rows_at_once(self.rows.shape[1])
        for start in range(0, len(chosen), step):
            some = chosen[start : start + step]
            rows, cancelled = self.rows[some], self.cancelled[some]
            if len(gone):
                move_to_errors(rows, cancelled, rows[:, column_of[gone]], column_of[self.error_of[gone]])
                self.cancelled[some] = cancelled
            into[start : start + len(some)] = rows[:, column_of[self.kept]]

    def finish(self) -> tuple[Nodes, Rows, Tensor]:
        column_of = self._column_of()
        chosen = self.row_of >= 0
        gone = ((column_of >= 0) & ~chosen)[: self.n_features].nonzero().squeeze(1)
        chosen[self.n_features :] = True
        self.kept = chosen.nonzero().squeeze(1)
        order = self.row_of[self.row_of >= 0]  # by node, which is a graph's order
        rows = allocate(self.filled, len(self.kept), torch.inf, self.dtype, self.device)
        self._copy(rows, order, column_of, gone)
        return self.nodes.select(self.kept), DenseRows(rows), self.cancelled[order]


class StrongestTable(RowTable):
    """Each row's `top_k` strongest edges from features, held as such from the start; the rest goes to the errors."""

    def __init__(self, *common, top_k: int):
        super().__init__(*common)
        self.top_k = top_k
        width = top_k + len(self.nodes) - self.n_features
        self.values = allocate(self.total, width, torch.inf, self.dtype, self.device)
        self.columns = torch.zeros(self.total, top_k, dtype=torch.int32, device=self.device)

    def _store(self, place: Tensor, edges: EdgeColumns, layers: list[int]) -> None:
        features, others = edges.features[self.rank].T.contiguous(), self._others(edges).contiguous()
        columns = features.abs().topk(self.top_k, dim=1).indices.sort(1).values
        strongest = features.gather(1, columns)
        cancelled = others.new_zeros(len(others))
        move_to_errors(others, cancelled, features.scatter_(1, columns, 0), self.error_of - self.n_features)
        self.values[place] = torch.cat([strongest, others], 1)
        self.columns[place] = columns.int()
        self.cancelled[place] = cancelled

    def found(self) -> Rows:
        return SparseRows(self.values[: self.filled], self.columns[: self.filled], self.n_features)

    def finish(self) -> tuple[Nodes, Rows, Tensor]:
        if not self.capped:
            return self.nodes, self.found(), self.cancelled
        chosen = self.row_of >= 0
        order = self.row_of[chosen]  # by node, which is a graph's order
        errors = torch.full((len(self.nodes),), self.n_features, device=self.device)
        errors[: self.n_features] = self.error_of
        rows, cancelled = self.found().subset(order, chosen[: self.n_features], self.cancelled, errors)
        chosen[self.n_features :] = True
        return self.nodes.select(chosen.nonzero().squeeze(1)), rows, cancelled
