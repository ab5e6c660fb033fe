"""What two graphs share, and what they do not: place by place, by aligned tokens, or by feature wherever it fires."""

from collections.abc import Hashable
from dataclasses import dataclass
from difflib import SequenceMatcher

import torch
from torch import Tensor

from ...data.errors import check_choice
from .graph import Graph

BY = ("position", "tokens", "feature")


@dataclass
class Difference:
    """What one graph has that another has not. Nodes are the same if kind, layer, position and index are; by tokens,
    positions are those of tokens that the two prompts share; by feature, all positions of a feature are one."""

    only_first: list[int]
    """Nodes of the first graph alone, in its numbers."""
    only_second: list[int]
    """Nodes of the second graph alone, in its numbers."""
    common: list[tuple[int, int]]
    """Nodes of both: (in the first, in the second); by feature, the first of each."""
    edges: Tensor
    """[C, C] edges among the common nodes, the second's less the first's."""
    influence: Tensor
    """[C] influence of the common nodes, the second's less the first's."""


def difference(first: Graph, second: Graph, by: str = "position") -> Difference:
    """Compare two graphs node by node and edge by edge; `by` is position, tokens (prompts of different length) or
    feature."""
    check_choice("by", by, BY)
    match = aligned(first, second) if by == "tokens" else {}
    groups_first = _grouped(first, by, {position: position for position in range(len(first.tokens))})
    groups_second = _grouped(second, by, {b: a for a, b in match.items()} if by == "tokens" else None)
    common = [key for key in groups_first if key in groups_second]
    pairs = [(groups_first[key][0], groups_second[key][0]) for key in common]
    a, b = ([groups[key] for key in common] for groups in (groups_first, groups_second))
    return Difference(
        [id for key, ids in groups_first.items() if key not in groups_second for id in ids],
        [id for key, ids in groups_second.items() if key not in groups_first for id in ids],
        pairs,
        edges_among(second, b) - edges_among(first, a),
        _summed(second.influence(), b) - _summed(first.influence(), a),
    )


def aligned(first: Graph, second: Graph) -> dict[int, int]:
    """Positions of the first prompt whose tokens the second has too, in the same order, and where it has them."""
    blocks = SequenceMatcher(None, first.tokens, second.tokens, autojunk=False).get_matching_blocks()
    return {block.a + step: block.b + step for block in blocks for step in range(block.size)}


def _grouped(graph: Graph, by: str, place: dict[int, int] | None) -> dict[Hashable, list[int]]:
    """Nodes by what makes them the same; a position that has no counterpart belongs to this graph alone."""
    groups: dict[Hashable, list[int]] = {}
    for id, (kind, layer, position, index) in enumerate(graph.nodes.keys()):
        where: Hashable = position if place is None else place.get(position, ("alone", position))
        key = (kind, layer, index) if by == "feature" else (kind, layer, where, index)
        groups.setdefault(key, []).append(id)
    return groups


def _summed(values: Tensor, groups: list[list[int]]) -> Tensor:
    """[C] sums over groups."""
    return torch.stack([values[ids].sum() for ids in groups]) if groups else values[:0]


def edges_among(graph: Graph, groups: list[list[int]]) -> Tensor:
    """[C, C] edges among groups of nodes, [target, source], each the sum over their members."""
    device = graph.values.device
    column_of = torch.full((len(graph.nodes),), len(groups), device=device)
    for column, ids in enumerate(groups):
        column_of[ids] = column
    found = graph.values.new_zeros(len(groups) + 1, len(groups) + 1)
    target_of = column_of[graph.row_ids]
    for some in graph.stored.blocks():
        rows = graph.rows_of(some)
        by_source = rows.new_zeros(len(rows), len(groups) + 1).index_add_(1, column_of, rows)
        found.index_add_(0, target_of[some], by_source)
    return found[:-1, :-1]
