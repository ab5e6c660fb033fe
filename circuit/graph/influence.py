"""Influence, scores and pruning of an attribution graph, as pure functions of tensors.

A graph is a DAG whose only targets are features and logits, so it is held as the rows of its targets alone:
`rows [R, N]`, row r being the edges into node `row_ids[r]`. With `A^ = |rows|`, each row divided by its total,
the influence of a node on the logits is `w^T (A^ + A^2 + ...)`. Nodes of one layer never feed each other, so one
pass over the rows from the last layer to the first gives the whole sum: no inverse, no power, no N^2 copy.

`cancelled [R]` is absolute input that was moved into the errors (by pruning, or by a cap on nodes) and cancels
there: it counts as input from errors, so that a smaller graph never looks better explained than a larger one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..precision import wide, widest
from .rows import Rows, row_blocks, rows_at_once

BINS = 2**16  # bins of the histogram that finds an edge threshold without sorting


class Influence(NamedTuple):
    nodes: Tensor
    """[N] influence of every node on the targets of interest (the logits' own weight not included)."""
    per_input: Tensor
    """[R] influence of each row's node, logit weight included, divided by the row's total input: times |edge| it is
    the edge's score."""
    cancelled: Tensor
    """[] influence of the input that was moved into the errors and cancels there."""


def find_influence(
    rows: Rows, row_ids: Tensor, depth: Tensor, weights: Tensor, cancelled: Tensor, counted: Tensor | None = None
) -> Influence:
    """One pass over `rows [R, N]`, the edges into nodes `row_ids [R]`, in topological order.

    `depth [R]` orders the rows: an edge always comes from a node of smaller depth. `weights [N]` is the
    logit probability on logit nodes and zero elsewhere. `counted [N]` leaves sources out, as if they had no edges.
    """
    counted_W = None if counted is None else rows.over_values(counted)
    values = rows.values
    total_N = weights.to(values.dtype).clone()
    per_input_R = values.new_zeros(len(values))
    step = rows_at_once(values.shape[1])
    for ids in by_depth(depth):
        added_N = torch.zeros_like(total_N)
        for some in ids.split(step):
            chosen = run_or_ids(some)
            size_CN = values[chosen].abs() if counted_W is None else values[chosen].abs() * counted_W
            norm_C = size_CN.sum(1) + cancelled[some]
            per_input_C = torch.where(norm_C > 0, total_N[row_ids[some]] / norm_C.clamp(min=1e-38), 0.0)
            rows.add_by_source(added_N, chosen, size_CN, per_input_C)
            per_input_R[some] = per_input_C
        total_N += added_N
    return Influence(total_N - weights.to(values.dtype), per_input_R, (per_input_R * cancelled).sum())


def by_depth(depth: Tensor) -> list[Tensor]:
    """The rows of each depth, the deepest first."""
    order = depth.argsort(descending=True, stable=True)
    counts = torch.unique_consecutive(depth[order], return_counts=True)[1]
    return list(order.split(counts.tolist()))


def run_or_ids(ids: Tensor) -> Tensor | slice:
    """A slice where the ids are a run, which spares a copy."""
    first, last = int(ids[0]), int(ids[-1])
    return slice(first, last + 1) if last - first + 1 == len(ids) else ids


class Shares(NamedTuple):
    """What explains a graph's logits, as sums of influence."""

    inputs: float
    """Influence of embeddings."""
    errors: float
    """Of errors, and of input that was moved into them and cancels there."""
    kept: float
    """Of the model's own output where it is left to the model by decree."""
    through: float
    """Of the targets, whose input is weighed: the logits' own weight, and influence of features."""

    @property
    def replacement(self) -> float:
        """How much of what is explained comes from the tokens."""
        return self.inputs / (self.inputs + self.errors) if self.inputs + self.errors > 0 else 0.0

    @property
    def completeness(self) -> float:
        """The mean over targets of the share of their input that is no error: conservation of flow makes it a quotient
        of sums."""
        return 1 - self.errors / self.through

    @property
    def completeness_over_all(self) -> float:
        """The mean over all nodes, of which those without input count as fully explained."""
        return 1 - self.errors / (self.through + self.inputs + self.errors + self.kept)


def shares_of(found: Influence, weights: Tensor, feature: Tensor, error: Tensor, kept: Tensor, given: Tensor) -> Shares:
    """The sums of one influence; the masks [N] say what is a feature, error, kept output, embedding."""
    total = lambda mask: float(found.nodes[mask].sum())
    return Shares(
        inputs=total(given),
        errors=total(error) + float(found.cancelled),
        kept=total(kept),
        through=float(weights.sum()) + total(feature),
    )


def fewest_nodes(influence_N: Tensor, share: float) -> Tensor:
    """Mask of the fewest nodes whose influence reaches `share` of the total."""
    order = influence_N.argsort(descending=True, stable=True)
    reached = wide(influence_N[order]).cumsum(0)
    keep = torch.zeros_like(influence_N, dtype=torch.bool)
    if len(order) == 0 or float(reached[-1]) <= 0:
        return keep
    count = int((reached < share * reached[-1]).sum()) + 1
    keep[order[:count]] = True
    return keep & (influence_N > 0)


def cumulative_share(influence_N: Tensor) -> Tensor:
    """[N] share of all influence that is reached at each node's rank: small = important."""
    order = influence_N.argsort(descending=True, stable=True)
    reached = wide(influence_N[order]).cumsum(0)
    share = torch.ones_like(reached)
    if len(order) and float(reached[-1]) > 0:
        share[order] = reached / reached[-1]
    return share.to(influence_N.dtype)


def fewest_edges(values: Tensor, per_input: Tensor, share: float) -> Tensor:
    """Mask [R, W] of the fewest edges whose scores `|values| * per_input` reach `share` of the total.

    A histogram over the leading 16 bits of each score finds the bin in which the share is reached, and only the
    edges of that bin are sorted: the result is that of a full sort. Scores are looked at a chunk at a time, twice.
    """
    chunks = row_blocks(values)
    keep = torch.zeros_like(values, dtype=torch.bool)
    mass = torch.zeros(BINS, dtype=widest(values.device), device=values.device)
    for some in chunks:
        score_CN, bin_CN = _binned(values[some], per_input[some])
        mass.index_add_(0, bin_CN.flatten(), wide(score_CN.flatten()))
    above = mass.flip(0).cumsum(0).flip(0)  # mass in this bin and those above
    goal = share * above[0]
    if float(goal) <= 0:
        return keep
    edge_bin = int((above >= goal).nonzero().max())
    places, candidates = [], []
    for some in chunks:
        score_CN, bin_CN = _binned(values[some], per_input[some])
        keep[some] = (bin_CN > edge_bin) & (score_CN > 0)
        inside = ((bin_CN == edge_bin) & (score_CN > 0)).flatten().nonzero().squeeze(1)
        places.append(inside + some.start * values.shape[1])
        candidates.append(score_CN.flatten()[inside])
    scores, order = wide(torch.cat(candidates)).sort(descending=True, stable=True)
    reached = (above[edge_bin] - mass[edge_bin]) + scores.cumsum(0)
    count = int((reached < goal).sum()) + 1
    keep.view(-1)[torch.cat(places)[order[:count]]] = True
    return keep


def _binned(values: Tensor, per_input: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of edges, and the bin of each: positive floats order as their bits do."""
    score = values.abs().float() * per_input.float()[:, None]
    return score, score.view(torch.int32) >> 15
