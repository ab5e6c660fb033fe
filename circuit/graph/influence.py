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


def find_influence(rows: Rows, row_ids: Tensor, depth: Tensor, weights: Tensor, cancelled: Tensor) -> Influence:
    """One pass over `rows [R, N]`, the edges into nodes `row_ids [R]`, in topological order.

    `depth [R]` orders the rows: an edge always comes from a node of smaller depth. `weights [N]` is the
    logit probability on logit nodes and zero elsewhere.
    """
    values = rows.values
    total_N = weights.to(values.dtype).clone()
    per_input_R = values.new_zeros(len(values))
    step = rows_at_once(values.shape[1])
    for ids in by_depth(depth):
        added_N = torch.zeros_like(total_N)
        for some in ids.split(step):
            chosen = run_or_ids(some)
            size_CN = values[chosen].abs()
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


def scores(found: Influence, weights: Tensor, is_feature: Tensor, is_error: Tensor, is_input: Tensor) -> dict:
    """The scores of SPEC 4 from one influence; masks are [N].

    With Phi the influence of all features, conservation of flow turns the means over nodes into closed forms: what
    reaches the errors, over all that flows through the nodes that are counted.
    """
    if not bool(is_feature.any()):
        return {"replacement_score": 0.0, "completeness": 0.0, "completeness_ct": 0.0}
    inputs = float(found.nodes[is_input].sum())
    errors = float(found.nodes[is_error].sum() + found.cancelled)
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


def fewest_edges(values: Tensor, per_input: Tensor, share: float) -> Tensor:
    """Mask [R, W] of the fewest edges whose scores `|values| * per_input` reach `share` of the total.

    A histogram over the leading 16 bits of each score finds the bin in which the share is reached, and only the
    edges of that bin are sorted: the result is that of a full sort. Scores are looked at a chunk at a time, twice.
    """
    chunks = row_blocks(values)
    keep = torch.zeros_like(values, dtype=torch.bool)
    mass = torch.zeros(BINS, dtype=torch.float64, device=values.device)
    for some in chunks:
        score_CN, bin_CN = _binned(values[some], per_input[some])
        mass.index_add_(0, bin_CN.flatten(), score_CN.flatten().double())
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
    scores, order = torch.cat(candidates).double().sort(descending=True, stable=True)
    reached = (above[edge_bin] - mass[edge_bin]) + scores.cumsum(0)
    count = int((reached < goal).sum()) + 1
    keep.view(-1)[torch.cat(places)[order[:count]]] = True
    return keep


def _binned(values: Tensor, per_input: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of edges, and the bin of each: positive floats order as their bits do."""
    score = values.abs().float() * per_input.float()[:, None]
    return score, score.view(torch.int32) >> 15
