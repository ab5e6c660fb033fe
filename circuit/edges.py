"""A graph's edges one after another, a block of rows at a time: no copy of the rows, and no matrix of sparse ones."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .graph import Graph
from .sparse_rows import CHUNK, SparseRows


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
    step = max(1, CHUNK // max(1, graph.values.shape[1]))
    for start in range(0, len(graph.values), step):
        values = graph.values[start : start + step]
        row, column = values.nonzero(as_tuple=True)
        found, source = values[row, column], column
        if isinstance(graph.stored, SparseRows):
            k = graph.stored.columns.shape[1]
            own = column < k
            source = column + (graph.stored.n_features - k)
            source[own] = graph.stored.columns[start : start + step][row[own], column[own]].long()
        yield EdgeList(row + start, source, found)


def count_edges(graph: Graph) -> int:
    """How many edges are not zero."""
    return sum(len(block.row) for block in blocks(graph))


def linked_sources(graph: Graph) -> Tensor:
    """[N] the nodes that an edge comes from."""
    linked = torch.zeros(len(graph.nodes), dtype=torch.bool, device=graph.values.device)
    for block in blocks(graph):
        linked[block.source] = True
    return linked


def strongest_edges(graph: Graph, most: int) -> tuple[EdgeList, Tensor]:
    """The `most` edges that carry the most influence, the strongest first, and how much each carries."""
    none, carried = graph.targets[:0], graph.values.new_zeros(0)
    best = EdgeList(none, none, carried)
    for block in blocks(graph):
        both = EdgeList(*map(torch.cat, zip(best, block)))
        strength = torch.cat([carried, block.value.abs() * graph.influences.flow[block.row]])
        carried, order = strength.topk(min(most, int((strength > 0).sum())))
        best = EdgeList(*(column[order] for column in both))
    return best, carried
