"""What the graph page gets: the nodes and edges of a graph that can be looked at, and its figures."""

from typing import Any

import torch

from ...data.errors import check_range
from ..features import Labels
from ..graph import Graph
from .picture import plain_label

MOST_FEATURES, MOST_LINKS = 1500, 20_000


def graph_payload(
    graph: Graph,
    labels: Labels | None = None,
    node: float = 0.95,
    edge: float = 0.98,
    most_features: int = MOST_FEATURES,
    most_links: int = MOST_LINKS,
) -> dict[str, Any]:
    """Prune to what is kept by `node` and `edge`, cap it, and say what each node and edge is.

    Every node carries `share`, the share of all influence that is reached at its rank in the whole graph: the page's
    slider shows nodes up to a share. Edges carry `flow`, the influence that passes, relative to the strongest.
    """
    check_range("node", node, 0, 1)
    check_range("edge", edge, 0, 1)
    shares = dict(zip(graph.nodes.keys(), graph.cumulative_influence().tolist(), strict=True))
    smaller = graph.prune(node, edge) if "pruned" not in graph.metadata else graph
    if smaller.n_features > most_features:
        strongest = smaller.influence()[: smaller.n_features].topk(most_features).indices
        smaller = smaller.subgraph(strongest.tolist())
    shown = smaller.nodes.mask("feature", "embedding", "logit") | smaller.stored.linked()
    ids = torch.nonzero(shown).squeeze(1).tolist()
    place = {id: i for i, id in enumerate(ids)}
    keys, influence = smaller.nodes.keys(), smaller.influence().tolist()
    first_logit = len(smaller.nodes) - len(smaller.probabilities)
    nodes = []
    for id in ids:
        found = smaller.nodes[id]
        entry: dict[str, Any] = {
            "kind": found.kind,
            "layer": found.layer,
            "position": found.position,
            "index": found.index,
            "label": _label(found, labels),
            "activation": found.activation,
            "influence": influence[id],
            "share": shares[keys[id]],
        }
        if id >= first_logit:
            entry["probability"] = float(smaller.probabilities[id - first_logit])
        nodes.append(entry)
    return {
        "prompt": str(graph.metadata.get("prompt", "".join(graph.token_strings))),
        "tokens": graph.token_strings,
        "layers": _n_layers(graph),
        "nodes": nodes,
        "links": _links(smaller, place, most_links),
        "supernodes": _supernodes(smaller, nodes, place),
        "scores": graph.scores(),
        "accounting": graph.accounting,
        "size": {"features": graph.n_features, "shown": smaller.n_features, "edges": graph.stored.count()},
        "weight_name": graph.weight_name,
        "model": str(_name(graph)),
    }


def _n_layers(graph: Graph) -> int:
    layers = graph.nodes.layer[graph.nodes.mask("feature", "error", "bias")]
    return int(layers.max()) + 1 if len(layers) else 0


def _name(graph: Graph) -> Any:
    model = graph.metadata.get("model")
    return model.get("name", "") if isinstance(model, dict) else model or ""


def _label(node: Any, labels: Labels | None) -> str:
    if node.kind == "feature" and labels is not None:
        return labels.get(node.layer, node.index) or node.label
    return node.label


def _links(graph: Graph, place: dict[int, int], most: int) -> list[list[float]]:
    """[source, target, weight, flow] of the strongest edges, strongest first."""
    edges, carried = graph.stored.strongest(graph.influence_per_input, most)
    targets, columns = graph.row_ids[edges.row].tolist(), (edges.source.tolist(), edges.value.tolist())
    return [
        [place[source], place[target], weight, share]
        for target, source, weight, share in zip(targets, *columns, (carried / carried[:1]).tolist(), strict=True)
        if source in place and target in place
    ]


def _supernodes(graph: Graph, nodes: list[dict[str, Any]], place: dict[int, int]) -> list[dict[str, Any]]:
    """The graph's own groups, else the features that share a label; the most influential group first."""
    groups = {name: [place[id] for id in members if id in place] for name, members in graph.supernodes.items()}
    if not groups:
        for i, node in enumerate(nodes):
            if node["kind"] == "feature" and node["label"]:
                groups.setdefault(plain_label(node["label"]), []).append(i)
        groups = {name: members for name, members in groups.items() if len(members) > 1}
    weight = {name: sum(nodes[i]["influence"] for i in members) for name, members in groups.items()}
    ranked = sorted((name for name in groups if groups[name]), key=weight.__getitem__, reverse=True)
    return [{"name": name, "members": groups[name]} for name in ranked]
