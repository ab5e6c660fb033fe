"""Scores of attribution graphs over a fixed prompt set: how much of what a model does the features account for."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..graph import Graph
from ..intervals import mean_of
from ..precision import wide, widest
from .prompts import PromptSet

GRAPH_FIGURES = (
    "replacement_score",
    "completeness",
    "kept_share",
    "replacement_score_ct",
    "completeness_ct",
    "path_length",
    "nodes",
    "edges",
    "left_out_features",
    "largest_violation",
)
"""What each prompt's row holds; nodes and edges are those of the pruned graph."""


def path_length(graph: Graph) -> float:
    """The mean number of edges from an embedding to a logit, each path weighted by its influence."""
    blocks = graph.stored.blocks()
    total_R = torch.cat([graph.values[some].abs().sum(1, dtype=widest(graph.values.device)) for some in blocks])
    total_R = (total_R + wide(graph.cancelled)).clamp_min(1e-38)
    is_input = graph.nodes.mask("embedding", "position")
    flow_R = wide(graph.weights[graph.row_ids])
    length = arrived = 0.0
    for edges in range(1, len(total_R) + 1):
        share_R, flow_N = flow_R / total_R, flow_R.new_zeros(len(graph.nodes))
        for some in blocks:
            size_CN = wide(graph.values[some].abs())
            graph.stored.add_by_source(flow_N, some, size_CN, share_R[some])
        reached = float(flow_N[is_input].sum())
        length, arrived = length + edges * reached, arrived + reached
        flow_R = flow_N[graph.row_ids]
        if not bool(flow_R.any()):
            break
    return length / arrived if arrived > 0 else 0.0


def error_share_by_layer(graph: Graph, n_layers: int) -> list[float]:
    """The influence of each layer's error nodes, as a share of that of all errors and embeddings."""
    influence = wide(graph.influence())
    total = float(influence[graph.nodes.mask("error", "embedding", "position")].sum())
    is_error = graph.nodes.mask("error")
    shares = torch.zeros(n_layers, dtype=widest(influence.device), device=influence.device)
    shares.index_add_(0, graph.nodes.layer[is_error], influence[is_error])
    return (shares / total).tolist() if total > 0 else [0.0] * n_layers


def graph_row(graph: Graph, node: float, edge: float) -> list[float]:
    """One prompt's figures, in the order of GRAPH_FIGURES; the scores are those of the whole graph."""
    scores = graph.scores()
    pruned = graph.prune(node=node, edge=edge)
    return [
        scores["replacement_score"],
        scores["completeness"],
        scores["kept_share"],
        scores["replacement_score_ct"],
        scores["completeness_ct"],
        path_length(graph),
        float(pruned.n_features),
        float(pruned.stored.count()),
        float(graph.accounting["left_out_features"]),
        float(graph.accounting["largest_violation"]),
    ]


def frontier_row(graph: Graph, thresholds: Sequence[float]) -> list[list[float]]:
    """[thresholds, 3]: features kept, replacement score, completeness of the graph pruned at each node threshold."""
    rows = []
    for threshold in thresholds:
        pruned = graph.prune(node=threshold, edge=1.0)
        scores = pruned.scores()
        rows.append([float(pruned.n_features), scores["replacement_score"], scores["completeness"]])
    return rows


def score_graphs(
    graphs: Sequence[Graph | None],
    prompts: PromptSet,
    n_layers: int,
    thresholds: Sequence[float],
    node: float = 0.8,
    edge: float = 0.98,
    add_up: Callable[[Tensor], Tensor] = lambda x: x,
) -> dict[str, Any]:
    """The `graph` part of an evaluation. `graphs` holds one a prompt, None where another process has it; `add_up`
    sums over processes."""
    P = len(prompts.prompts)
    table_PC = torch.zeros(P, len(GRAPH_FIGURES), dtype=torch.float64)
    shares_PL = torch.zeros(P, n_layers, dtype=torch.float64)
    frontier_PTK = torch.zeros(P, len(thresholds), 3, dtype=torch.float64)
    for number, graph in enumerate(graphs):
        if graph is None:
            continue
        table_PC[number] = torch.tensor(graph_row(graph, node, edge))
        shares_PL[number] = torch.tensor(error_share_by_layer(graph, n_layers))
        frontier_PTK[number] = torch.tensor(frontier_row(graph, thresholds))
    table_PC, shares_PL, frontier_PTK = add_up(table_PC), add_up(shares_PL), add_up(frontier_PTK)
    means = {name: mean_of(table_PC[:, column].tolist()) for column, name in enumerate(GRAPH_FIGURES)}
    return {
        "prompt_set": prompts.label,
        **{name: mean.value for name, mean in means.items()},
        **{f"{name}_interval": mean.interval for name, mean in means.items()},
        "prompts": [
            {"prompt": prompt, **dict(zip(GRAPH_FIGURES, row))}
            for prompt, row in zip(prompts.prompts, table_PC.tolist())
        ],
        "error_share": shares_PL.mean(0).tolist(),
        "frontier": [
            {"node": threshold, "features": kept, "replacement_score": replacement, "completeness": completeness}
            for threshold, (kept, replacement, completeness) in zip(thresholds, frontier_PTK.mean(0).tolist())
        ],
    }
