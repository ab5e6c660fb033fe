"""Neuronpedia's `qParams`, both ways: pins and supernodes as their site and circuit-tracer's viewer keep them."""

from typing import Any

from ...data.errors import UserError
from ..features import Labels
from ..formats import graph_to_neuronpedia, slugified
from ..graph import Graph
from .payload import n_layers, node_keys


def with_qparams(graph: Graph, labels: Labels, kept: dict[str, Any], slug: str) -> dict[str, Any]:
    """Neuronpedia's JSON of a graph, with what is pinned and grouped on the page."""
    data = graph_to_neuronpedia(graph, slugified(slug), labels)
    there = {node["node_id"] for node in data["nodes"]}
    id_of = {key: id for id, key in _names(graph).items() if id in there}
    pinned = [id_of[key] for key in kept["pins"] if key in id_of]
    if pinned or kept["groups"]:
        groups: dict[str, list[str]] = {}
        for key, group in kept["members"].items():
            if key in id_of and group in kept["groups"]:
                groups.setdefault(group, []).append(id_of[key])
        data["qParams"] |= {
            "pinnedIds": list(dict.fromkeys([*pinned, *(id for ids in groups.values() for id in ids)])),
            "supernodes": [[kept["groups"][group], *ids] for group, ids in groups.items()],
        }
    return data


def changes_of(params: Any, graph: Graph) -> dict[str, dict[str, Any]]:
    """The edit that takes over somebody's `qParams`; what names no node of this graph is passed over."""
    if isinstance(params, dict) and isinstance(params.get("pinnedIds"), str):  # as in an address
        params = params | {"pinnedIds": params["pinnedIds"].split(",")}
    if not isinstance(params, dict) or not isinstance(params.get("pinnedIds", []), list):
        raise UserError("qParams takes Neuronpedia's object, with pinnedIds and supernodes")
    key_of = _names(graph)
    changes: dict[str, dict[str, Any]] = {"pins": {}, "members": {}, "groups": {}}
    for id in params.get("pinnedIds") or []:
        if id in key_of:
            changes["pins"][key_of[id]] = True
    for number, group in enumerate(params.get("supernodes") or []):
        if not isinstance(group, list) or len(group) < 2 or not all(isinstance(one, str) for one in group):
            continue
        members = [key_of[id] for id in group[1:] if id in key_of]
        if members and group[0].strip():
            changes["groups"][f"np{number}"] = group[0][:200]
            changes["members"] |= dict.fromkeys(members, f"np{number}")
            changes["pins"] |= dict.fromkeys(members, True)
    if not changes["pins"]:
        raise UserError("none of the pinned nodes is in this graph")
    return changes


def _names(graph: Graph) -> dict[str, str]:
    """Neuronpedia's id of each node -> its key here."""
    layers = n_layers(graph)
    found = {}
    for node, key in zip(graph.nodes, node_keys(graph.nodes), strict=True):
        where = f"{node.layer}_{node.index}_{node.position}"
        rank = node.id - (len(graph.nodes) - len(graph.probabilities))
        name = {
            "feature": where,
            "embedding": f"E_{node.index}_{node.position}",
            "error": f"{node.layer}_error_mlp_{node.position}",
            "logit": f"{layers}_{node.index if node.index >= 0 else f'target{rank}'}_{node.position}",
        }.get(node.kind)
        if name is not None:
            found[name] = key
    return found
