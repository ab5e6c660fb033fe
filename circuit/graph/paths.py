"""The strongest paths through a graph.

A path's strength is the product of its edges' shares of their targets' input, `A^`: all paths into a target add up to
its whole input, so a path of strength 0.1 is a tenth of why. Its sign is the product of the edges' signs.
"""

import heapq
from collections.abc import Sequence
from itertools import count as counter
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..precision import wide, widest
from .nodes import Nodes
from .rows import Rows, rows_at_once


class Account(Protocol):
    """What paths are found in: a graph, as far as they look at it."""

    @property
    def stored(self) -> Rows: ...
    @property
    def nodes(self) -> Nodes: ...
    @property
    def row_ids(self) -> Tensor: ...
    @property
    def cancelled(self) -> Tensor: ...


class GraphPath(NamedTuple):
    nodes: list[int]
    """From the source to the target."""
    strength: float
    """Product of the edges' shares of their targets' input, with the sign of the effect."""


def shares(graph: Account, rows: Tensor | slice) -> Tensor:
    """A^ [C, N] of some rows, with signs: each edge over the whole absolute input of its target."""
    edges = wide(graph.stored.dense(rows))
    total = edges.abs().sum(1) + wide(graph.cancelled[rows])
    return edges / total.clamp(min=1e-38)[:, None]


def top_paths(
    graph: Account,
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
    row_of = {node: row for row, node in enumerate(graph.row_ids.tolist())}
    if target not in row_of:
        return []
    goals = graph.nodes.ids("embedding") if source is None else [source]
    reach_N = best_from(graph, goals, through)
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


def best_from(graph: Account, goals: list[int], through: Sequence[str]) -> Tensor:
    """[N] strength of the best path from any of the goals to each node, by way of nodes of kinds `through`."""
    best_N = torch.zeros(len(graph.nodes), dtype=widest(graph.row_ids.device), device=graph.row_ids.device)
    best_N[goals] = 1
    fixed = best_N > 0
    may_pass = graph.nodes.mask(*through) | fixed
    depth = graph.nodes.layer[graph.row_ids]
    step = rows_at_once(len(graph.nodes))
    for value in sorted(set(depth.tolist())):  # what a layer reads lies in earlier ones
        for rows in (depth == value).nonzero().squeeze(1).split(step):
            ids = graph.row_ids[rows]
            into = (shares(graph, rows).abs() * torch.where(may_pass, best_N, 0.0)).amax(1)
            best_N[ids] = torch.where(fixed[ids], 1.0, into)
    return best_N
