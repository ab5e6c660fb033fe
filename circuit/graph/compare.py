"""What two graphs share, and what they do not."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .graph import Graph


@dataclass
class Difference:
    """What one graph has that another has not. Nodes are the same if kind, layer, position and index are."""

    only_first: list[int]
    """Nodes of the first graph alone, in its numbers."""
    only_second: list[int]
    """Nodes of the second graph alone, in its numbers."""
    common: list[tuple[int, int]]
    """Nodes of both: (in the first, in the second)."""
    edges: Tensor
    """[C, C] edges among the common nodes, the second's less the first's."""
    influence: Tensor
    """[C] influence of the common nodes, the second's less the first's."""


def difference(first: Graph, second: Graph) -> Difference:
    """Compare two graphs node by node and edge by edge."""
    ids_first = {key: id for id, key in enumerate(first.nodes.keys())}
    ids_second = {key: id for id, key in enumerate(second.nodes.keys())}
    common = [(id, ids_second[key]) for key, id in ids_first.items() if key in ids_second]
    a = torch.tensor([pair[0] for pair in common], dtype=torch.long, device=first.values.device)
    b = torch.tensor([pair[1] for pair in common], dtype=torch.long, device=second.values.device)
    return Difference(
        [id for key, id in ids_first.items() if key not in ids_second],
        [id for key, id in ids_second.items() if key not in ids_first],
        common,
        edges_among(second, b) - edges_among(first, a),
        second.influence()[b] - first.influence()[a],
    )


def edges_among(graph: Graph, ids: Tensor) -> Tensor:
    """[C, C] edges among some nodes, [target, source]."""
    row_of = torch.full((len(graph.nodes),), -1, device=ids.device)
    row_of[graph.row_ids] = torch.arange(len(graph.stored), device=ids.device)
    rows = row_of[ids]
    edges = graph.rows_of(rows.clamp(min=0))[:, ids]
    return edges.masked_fill((rows < 0)[:, None], 0)
