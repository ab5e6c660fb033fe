"""A graph with its groups as nodes: what the eye can take in, and how much of the influence it carries."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...data.errors import UserError
from .graph import Graph
from .supernodes import flow_between


@dataclass
class Collapsed:
    """Groups of a graph's nodes, and what flows between them."""

    names: list[str]
    groups: list[list[int]]
    """The nodes of each: the supernodes, the prompt's tokens, the logits."""
    influence: Tensor
    """[G] influence of each group; the logits' is their own weight."""
    flow: Tensor
    """[G, G] signed influence that runs from group to group along single edges: [target, source]."""
    carried: float
    """Share of all features' influence that the supernodes hold."""
    scores: dict[str, float]
    """Of the graph that has the supernodes' features alone: what is in none counts as error."""


def collapsed(graph: Graph, groups: dict[str, list[int]] | None = None) -> Collapsed:
    """The graph with its supernodes (or other groups) as nodes, beside tokens and logits."""
    groups = graph.supernodes if groups is None else groups
    if not groups:
        raise UserError("the graph has no supernodes; graph.group(name, ids) makes one, propose_supernodes many")
    tokens = {
        f"{token!r} @{at}": graph.nodes.ids("embedding", position=at) for at, token in enumerate(graph.token_strings)
    }
    logits = {f"logit {logit.label!r}": [logit.id] for logit in graph.logits}
    everything = {**{name: list(ids) for name, ids in groups.items()}, **tokens, **logits}
    influence = graph.influence() + graph.weights
    features = graph.nodes.mask("feature")
    inside = torch.zeros_like(features)
    inside[[id for ids in groups.values() for id in ids]] = True
    total = float(graph.influence()[features].sum()) or 1.0
    return Collapsed(
        list(everything),
        list(everything.values()),
        torch.stack([influence[ids].sum() for ids in everything.values()]),
        flow_between(graph, everything),
        float(graph.influence()[features & inside].sum()) / total,
        graph.subgraph((features & inside).nonzero().squeeze(1).tolist()).scores(),
    )


def main_groups(graph: Graph, most: int = 12) -> dict[str, list[int]]:
    """The `most` influential groups of features: supernodes, then features by label (or layer and index) and
    position."""
    influence, groups, taken = graph.influence(), {}, set()
    features = set(graph.nodes.ids("feature"))
    for name, ids in graph.supernodes.items():
        groups[name] = [id for id in ids if id in features and id not in taken]
        taken |= set(ids)
    for id in sorted(features - taken):
        node = graph.nodes[id]
        name = f"{node.label or f'feature L{node.layer}:{node.index}'} @{node.position}"
        groups.setdefault(name, []).append(id)
    groups = {name: ids for name, ids in groups.items() if ids}
    strength = {name: float(influence[ids].sum()) for name, ids in groups.items()}
    return {name: groups[name] for name in sorted(groups, key=strength.__getitem__, reverse=True)[:most]}


def widest_path(found: Collapsed, target: str) -> list[int]:
    """From a token to a target by way of groups, so that the least that flows along any step is as large as can be."""
    G, end = len(found.names), found.names.index(target)
    size = found.flow.abs()
    tokens = {g for g, ids in enumerate(found.groups) if found.names[g].startswith(("'", '"'))}
    width, back = [0.0] * G, [-1] * G
    width[end], left = float("inf"), set(range(G))
    while left:
        here = max(left, key=width.__getitem__)
        left.discard(here)
        if here in tokens or width[here] == 0:
            continue
        for source in left:
            through = min(width[here], float(size[here, source]))
            if through > width[source] and not (source in tokens and here == end):
                width[source], back[source] = through, here
    best = max(tokens, key=width.__getitem__, default=-1)
    if best < 0 or width[best] == 0:
        return []
    path = [best]
    while path[-1] != end:
        path.append(back[path[-1]])
    return path
