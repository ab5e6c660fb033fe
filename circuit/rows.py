"""Rows of a graph while they are found: where they stand, and what is dropped when memory or a cap asks for it."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from .backward import Edges
from .influence import CHUNK, influence, move_to_errors
from .nodes import Nodes


def allocate(rows: int, columns: int, most_bytes: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised matrix: in memory, or mapped from a file without a name where it is larger than allowed."""
    if rows * columns * dtype.itemsize <= most_bytes or device.type != "cpu":
        return torch.empty(rows, columns, dtype=dtype, device=device)
    with tempfile.TemporaryDirectory() as folder:  # the mapping keeps the file alive after its name is gone
        path = Path(folder) / "rows"
        return torch.from_file(str(path), shared=True, size=rows * columns, dtype=dtype).view(rows, columns)


class Rows:
    """Rows over all nodes of `nodes`, features first and logits last.

    With room for every feature's row, each stands where it stands in the graph. Otherwise (`most` fewer) rows come in
    the order in which they are asked for, logits first; and when the next would not fit in `most_bytes`, the columns
    of the least influential features are added to the errors for good, so that all rows to come do.
    """

    def __init__(
        self,
        nodes: Nodes,
        probabilities: Tensor,
        run_order: Tensor,
        most: int,
        most_bytes: float,
        top_k: int | None,
        dtype: torch.dtype,
    ):
        self.nodes, self.probabilities = nodes, probabilities
        self.top_k, self.most_bytes, self.dtype = top_k, most_bytes, dtype
        self.n_features, self.n_logits = len(run_order), len(probabilities)
        self.device = run_order.device
        self.capped = most < self.n_features
        self.total = min(most, self.n_features) + self.n_logits
        self.rank = torch.empty_like(run_order)
        self.rank[run_order] = torch.arange(self.n_features, device=self.device)
        errors = nodes.mask("error").nonzero().squeeze(1)
        length = int(nodes.position[errors].max()) + 1
        self.error_of = int(errors[0]) + nodes.layer[: self.n_features] * length + nodes.position[: self.n_features]

        self.kept = torch.arange(len(nodes), device=self.device)  # nodes that have a column
        self.row_of = torch.full((len(nodes),), -1, device=self.device)
        self.node_of = torch.empty(self.total, dtype=torch.long, device=self.device)
        self.left_out = torch.zeros(self.total, dtype=dtype, device=self.device)
        self.filled = 0
        height = self.total
        if self.capped:
            height = min(height, max(self.n_logits, int(most_bytes // (dtype.itemsize * len(nodes)))))
        self.rows = allocate(height, len(nodes), most_bytes, dtype, self.device)

    def add(self, ids: Tensor, edges: Edges) -> Tensor:
        """Store the rows of nodes `ids`; gives each one's sum."""
        block = torch.cat([edges.features[self.rank], *(part.flatten(0, 1) for part in edges[1:])]).T
        block = torch.cat([block, block.new_zeros(len(block), self.n_logits)], 1)
        sums = block.sum(1, dtype=torch.promote_types(self.dtype, torch.float32))
        left_out = block.new_zeros(len(block))
        if self.top_k is not None and self.top_k < self.n_features:
            self._keep_strongest(block, left_out)
        if self.capped:
            place = torch.arange(self.filled, self.filled + len(ids), device=self.device)
            if self.filled + len(ids) > len(self.rows):
                self._narrow()
            block = self._kept_columns(block, left_out)
        else:
            place = torch.where(ids < self.n_features, ids, ids - len(self.nodes) + self.total)
        self.rows[place] = block
        self.left_out[place] = left_out
        self.row_of[ids], self.node_of[place] = place, ids
        self.filled += len(ids)
        return sums

    def _keep_strongest(self, block: Tensor, left_out: Tensor) -> None:
        """Each row's strongest edges from features stay, in place."""
        features = block[:, : self.n_features]
        weak = torch.ones_like(features, dtype=torch.bool)
        weak.scatter_(1, features.abs().topk(self.top_k or 0, dim=1).indices, False)
        moved = features * weak
        features.masked_fill_(weak, 0)
        move_to_errors(block, left_out, moved, self.error_of)

    def _kept_columns(self, block: Tensor, left_out: Tensor) -> Tensor:
        """A full block with the columns that are kept; the others are added to errors."""
        if len(self.kept) == len(self.nodes):
            return block
        gone = torch.ones(len(self.nodes), dtype=torch.bool, device=self.device)
        gone[self.kept] = False
        gone = gone.nonzero().squeeze(1)
        move_to_errors(block, left_out, block[:, gone], self.error_of[gone])
        return block[:, self.kept]

    def influence(self) -> Tensor:
        """[number of kept nodes] influence on the logits by way of the rows found so far."""
        nodes_R = self.node_of[: self.filled]
        is_logit = nodes_R >= len(self.nodes) - self.n_logits
        depth = self.nodes.layer[nodes_R].masked_fill(is_logit, 2**31)
        weights = torch.zeros(len(self.nodes), dtype=self.dtype, device=self.device)
        weights[len(weights) - self.n_logits :] = self.probabilities.to(weights)
        rows, left_out = self.rows[: self.filled], self.left_out[: self.filled]
        return influence(rows, self._column_of()[nodes_R], depth, weights[self.kept], left_out).nodes

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

    def _narrow(self) -> None:
        """Drop the columns of the least influential features, so that all rows that may come fit."""
        width = int(self.most_bytes // (self.dtype.itemsize * self.total))
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
        rows = allocate(self.total, len(self.kept), torch.inf, self.dtype, self.device)
        self._copy(rows, torch.arange(self.filled, device=self.device), before, gone)
        self.rows = rows

    def _copy(self, into: Tensor, chosen: Tensor, column_of: Tensor, gone: Tensor) -> None:
        """Rows `chosen`, in that order, with the kept columns alone; those of features `gone` go to the errors."""
        step = max(1, CHUNK // self.rows.shape[1])
        for start in range(0, len(chosen), step):
            some = chosen[start : start + step]
            rows, left_out = self.rows[some], self.left_out[some]
            if len(gone):
                move_to_errors(rows, left_out, rows[:, column_of[gone]], column_of[self.error_of[gone]])
                self.left_out[some] = left_out
            into[start : start + len(some)] = rows[:, column_of[self.kept]]

    def finish(self) -> tuple[Nodes, Tensor, Tensor]:
        """Nodes, rows and left-out input of the graph: the features that have a row, and all other nodes."""
        if not self.capped:
            return self.nodes, self.rows, self.left_out
        column_of = self._column_of()
        chosen = self.row_of >= 0
        gone = ((column_of >= 0) & ~chosen)[: self.n_features].nonzero().squeeze(1)
        chosen[self.n_features :] = True
        self.kept = chosen.nonzero().squeeze(1)
        order = self.row_of[self.row_of >= 0]  # by node, which is a graph's order
        rows = allocate(self.filled, len(self.kept), torch.inf, self.dtype, self.device)
        self._copy(rows, order, column_of, gone)
        return self.nodes.select(self.kept), rows, self.left_out[order]
