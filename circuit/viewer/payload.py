"""What the graph page gets: the nodes and edges of a graph that can be looked at, and its figures. docs/viewer.md
describes the format."""

import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...data.errors import check_range
from ..features import Labels
from ..graph import Graph, Node, plain_label

MOST_FEATURES, MOST_LINKS = 1500, 50_000


def graph_payload(
    graph: Graph,
    labels: Labels | None = None,
    node: float = 0.95,
    edge: float = 0.98,
    most_features: int = MOST_FEATURES,
    most_links: int = MOST_LINKS,
) -> dict[str, Any]:
    """Prune to what is kept by `node` and `edge`, cap it, and say what each node and edge is.

    Every node carries its `influence` in the whole graph and `share`, the share of all influence that is reached at
    its rank there: the page's slider shows nodes up to a share. Links carry `flow`, the influence that passes,
    relative to the strongest.
    """
    check_range("node", node, 0, 1)
    check_range("edge", edge, 0, 1)
    keys = graph.nodes.keys()
    shares = dict(zip(keys, _short(graph.cumulative_influence()), strict=True))
    influence = dict(zip(keys, _short(graph.influence()), strict=True))
    smaller = graph.prune(node, edge) if "pruned" not in graph.metadata else graph
    if smaller.n_features > most_features:
        strongest = smaller.influence()[: smaller.n_features].topk(most_features).indices
        smaller = smaller.subgraph(strongest.tolist())
    shown = smaller.nodes.mask("feature", "embedding", "logit") | smaller.stored.linked()
    ids = torch.nonzero(shown).squeeze(1).tolist()
    place, columns = {id: i for i, id in enumerate(ids)}, smaller.nodes.keys()
    every = list(smaller.nodes)  # columns at once: one node at a time takes a hundred times as long
    found = [every[id] for id in ids]
    activations = _short(torch.tensor([one.activation for one in found]))
    nodes = [
        {
            "key": key,
            "kind": one.kind,
            "layer": one.layer,
            "position": one.position,
            "index": one.index,
            "label": _label(one, labels),
            "activation": activation,
            "influence": influence[columns[one.id]],
            "share": shares[columns[one.id]],
        }
        for key, one, activation in zip(node_keys(found), found, activations, strict=True)
    ]
    for entry, probability in zip(nodes[len(nodes) - len(smaller.probabilities) :], smaller.probabilities.tolist()):
        entry["probability"] = probability
    features = float(graph.influence()[: graph.n_features].sum())
    return {
        "prompt": str(graph.metadata.get("prompt", "".join(graph.token_strings))),
        "tokens": graph.token_strings,
        "token_ids": graph.tokens,
        "layers": n_layers(graph),
        "masked": masked_positions(graph),
        "nodes": nodes,
        "links": _links(smaller, place, most_links),
        "supernodes": _supernodes(smaller, nodes, place),
        "scores": graph.scores(),
        "shown_scores": smaller.scores(),
        "accounting": graph.accounting,
        "size": {
            "features": graph.n_features,
            "shown": smaller.n_features,
            "edges": graph.stored.count(),
            "shown_edges": smaller.stored.count(),
            "feature_influence": features,
        },
        "weight_name": graph.weight_name,
        "partial": graph.partial,
        "model": str(_name(graph)),
        "transcoder": graph.metadata.get("transcoder", {}),
    }


def node_keys(nodes: Iterable[Node]) -> list[str]:
    """A name for every node that a new trace of the prompt gives it again: `layer/position/index` of a feature."""
    return [_key(node) for node in nodes]


def _key(node: Node) -> str:
    if node.kind == "feature":
        return f"{node.layer}/{node.position}/{node.index}"
    if node.kind == "embedding":
        return f"E/{node.position}"
    if node.kind == "logit":
        name = str(node.index) if node.index >= 0 else f"x{zlib.crc32(node.label.encode()):08x}"
        return f"logit/{node.position}/{name}"
    return f"{node.kind}/{node.layer}/{node.position}"


def masked_positions(graph: Graph) -> list[dict[str, Any]]:
    """Positions that are left to the model, with the reason, where the graph says so."""
    return [{"position": position, "reason": reason} for position, reason in sorted(graph.kept.items())]


def n_layers(graph: Graph) -> int:
    """Layers of the model that the graph speaks of."""
    layers = graph.nodes.layer[graph.nodes.mask("feature", "error", "kept", "bias")]
    return int(layers.max()) + 1 if len(layers) else 0


def _name(graph: Graph) -> Any:
    model = graph.metadata.get("model")
    return model.get("name", "") if isinstance(model, dict) else model or ""


def _label(node: Node, labels: Labels | None) -> str:
    if node.kind == "feature" and labels is not None:
        return labels.get(node.layer, node.index) or node.label
    return node.label


def _short(values: Tensor) -> list[float]:
    """Five digits: what a page can show, at half the bytes."""
    wide = values.cpu().double()
    tens = 10.0 ** (4 - wide.abs().clamp_min(1e-200).log10().floor())
    return torch.where(wide == 0, wide, (wide * tens).round() / tens).tolist()


def _links(graph: Graph, place: dict[int, int], most: int) -> dict[str, list]:
    """Source, target, weight and flow of the strongest edges, strongest first, each as a column."""
    edges, carried = graph.stored.strongest(graph.influence_per_input, most)
    where = torch.full((len(graph.nodes),), -1)
    where[list(place)] = torch.tensor(list(place.values()))
    source, target = where[edges.source.cpu()], where[graph.row_ids[edges.row].cpu()]
    both = (source >= 0) & (target >= 0)
    flow = (carried / carried[:1]).cpu()[both]
    return {
        "source": source[both].tolist(),
        "target": target[both].tolist(),
        "weight": _short(edges.value.cpu()[both]),
        "flow": _short(flow),
    }


def _supernodes(graph: Graph, nodes: list[dict[str, Any]], place: dict[int, int]) -> list[dict[str, Any]]:
    """The graph's own groups, else the features that share a label and a position; the most influential first."""
    groups = {name: [place[id] for id in members if id in place] for name, members in graph.supernodes.items()}
    if not groups:
        alike: dict[tuple[str, int], list[int]] = {}
        for i, node in enumerate(nodes):
            if node["kind"] == "feature" and node["label"]:
                alike.setdefault((plain_label(node["label"]), node["position"]), []).append(i)
        names = [name for name, _ in alike]
        groups = {
            name if names.count(name) == 1 else f"{name} · {graph.token_strings[position].strip()}": members
            for (name, position), members in alike.items()
            if len(members) > 1
        }
    weight = {name: sum(nodes[i]["influence"] for i in members) for name, members in groups.items()}
    ranked = sorted((name for name in groups if groups[name]), key=weight.__getitem__, reverse=True)
    return [{"name": name, "members": groups[name]} for name in ranked]
