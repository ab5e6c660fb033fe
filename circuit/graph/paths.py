"""The strongest paths through a graph, and how they read in a terminal.

A path's strength is the product of its edges' shares of their targets' input, `A^`: all paths into a target add up to
its whole input, so a path of strength 0.1 is a tenth of why. Its sign is the product of the edges' signs.
"""

import heapq
from collections.abc import Sequence
from itertools import count as counter
from typing import NamedTuple

import torch
from torch import Tensor

from .graph import Graph
from .nodes import Node
from .sparse_rows import rows_at_once


class GraphPath(NamedTuple):
    nodes: list[int]
    """From the source to the target."""
    strength: float
    """Product of the edges' shares of their targets' input, with the sign of the effect."""


def shares(graph: Graph, rows: Tensor | slice) -> Tensor:
    """A^ [C, N] of some rows, with signs: each edge over the whole absolute input of its target."""
    edges = graph.rows_of(rows).double()
    total = edges.abs().sum(1) + graph.left_out[rows].double()
    return edges / total.clamp(min=1e-38)[:, None]


def top_paths(
    graph: Graph,
    source: int | None,
    target: int,
    count: int = 1,
    through: Sequence[str] = ("feature",),
    direct: bool = True,
) -> list[GraphPath]:
    """The `count` strongest paths from a node (None: any token) to another, by way of nodes of kinds `through`; without
    `direct`, of at least one of those.

    One pass over the DAG finds what the best path from every node is worth; a best-first search guided by it then
    walks back from the target and meets the paths in the order of their strength.
    """
    if not graph.has_row(target):
        return []
    goals = graph.nodes.ids("embedding") if source is None else [source]
    reach_N = best_from(graph, goals, through)
    row_of = {int(node): row for row, node in enumerate(graph.targets.tolist())}
    may_pass = graph.nodes.mask(*through)
    is_goal = torch.zeros_like(may_pass)
    is_goal[goals] = True

    found: list[GraphPath] = []
    order = counter()  # ties are broken by age, never by comparing paths
    queue = [(-float(reach_N[target]), next(order), [target], 1.0)]
    while queue and len(found) < count:
        bound, _, path, strength = heapq.heappop(queue)
        if bound == 0:
            break
        node = path[-1]
        if bool(is_goal[node]) and len(path) > 1:
            found.append(GraphPath(path[::-1], strength))
            continue
        if node not in row_of:
            continue
        shares_N = shares(graph, slice(row_of[node], row_of[node] + 1))[0]
        allowed = may_pass | is_goal if direct or len(path) > 1 else may_pass & ~is_goal
        worth_N = shares_N.abs() * torch.where(allowed, reach_N, 0.0) * abs(strength)
        best = worth_N.topk(min(len(worth_N), 4 * count + 16))
        for worth, id in zip(best.values.tolist(), best.indices.tolist()):
            if worth > 0:
                share = float(shares_N[id])
                heapq.heappush(queue, (-worth, next(order), [*path, id], strength * share))
    return found


def best_from(graph: Graph, goals: list[int], through: Sequence[str]) -> Tensor:
    """[N] strength of the best path from any of the goals to each node, by way of nodes of kinds `through`."""
    best_N = torch.zeros(len(graph.nodes), dtype=torch.float64, device=graph.values.device)
    best_N[goals] = 1
    fixed = best_N > 0
    may_pass = graph.nodes.mask(*through) | fixed
    depth = graph.nodes.layer[graph.targets]
    step = rows_at_once(len(graph.nodes))
    for value in sorted(set(depth.tolist())):  # what a layer reads lies in earlier ones
        for rows in (depth == value).nonzero().squeeze(1).split(step):
            ids = graph.targets[rows]
            into = (shares(graph, rows).abs() * torch.where(may_pass, best_N, 0.0)).amax(1)
            best_N[ids] = torch.where(fixed[ids], 1.0, into)
    return best_N


def node_text(graph: Graph, node: Node) -> str:
    """A node in a few words: token, feature with its name, or kind and place."""
    place = f"@{node.position}"
    if node.kind == "embedding":
        return f"{graph.token_strings[node.position]!r}{place}"
    if node.kind == "feature":
        name = f" {node.label}" if node.label else ""
        return f"L{node.layer}:{node.index}{name} {place}"
    if node.kind == "logit":
        return f"{node.label!r}{later_place(graph, node)}"
    return f"{node.kind} L{node.layer} {place}" if node.layer >= 0 else f"{node.kind} {place}"


def later_place(graph: Graph, node: Node) -> str:
    """Where a logit stands, unless that is the prompt's end, where most do."""
    return "" if node.position == len(graph.tokens) - 1 else f" @{node.position}"


def path_text(graph: Graph, path: GraphPath) -> str:
    """A path as one line, each arrow with what the edge adds to its target."""
    text = node_text(graph, graph.nodes[path.nodes[0]])
    for source, target in zip(path.nodes, path.nodes[1:]):
        text += f"  —{graph.edge(target, source):+.3g}→  {node_text(graph, graph.nodes[target])}"
    return f"{text}   ({abs(path.strength):.1%} of its input)"


def strongest_paths_text(graph: Graph) -> str:
    """The strongest path from a token to each logit by way of features, where there is one."""
    lines, weight = [], "p" if graph.weight_name == "probability" else "weight"
    for logit in graph.logits:
        lines.append(f"{node_text(graph, graph.nodes[logit.id])} {weight}={logit.probability:.3f}")
        paths = graph.top_paths(None, logit.id, direct=False)
        lines += [f"  {path_text(graph, path)}" for path in paths] or ["  no path through features"]
    return "\n".join(lines)


def summary_text(graph: Graph) -> str:
    """Scores and accounting in two lines: they belong wherever a graph is shown."""
    scores, accounting = graph.scores(), graph.accounting
    said = (
        f"replacement score {scores['replacement_score']:.3f}, completeness {scores['completeness']:.3f} "
        f"(circuit-tracer's: {scores['completeness_ct']:.3f})\n"
    )
    if "active_features" not in accounting:  # a foreign file's graph
        return f"{said}{graph.n_features} features; how many were active, and what edges miss, the graph does not say"
    return said + (
        f"{accounting['active_features']} active features, "
        f"{accounting['left_out_features']} left out (their effect is in the errors); "
        f"edges miss what the model computed by at most {accounting['largest_violation']:.1e}"
    )
