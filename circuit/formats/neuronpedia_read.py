"""Reading Neuronpedia graph JSON: files from anywhere, so every claim they make is checked first."""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch

from ...data.errors import UserError
from ..features import from_feature_number
from ..graph import KINDS, DenseRows, Graph, Nodes
from .neuronpedia_qk import read_results

SLUG = r"(?!\.{1,2}$)[A-Za-z0-9_.-]+"
TYPES = {
    "feature": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "embedding": "embedding",
    "logit": "logit",
    "bias": "bias",
    "position": "position embedding",
    "kept": "mlp reconstruction error",
}
LAYERS_LIMIT, NODES_LIMIT, SLOTS_LIMIT = 1_000, 50_000, 1_000_000
REQUIRED = {"metadata": dict, "qParams": dict, "nodes": list, "links": list}
NODE_FIELDS = ("node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp")


def check_neuronpedia(data: Any, where: str = "the graph") -> None:
    """Refuse what breaks the format: the schema's demands, and those that it does not state."""
    if not isinstance(data, dict):
        raise UserError(f"{where} is not a graph: it should be one JSON object")
    for key, kind in REQUIRED.items():
        if not isinstance(data.get(key), kind):
            raise UserError(f"{where} lacks {key}, or it is not a {'list' if kind is list else 'mapping'}")
    metadata = data["metadata"]
    for key in ("slug", "scan", "prompt"):
        if not isinstance(metadata.get(key), str):
            raise UserError(f"{where}: metadata.{key} is missing or not text")
    for key in ("slug", "scan"):
        if not re.fullmatch(SLUG, metadata[key]):
            raise UserError(f"{where}: metadata.{key} {metadata[key]!r} takes letters, digits, '_', '.' and '-' alone")
    tokens = metadata.get("prompt_tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise UserError(f"{where}: metadata.prompt_tokens must be a list of texts, and not empty")
    if len(data["nodes"]) > NODES_LIMIT:
        raise UserError(f"{where} has {len(data['nodes'])} nodes; at most {NODES_LIMIT} are read")
    known = set()
    for node in data["nodes"]:
        _check_node(node, len(tokens), where)
        if node["node_id"] in known:
            raise UserError(f"{where}: two nodes have the id {node['node_id']!r}, so its links have no clear meaning")
        known.add(node["node_id"])
    for link in data["links"]:
        if not isinstance(link, dict) or not {"source", "target", "weight"} <= link.keys():
            raise UserError(f"{where}: a link lacks its source, target or weight")
        if not _is_number(link["weight"]):
            raise UserError(f"{where}: the link to {link['target']!r} has no finite weight")
        for end in (link["source"], link["target"]):
            if not isinstance(end, str) or end not in known:
                raise UserError(f"{where}: a link names node {end!r}, which is not there")


def _check_node(node: Any, n_tokens: int, where: str) -> None:
    if not isinstance(node, dict):
        raise UserError(f"{where}: a node is not a mapping")
    if missing := [key for key in NODE_FIELDS if key not in node]:
        raise UserError(f"{where}: node {node.get('node_id')!r} lacks {', '.join(missing)}")
    if not isinstance(node["node_id"], str) or not isinstance(node["clerp"], str):
        raise UserError(f"{where}: node {node['node_id']!r} has an id or a label that is not text")
    position = node["ctx_idx"]
    if not isinstance(position, int) or isinstance(position, bool) or not 0 <= position < n_tokens:
        raise UserError(f"{where}: node {node['node_id']!r} is at position {position}, outside the prompt")
    for key in ("influence", "activation", "token_prob"):
        if node.get(key) is not None and not _is_number(node[key]):
            raise UserError(f"{where}: node {node['node_id']!r} has {key} {node[key]!r}, which is not a finite number")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_neuronpedia(path: str | Path) -> Graph:
    """Read a graph. Errors and embeddings that the file leaves out are there, without edges."""
    path = Path(path)
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON") from error
    check_neuronpedia(data, str(path))
    strings = data["metadata"]["prompt_tokens"]
    places = {node["node_id"]: _place(node, str(path)) for node in data["nodes"]}
    if len(set(places.values())) < len(places):
        raise UserError(f"{path}: two of its nodes stand for the same thing")
    tokens = _tokens(places.values(), data["metadata"], len(strings))
    order = _all_nodes(list(places.values()), tokens, str(path))
    row_of = {place: i for i, place in enumerate(order)}
    nodes, by_place = _table(order, data["nodes"], places)
    note = data["metadata"].get("crosslace")
    note = note if isinstance(note, dict) else {}
    kept = _kept(note, len(strings))
    left = torch.isin(nodes.position, torch.tensor([int(position) for position in kept], dtype=torch.long))
    nodes = nodes.turned(left & nodes.mask("error"), "kept")
    logits = [i for i, place in enumerate(order) if place[0] == "logit"]
    n_features = sum(place[0] == "feature" for place in order)
    target_row = {i: i for i in range(n_features)} | {node: n_features + i for i, node in enumerate(logits)}
    rows = torch.zeros(len(target_row), len(order))
    for link in data["links"]:
        target = target_row.get(row_of[places[link["target"]]])
        if target is None:
            raise UserError(f"{path}: a link leads into {link['target']!r}, but only features and logits have inputs")
        rows[target, row_of[places[link["source"]]]] += link["weight"]
    probabilities = [float(by_place[order[i]].get("token_prob") or 0.0) for i in logits]
    ids = {node_id: row_of[place] for node_id, place in places.items()}

    def place(entry: dict[str, Any], where: str) -> Place:
        found = _place(entry, where)
        return ("kept", *found[1:]) if found[0] == "error" and str(found[2]) in kept else found

    explanations = read_results(data, place, str(path))
    return Graph(
        stored=DenseRows(rows),
        nodes=nodes,
        probabilities=torch.tensor(probabilities),
        tokens=tokens,
        token_strings=strings,
        cancelled=torch.zeros(len(rows)),
        metadata={
            "prompt": data["metadata"]["prompt"],
            "model": {"name": data["metadata"]["scan"]},
            "imported": data["metadata"],
            "accounting": _accounting(data["metadata"], n_features),
            "kept": kept,
            "partial": True,
            **({"qk": explanations} if explanations else {}),
            "scores": _scores(note),
        },
        supernodes=_supernodes(data["qParams"], ids),
    )


Place = tuple[str, int, int, Any]
"""(kind, layer, position, index) of a node; the index of a logit that is not one token is its id."""


def _place(node: dict[str, Any], where: str) -> Place:
    kind = next((kind for kind, name in TYPES.items() if name == node["feature_type"]), None)
    if kind is None:
        raise UserError(f"{where}: node {node['node_id']!r} is of type {node['feature_type']!r}, which is not known")
    position, node_id = node["ctx_idx"], node["node_id"]
    if kind in ("embedding", "position"):
        match = re.fullmatch(r"E_(\d{1,9})_\d+", node_id)
        return kind, -1, position, int(match[1]) if match and kind == "embedding" else 0
    try:
        layer = int(node["layer"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: node {node_id!r} has layer {node['layer']!r}, which is no number") from error
    if not 0 <= layer < LAYERS_LIMIT:
        raise UserError(f"{where}: node {node_id!r} has layer {layer}, outside 0 to {LAYERS_LIMIT - 1}")
    if kind == "logit":
        match = re.fullmatch(r"\d+_(\d{1,9})_\d+", node_id)
        return kind, layer, position, int(match[1]) if match else node_id
    if kind == "feature":
        return kind, layer, position, _feature_index(node, layer, where)
    return kind, layer, position, 0


def _feature_index(node: dict[str, Any], layer: int, where: str) -> int:
    """The index stands in the id; where ids have another form, in the Cantor-paired number."""
    match = re.fullmatch(r"(\d+)_(\d{1,9})_(\d+)", node["node_id"])
    if match and int(match[1]) == layer:
        return int(match[2])
    number = node["feature"]
    if isinstance(number, int) and 0 <= number < 2**62:
        paired_layer, index = from_feature_number(number)
        if paired_layer == layer:
            return index
    raise UserError(f"{where}: neither the id nor the number of node {node['node_id']!r} tells its feature")


def _tokens(places: Any, metadata: dict[str, Any], length: int) -> list[int]:
    """Token ids: from the embeddings, or from our own note; 0 where the file tells neither."""
    note = metadata.get("crosslace")
    own = note.get("tokens") if isinstance(note, dict) else None
    if isinstance(own, list) and len(own) == length and all(isinstance(t, int) and t >= 0 for t in own):
        return own
    tokens = [0] * length
    for kind, _, position, index in places:
        if kind == "embedding":
            tokens[position] = index
    return tokens


def _kept(note: dict[str, Any], length: int) -> dict[str, str]:
    """Positions that are left to the model, and why, from our own note."""
    found = note.get("kept")
    positions = {str(position): position for position in range(length)}
    return (
        {at: why for at, why in found.items() if at in positions and isinstance(why, str)}
        if isinstance(found, dict)
        else {}
    )


def _scores(note: dict[str, Any]) -> dict[str, float] | None:
    """The whole graph's scores from our own note, where there is one; a file holds only part of a graph."""
    found = note.get("scores")
    return found if isinstance(found, dict) and found and all(map(_is_number, found.values())) else None


def _accounting(metadata: dict[str, Any], n_features: int) -> dict[str, Any]:
    """The whole graph's accounting from our own note, where there is one; features that the file lacks are left out."""
    note = metadata.get("crosslace")
    own = note.get("accounting") if isinstance(note, dict) else None
    known = ("active_features", "largest_violation", "largest_relative_violation")
    if not isinstance(own, dict) or not all(_is_number(own.get(name)) for name in known):
        return {}
    return {**{name: own[name] for name in known}, "left_out_features": max(0, own[known[0]] - n_features)}


def _all_nodes(places: list[Place], tokens: list[int], where: str) -> list[Place]:
    """Every node of the graph in its order: errors and embeddings of all positions, found in the file or not."""
    n_layers = max([layer for kind, layer, _, _ in places if kind in ("feature", "error", "bias")], default=-1) + 1
    positions = range(len(tokens))
    if n_layers * len(tokens) > SLOTS_LIMIT:
        raise UserError(f"{where} has {n_layers} layers and {len(tokens)} tokens, more than is read")
    given = {kind: sorted({p for p in places if p[0] == kind}, key=lambda p: p[1:3]) for kind in KINDS}
    features = sorted(given["feature"], key=lambda p: p[1:])
    errors = [("error", layer, position, 0) for layer in range(n_layers) for position in positions]
    embedded = {p[2]: p for p in given["embedding"]}
    embeddings = [embedded.get(position, ("embedding", -1, position, tokens[position])) for position in positions]
    logits = [place for place in places if place[0] == "logit"]
    return [*features, *errors, *embeddings, *given["position"], *given["bias"], *logits]


def _table(
    order: list[Place], nodes: list[dict[str, Any]], places: dict[str, Place]
) -> tuple[Nodes, dict[Place, dict[str, Any]]]:
    by_place = {places[node["node_id"]]: node for node in nodes}
    table = Nodes(
        code=torch.tensor([KINDS.index(place[0]) for place in order], dtype=torch.int8),
        layer=torch.tensor([place[1] for place in order]),
        position=torch.tensor([place[2] for place in order]),
        index=torch.tensor([place[3] if isinstance(place[3], int) else -1 for place in order]),
        activation=torch.tensor([float(by_place.get(place, {}).get("activation") or 0.0) for place in order]),
    )
    for i, place in enumerate(order):
        clerp = by_place.get(place, {}).get("clerp", "")
        if place[0] == "logit":
            match = re.fullmatch(r'Output "(.*)" \(p=[\d.]+\)', clerp, re.DOTALL)
            table.labels[i] = match[1] if match else clerp
        elif place[0] == "feature" and clerp:
            table.labels[i] = clerp
    return table, by_place


def _supernodes(params: dict[str, Any], ids: dict[str, int]) -> dict[str, list[int]]:
    groups = {}
    for group in params.get("supernodes") or []:
        if isinstance(group, list) and len(group) > 1 and all(isinstance(member, str) for member in group):
            members = [ids[member] for member in group[1:] if member in ids]
            if members:
                groups[group[0]] = sorted(members)
    return groups
