"""A graph's edges one after another, a block of rows at a time: no copy of the rows, and no matrix of sparse ones."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .graph import Graph
from .sparse_rows import SparseRows, row_blocks


class EdgeList(NamedTuple):
    """Edges side by side."""

    row: Tensor
    """[E] the target, as a row of the graph."""
    source: Tensor
    """[E] the node that it comes from."""
    value: Tensor
    """[E] what the source adds to the target."""


def blocks(graph: Graph) -> Iterator[EdgeList]:
    """All edges that are not zero, row by row."""
    for some in row_blocks(graph.values):
        yield _listed(graph, some, graph.values[some] != 0)


def count_edges(graph: Graph) -> int:
    """How many edges are not zero."""
    return sum(int(graph.values[some].count_nonzero()) for some in row_blocks(graph.values))


def linked_sources(graph: Graph) -> Tensor:
    """[N] the nodes that an edge comes from."""
    linked = torch.zeros(len(graph.nodes), dtype=torch.bool, device=graph.values.device)
    if isinstance(graph.stored, SparseRows):
        k = graph.stored.columns.shape[1]
        linked[graph.stored.columns[graph.stored.values[:, :k] != 0].long()] = True
        others = graph.stored.values[:, k:]
    else:
        others = graph.stored
    for some in row_blocks(graph.values):
        linked[len(linked) - others.shape[1] :] |= (others[some] != 0).any(0)
    return linked


def strongest_edges(graph: Graph, most: int) -> tuple[EdgeList, Tensor]:
    """The `most` edges that carry the most influence, the strongest first, and how much each carries."""
    none, carried = graph.targets[:0], graph.values.new_zeros(0)
    best = EdgeList(none, none, carried)
    for some in row_blocks(graph.values):
        strength_CW = graph.values[some].abs() * graph.influences.flow[some, None]
        chosen = strength_CW > (carried[-1] if 0 < len(carried) == most else 0)
        both = EdgeList(*map(torch.cat, zip(best, _listed(graph, some, chosen))))
        strength = torch.cat([carried, strength_CW[chosen]])
        carried, order = strength.topk(min(most, len(strength)))
        best = EdgeList(*(column[order] for column in both))
    return best, carried


def _listed(graph: Graph, rows: slice, chosen: Tensor) -> EdgeList:
    """The edges at places `chosen [C, W]` of the stored values of some rows."""
    row, source = chosen.nonzero(as_tuple=True)
    values = graph.values[rows][row, source]
    if isinstance(graph.stored, SparseRows):
        k = graph.stored.columns.shape[1]
        own = source < k
        columns = graph.stored.columns[rows][row[own], source[own]].long()
        source = source + (graph.stored.n_features - k)
        source[own] = columns
    return EdgeList(row + rows.start, source, values)
