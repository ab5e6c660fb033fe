"""Which edges and paths of a graph are found in the graphs of other trainings, by pairs of features."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ...data.errors import UserError
from ..graph import Graph, GraphPath
from .matching import Key, Match

SEEDS_FILE = "seeds.json"
"""Beside a graph: what was found of it in other trainings."""
Place = tuple[str, int, int, int]
"""A node: kind, layer, position, index."""


class Held(NamedTuple):
    """A graph's edges and paths, and the number of trainings that have each, this one counted."""

    trainings: int
    features: dict[Place, int]
    edges: dict[tuple[Place, Place], int]
    """(source, target)."""
    paths: list[tuple[GraphPath, list[Place], int]]
    """The strongest first; the nodes' ids are those of the graph that was asked about."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "trainings": self.trainings,
            "features": [[*place, count] for place, count in self.features.items()],
            "edges": [[source, target, count] for (source, target), count in self.edges.items()],
            "paths": [{"nodes": nodes, "strength": path.strength, "in": count} for path, nodes, count in self.paths],
        }

    @property
    def share_of_edges(self) -> float:
        """How often an edge is found in another training, in the mean."""
        return _share(list(self.edges.values()), self.trainings)


def load_held(folder: str | Path) -> dict[str, Any] | None:
    """What `crosslace seeds` wrote beside a graph, as `Held.as_dict` has it; None where it was not asked."""
    path = Path(folder) / SEEDS_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(found, dict) and {"trainings", "features", "edges", "paths"} <= found.keys()
    except FileNotFoundError:
        return None
    except (ValueError, AssertionError) as damage:
        raise UserError(f"{path} is damaged; write it again with `crosslace seeds`") from damage
    return found


def _share(counts: Sequence[int], trainings: int) -> float:
    return sum(count - 1 for count in counts) / (len(counts) * (trainings - 1)) if counts else 0.0


def held(graph: Graph, others: Sequence[tuple[Graph, Mapping[Key, Match]]], paths: Sequence[GraphPath] = ()) -> Held:
    """An edge is found where both of its ends have a counterpart in the other graph, and that has the edge with the
    same sign; a path, which is one of this graph, where all of its edges are. Graphs are best pruned alike before;
    errors are left out."""
    own = _places(graph)
    features = {place: 1 for place in own.values() if place[0] == "feature"}
    weights = {(own[s], own[t]): weight for s, t, weight in _edges(graph) if s in own and t in own}
    edges = dict.fromkeys(weights, 1)
    along = [[own[id] for id in path.nodes] for path in paths]
    in_paths = [1] * len(along)
    for other, matches in others:
        there = _places(other)
        present = set(there.values())
        theirs: dict[tuple[Place | None, Place | None], float] = {  # asked also for nodes without a counterpart
            (there[s], there[t]): weight for s, t, weight in _edges(other) if s in there and t in there
        }
        counterpart = {place: _counterpart(place, matches) for place in own.values()}
        for place in features:
            features[place] += counterpart[place] in present
        same = {(s, t) for (s, t), w in weights.items() if w * theirs.get((counterpart[s], counterpart[t]), 0.0) > 0}
        for pair in same:
            edges[pair] += 1
        for number, nodes in enumerate(along):
            in_paths[number] += all(pair in same for pair in pairwise(nodes))
    return Held(len(others) + 1, features, edges, list(zip(paths, along, in_paths, strict=True)))


def _places(graph: Graph) -> dict[int, Place]:
    """Nodes that can be found again: features, what the graph starts from, and what it explains."""
    kinds = ("feature", "embedding", "position", "logit")
    return {n.id: (n.kind, n.layer, n.position, n.index) for n in graph.nodes if n.kind in kinds}


def _counterpart(place: Place, matches: Mapping[Key, Match]) -> Place | None:
    """Where the other training has this node."""
    kind, layer, position, index = place
    if kind != "feature":
        return place
    match = matches.get((layer, index))
    return None if match is None else (kind, layer, position, match.index)


def _edges(graph: Graph) -> list[tuple[int, int, float]]:
    """(source, target, weight) of every edge that is there."""
    rows, ids = graph.rows, graph.row_ids.tolist()
    return [(s, ids[r], float(rows[r, s])) for r, s in rows.nonzero().tolist()]
