"""Influence, scores and pruning of an attribution graph, as pure functions of tensors.

A graph is a DAG whose only targets are features and logits, so it is held as the rows of its targets alone:
`rows [R, N]`, row r being the edges into node `targets[r]`. With `A^ = |rows|`, each row divided by its total,
the influence of a node on the logits is `w^T (A^ + A^2 + ...)`. Nodes of one layer never feed each other, so one
pass over the rows from the last layer to the first gives the whole sum: no inverse, no power, no N^2 copy.

`left_out [R]` is absolute input that was moved into the errors (by pruning, or by a cap on nodes) and cancels
there: it counts as input from errors, so that a smaller graph never looks better explained than a larger one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .sparse_rows import SparseRows, row_blocks, rows_at_once

BINS = 2**16  # bins of the histogram that finds an edge threshold without sorting


class Influence(NamedTuple):
    nodes: Tensor
    """[N] influence of every node on the targets of interest (the logits' own weight not included)."""
    flow: Tensor
    """[R] influence of each row's node, logit weight included, divided by the row's total input: times |edge| it is
    the edge's score."""
    left_out: Tensor
    """[] influence of the input that was moved into the errors and cancels there."""


def influence(
    rows: Tensor | SparseRows, targets: Tensor, depth: Tensor, weights: Tensor, left_out: Tensor
) -> Influence:
    """One pass over `rows [R, N]` in topological order.

    `depth [R]` orders the rows: an edge always comes from a node of smaller depth. `weights [N]` is the
    logit probability on logit nodes and zero elsewhere.
    """
    values = rows.values if isinstance(rows, SparseRows) else rows
    total_N = weights.to(values.dtype).clone()
    flow_R = values.new_zeros(len(values))
    step = rows_at_once(values.shape[1])
    for ids in by_depth(depth):
        added_N = torch.zeros_like(total_N)
        for some in ids.split(step):
            chosen = run_or_ids(some)
            size_CN = values[chosen].abs()
            norm_C = size_CN.sum(1) + left_out[some]
            flow_C = torch.where(norm_C > 0, total_N[targets[some]] / norm_C.clamp(min=1e-38), 0.0)
            if isinstance(rows, SparseRows):
                rows.add_by_source(added_N, chosen, size_CN.mul_(flow_C[:, None]))
            else:
                added_N += flow_C @ size_CN
            flow_R[some] = flow_C
        total_N += added_N
    return Influence(total_N - weights.to(values.dtype), flow_R, (flow_R * left_out).sum())


def by_depth(depth: Tensor) -> list[Tensor]:
    """The rows of each depth, the deepest first."""
    order = depth.argsort(descending=True, stable=True)
    counts = torch.unique_consecutive(depth[order], return_counts=True)[1]
    return list(order.split(counts.tolist()))


def run_or_ids(ids: Tensor) -> Tensor | slice:
    """A slice where the ids are a run, which spares a copy."""
    first, last = int(ids[0]), int(ids[-1])
    return slice(first, last + 1) if last - first + 1 == len(ids) else ids


def scores(found: Influence, weights: Tensor, is_feature: Tensor, is_error: Tensor, is_input: Tensor) -> dict:
    """The scores of SPEC 4 from one influence; masks are [N].

    With Phi the influence of all features, conservation of flow turns the means over nodes into closed forms: what
    reaches the errors, over all that flows through the nodes that are counted.
    """
    if not bool(is_feature.any()):
        return {"replacement_score": 0.0, "completeness": 0.0, "completeness_ct": 0.0}
    inputs = float(found.nodes[is_input].sum())
    errors = float(found.nodes[is_error].sum() + found.left_out)
    through = float(weights.sum() + found.nodes[is_feature].sum())
    explained = inputs + errors
    return {
        "replacement_score": inputs / explained if explained > 0 else 0.0,
        "completeness": 1 - errors / through,
        "completeness_ct": 1 - errors / (through + explained),
    }


def fewest_nodes(influence_N: Tensor, share: float) -> Tensor:
    """Mask of the fewest nodes whose influence reaches `share` of the total."""
    order = influence_N.argsort(descending=True, stable=True)
    reached = influence_N[order].double().cumsum(0)
    keep = torch.zeros_like(influence_N, dtype=torch.bool)
    if len(order) == 0 or float(reached[-1]) <= 0:
        return keep
    count = int((reached < share * reached[-1]).sum()) + 1
    keep[order[:count]] = True
    return keep & (influence_N > 0)


def cumulative_share(influence_N: Tensor) -> Tensor:
    """[N] share of all influence that is reached at each node's rank: small = important."""
    order = influence_N.argsort(descending=True, stable=True)
    reached = influence_N[order].double().cumsum(0)
    share = torch.ones_like(reached)
    if len(order) and float(reached[-1]) > 0:
        share[order] = reached / reached[-1]
    return share.to(influence_N.dtype)


def fewest_edges(rows: Tensor, flow: Tensor, share: float) -> Tensor:
    """Mask [R, N] of the fewest edges whose scores `|rows| * flow` reach `share` of the total.

    A histogram over the leading 16 bits of each score finds the bin in which the share is reached, and only the
    edges of that bin are sorted: the result is that of a full sort. Scores are looked at a chunk at a time, twice.
    """
    chunks = row_blocks(rows)
    keep = torch.zeros_like(rows, dtype=torch.bool)
    mass = torch.zeros(BINS, dtype=torch.float64, device=rows.device)
    for some in chunks:
        score_CN, bin_CN = _binned(rows[some], flow[some])
        mass.index_add_(0, bin_CN.flatten(), score_CN.flatten().double())
    above = mass.flip(0).cumsum(0).flip(0)  # mass in this bin and those above
    goal = share * above[0]
    if float(goal) <= 0:
        return keep
    edge_bin = int((above >= goal).nonzero().max())
    places, candidates = [], []
    for some in chunks:
        score_CN, bin_CN = _binned(rows[some], flow[some])
        keep[some] = (bin_CN > edge_bin) & (score_CN > 0)
        inside = ((bin_CN == edge_bin) & (score_CN > 0)).flatten().nonzero().squeeze(1)
        places.append(inside + some.start * rows.shape[1])
        candidates.append(score_CN.flatten()[inside])
    scores, order = torch.cat(candidates).double().sort(descending=True, stable=True)
    reached = (above[edge_bin] - mass[edge_bin]) + scores.cumsum(0)
    count = int((reached < goal).sum()) + 1
    keep.view(-1)[torch.cat(places)[order[:count]]] = True
    return keep


def _binned(rows: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of edges, and the bin of each: positive floats order as their bits do."""
    score = rows.abs().float() * flow.float()[:, None]
    return score, score.view(torch.int32) >> 15


def move_to_errors(rows: Tensor, left_out: Tensor, moved: Tensor, error_of: Tensor) -> None:
    """Add the edges `moved [R, M]` of sources that go to the error column `error_of [M]` of their place, in place.

    Sums stay what they were; what cancels on the way is booked in `left_out`, as absolute input from errors.
    """
    places, column = torch.unique(error_of, return_inverse=True)
    for some in row_blocks(moved):
        part_MR = moved[some].T
        before = rows[some, places]
        added = torch.zeros(len(places), part_MR.shape[1], dtype=rows.dtype, device=rows.device)
        after = before + added.index_add_(0, column, part_MR.contiguous()).T
        left_out[some] += (before.abs() - after.abs()).sum(1) + part_MR.abs().sum(0)
        rows[some, places] = after
    left_out.clamp_(min=0)  # rounding
