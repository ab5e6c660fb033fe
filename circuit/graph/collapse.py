"""A graph with its groups as nodes: what the eye can take in, and how much of the influence it carries."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...data.errors import UserError
from .graph import Graph
from .nodes import Node
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
    part: Graph | None = None
    """The graph that has the supernodes' features alone: what is in none counts as error."""

    @cached_property
    def scores(self) -> dict[str, float]:
        """Of that graph."""
        return self.part.scores() if self.part is not None else {}


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
        part=graph.subgraph((features & inside).nonzero().squeeze(1).tolist()),
    )


class Labelled(Protocol):
    """Names of features."""

    def get(self, layer: int, feature: int) -> str | None: ...


BANDS = 6  # parts in which the layers of a deep model are looked at


def band_width(graph: Graph) -> int:
    """How many layers are looked at together: one of a shallow model, a sixth of a deep one's."""
    inner = graph.nodes.layer[graph.nodes.mask("feature", "error", "kept", "bias")]
    return -(-(int(inner.max()) + 1) // BANDS) if len(inner) else 1


def span_text(first: int, last: int) -> str:
    """A run of layers in words."""
    return f"layer {first}" if first == last else f"layers {first}-{last}"


def is_named(node: Node, label: str) -> bool:
    """Whether a feature has a name that says more than which tokens it makes likelier."""
    return bool(label) and not label.startswith(f"L{node.layer}:{node.index} says ")


class FeatureGroup(NamedTuple):
    """Features that are shown as one."""

    title: str
    position: int | None
    """Where all of them stand; None for a supernode, which may span several."""
    ids: list[int]

    @property
    def name(self) -> str:
        """The title, with the position where there is one."""
        return self.title if self.position is None else f"{self.title} @{self.position}"


def feature_groups(graph: Graph, bands: bool = True, labels: Labelled | None = None) -> list[FeatureGroup]:
    """All features: supernodes, features by name and position, and features without a name by layers (a band of a deep
    model's) and position. Without `bands`, each of those by itself."""
    groups: list[FeatureGroup] = []
    taken: set[int] = set()
    features = set(graph.nodes.ids("feature"))
    for name, members in graph.supernodes.items():
        groups.append(FeatureGroup(name, None, [id for id in members if id in features and id not in taken]))
        taken |= set(members)
    width = band_width(graph)
    alike: dict[tuple[str, int], list[int]] = {}
    for id in sorted(features - taken):
        node = graph.nodes[id]
        label = (labels.get(node.layer, node.index) if labels is not None else None) or node.label
        if bands and not is_named(node, label):
            first = node.layer // width * width
            name = span_text(first, first + width - 1)
        else:
            name = plain_label(label) if label else f"feature L{node.layer}:{node.index}"
        alike.setdefault((name, node.position), []).append(id)
    groups += [FeatureGroup(name, position, ids) for (name, position), ids in alike.items()]
    return [group for group in groups if group.ids]


def plain_label(label: str) -> str:
    """A label without how well it fits: `state: Texas (F1 0.97)` is `state: Texas`."""
    return re.sub(r" \(F1 [\d.]+\)$", "", label)


def main_groups(graph: Graph, most: int = 12, bands: bool = True) -> dict[str, list[int]]:
    """The `most` influential of those groups, by name."""
    influence = graph.influence()
    groups = {group.name: group.ids for group in feature_groups(graph, bands)}
    strength = {name: float(influence[ids].sum()) for name, ids in groups.items()}
    return {name: groups[name] for name in sorted(groups, key=strength.__getitem__, reverse=True)[:most]}


def widest_path(found: Collapsed, target: str, through: str | None = None) -> list[int]:
    """From a token to a target by way of groups (of the token or group that `through` names), so that the least that
    flows along any step is as large as can be."""
    end = found.names.index(target)
    if through is not None and found.names.index(through) in _tokens(found):
        width, onward = _widths(found, end)
        start = found.names.index(through)
        return _follow(onward, start, end) if width[start] else []
    if through is None:
        return _from_tokens(found, end)
    middle = found.names.index(through)
    width, onward = _widths(found, end)
    first = _from_tokens(found, middle) if width[middle] else []
    return first and [*first, *_follow(onward, middle, end)[1:]]


def _from_tokens(found: Collapsed, end: int) -> list[int]:
    """The widest path from any token to a group."""
    width, onward = _widths(found, end)
    tokens = _tokens(found)
    best = max(tokens, key=width.__getitem__, default=end)
    return _follow(onward, best, end) if best != end and width[best] else []


def _widths(found: Collapsed, end: int) -> tuple[list[float], list[int]]:
    """How wide the widest path from each group to `end` is, and the next group on it; tokens pass nothing on, and from
    a token straight to a logit is no path."""
    size, tokens, G = found.flow.abs().tolist(), _tokens(found), len(found.names)
    width, onward, left = [0.0] * G, [-1] * G, set(range(G))
    width[end] = float("inf")
    while left:
        here = max(left, key=width.__getitem__)
        left.discard(here)
        if here in tokens or width[here] == 0:
            continue
        for source in left:
            step = min(width[here], size[here][source])
            direct = source in tokens and found.names[here].startswith("logit ")
            if step > width[source] and not direct:
                width[source], onward[source] = step, here
    return width, onward


def _follow(onward: list[int], start: int, end: int) -> list[int]:
    path = [start]
    while path[-1] != end:
        path.append(onward[path[-1]])
    return path


def _tokens(found: Collapsed) -> set[int]:
    return {g for g, name in enumerate(found.names) if name.startswith(("'", '"'))}
