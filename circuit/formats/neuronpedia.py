"""Neuronpedia graph JSON, both ways: what its site and circuit-tracer's viewer show.

The format has features, reconstruction errors, embeddings and logits. What is left to the model by decree is written as
errors of its places, with a name that says so. Biases and position embeddings have no form in
it: they are written as nodes of their own types with `biases=True`, and left out otherwise. Pruning, where asked for,
happens here, because a node's `influence` is its rank in the graph *before* pruning.
"""

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ...data.errors import UserError, check_range
from ..features import Labels, feature_number
from ..graph import KINDS, Graph, Node, fewest_edges
from .neuronpedia_qk import add_results, constant_entry, explanations_of
from .neuronpedia_read import SLUG, TYPES, check_neuronpedia, read_neuronpedia

__all__ = ["check_neuronpedia", "graph_to_neuronpedia", "read_neuronpedia", "slugified", "write_neuronpedia"]

GENERATOR = "Crosslace"
DESCRIBED = ("node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp")


@dataclass(frozen=True)
class NeuronpediaSettings:
    """How `crosslace export to=neuronpedia` writes graphs."""

    scan: str | None = None
    """The model's name there, such as gemma-2-2b; made from the model's own name when not given."""
    source_set: str | None = None
    """Where the features' dashboards are there, such as gemmascope-transcoder-16k."""
    feature_url: str | None = None
    """An address under which features' JSON lies, in place of the site's own dashboards."""
    node: float = 0.8
    """Share of the influence that the nodes of a file carry."""
    edge: float = 0.98
    """Share of the influence that the links of a file carry."""
    errors: bool = False
    """List all links from errors, also those below the thresholds."""
    labels: bool = True
    """Give features the names that they have in the run."""

    def __post_init__(self) -> None:
        check_range("neuronpedia.node", self.node, 0, 1)
        check_range("neuronpedia.edge", self.edge, 0, 1)


def write_neuronpedia(
    graph: Graph, path: str | Path, slug: str | None = None, labels: Labels | None = None, **options: Any
) -> Path:
    """Write a graph as Neuronpedia's JSON; the options are those of `graph_to_neuronpedia`."""
    path = Path(path)
    data = graph_to_neuronpedia(graph, slug or slugified(path.stem), labels, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(data, ensure_ascii=False, allow_nan=False), "utf-8")
    aside.replace(path)
    return path


def graph_to_neuronpedia(
    graph: Graph,
    slug: str,
    labels: Labels | None = None,
    *,
    scan: str | None = None,
    node: float | None = 0.8,
    edge: float | None = 0.98,
    biases: bool = False,
    feature_url: str | None = None,
    source_set: str | None = None,
    heads: Mapping[str, Any] | None = None,
    errors: bool = False,
) -> dict[str, Any]:
    """The graph as a dictionary of the schema.

    `heads` is what `attribution.explain_attention` found or `load_heads` read; without it, what the graph came with.

    `node` and `edge` prune it (None keeps all; a graph that is pruned already is left as it is), error nodes and their
    links too unless `errors` keeps them all: there are some for every layer and token below each feature. Features are
    looked up on Neuronpedia by `scan` (and `source_set`); with `feature_url` they are fetched from there instead, one
    JSON a feature, and `schema_version` is left out because version 1 ignores that address.
    """
    scan = scan or slugified(str(_model_name(graph) or "model"))
    for what, name in (("slug", slug), ("scan", scan)):
        if not re.fullmatch(SLUG, name):
            raise UserError(f"{what} {name!r} is not allowed; it takes letters, digits, '_', '.' and '-' alone")
    whole = graph
    shares = dict(zip(graph.nodes.keys(), graph.cumulative_influence().tolist(), strict=True))
    settings = graph.metadata.get("pruned")
    if settings is None and node is not None:
        settings = {"node": node, "edge": 1.0 if edge is None else edge}
        graph = graph.prune(**settings)
    if settings is not None and not errors:
        graph = _without_weak_errors(graph, shares, **settings)
    n_layers = _n_layers(graph)
    drawn = ("feature", "error", "kept", "embedding", "logit", *(("bias", "position") if biases else ()))
    linked = graph.stored.linked().tolist()
    keys = graph.nodes.keys()
    nodes, ids = [], {}
    for place, found in enumerate(graph.nodes):
        if found.kind not in drawn or (found.kind in ("error", "kept", "bias", "position") and not linked[place]):
            continue
        entry = _node(graph, found, n_layers, labels)
        entry["influence"] = None if found.kind == "logit" else shares[keys[place]]
        ids[place] = entry["node_id"]
        nodes.append(entry)
    data = {
        "metadata": _metadata(whole, slug, scan, settings, feature_url, source_set, n_layers),
        "qParams": {
            "pinnedIds": [ids[member] for group in graph.supernodes.values() for member in group if member in ids],
            "supernodes": [[name, *(ids[m] for m in group if m in ids)] for name, group in graph.supernodes.items()],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": nodes,
        "links": _links(graph, ids),
    }
    explanations = explanations_of(heads) if heads is not None else graph.metadata.get("qk") or []
    id_of = {(KINDS[code], *rest): ids[place] for place, (code, *rest) in enumerate(keys) if place in ids}
    add_results(data, explanations, id_of, lambda key: _described(whole, key, n_layers, labels))
    return data


def _without_weak_errors(graph: Graph, shares: Mapping[Any, float], node: float, edge: float) -> Graph:
    """A pruned graph for a file: links from errors are listed where they reach both thresholds that other links did."""
    from_error = graph.nodes.mask("error", "kept")
    keys = graph.nodes.keys()
    weak = torch.tensor([shares[key] > node for key in keys], device=from_error.device) & from_error
    sources = graph.stored.sources()
    gone = weak[sources] | (from_error[sources] & ~fewest_edges(graph.values, graph.influence_per_input, edge))
    return replace(graph, stored=replace(graph.stored, values=graph.values.masked_fill(gone, 0)))


def _described(graph: Graph, key: tuple, n_layers: int, labels: Labels | None) -> dict[str, Any]:
    """A node that an explanation names and the file's graph has not."""
    if key == ("constant",):
        return constant_entry()
    kind, layer, position, index = key
    found = graph.nodes.ids(kind, layer, position, index)
    node = graph.nodes[found[0]] if found else Node(-1, kind, layer, position, index, 0.0, "")
    entry = _node(graph, node, n_layers, labels)
    return {name: entry[name] for name in DESCRIBED} | {"activation": node.activation if found else None}


def slugified(text: str) -> str:
    """A name that the format allows."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.") or "graph"


def _model_name(graph: Graph) -> str | None:
    model = graph.metadata.get("model")
    return model.get("name") if isinstance(model, dict) else model


def _n_layers(graph: Graph) -> int:
    inner = graph.nodes.mask("feature", "error", "kept", "bias")
    return int(graph.nodes.layer[inner].max()) + 1 if bool(inner.any()) else 0


def _node(graph: Graph, node: Node, n_layers: int, labels: Labels | None) -> dict[str, Any]:
    layer, position, index = node.layer, node.position, node.index
    token = json.dumps(graph.token_strings[position], ensure_ascii=False)
    entry: dict[str, Any] = {
        "node_id": "",
        "feature": -1,
        "layer": str(layer),
        "ctx_idx": position,
        "feature_type": TYPES[node.kind],
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": "",
        "clerp": "",
        "influence": None,
        "activation": None,
    }
    if node.kind == "feature":
        label = labels.get(layer, index) if labels is not None else None
        entry |= {"node_id": f"{layer}_{index}_{position}", "jsNodeId": f"{layer}_{index}-0"}
        entry |= {"feature": feature_number(layer, index), "activation": node.activation}
        entry["clerp"] = label or node.label
    elif node.kind == "embedding":
        entry |= {"node_id": f"E_{index}_{position}", "jsNodeId": f"E_{index}-{position}", "layer": "E"}
        entry |= {"feature": position, "clerp": f"Emb: {token}"}
    elif node.kind == "logit":
        rank = node.id - (len(graph.nodes) - len(graph.probabilities))
        probability = float(graph.probabilities[rank])
        name = str(index) if index >= 0 else f"target{rank}"
        entry |= {"node_id": f"{n_layers}_{name}_{position}", "jsNodeId": f"L_{name}-{position}"}
        entry |= {"layer": str(n_layers), "feature": index, "activation": node.activation}
        entry |= {"token_prob": probability, "is_target_logit": rank == 0}
        entry["clerp"] = f'Output "{node.label}" (p={probability:.3f})'
    else:
        # "error_mlp" is no number, so the id cannot be that of a feature
        name = {"bias": "bias", "position": "position"}.get(node.kind, "error_mlp")
        entry |= {"node_id": f"{layer}_{name}_{position}", "jsNodeId": f"{layer}_{name}-{position}"}
        kept = f"Left to the model: mlp {token}"
        said = {"error": f"Err: mlp {token}", "kept": kept, "bias": "Bias", "position": "Position"}
        entry["clerp"] = said[node.kind]
        if node.kind == "position":
            entry["layer"] = "E"
    return entry


def _links(graph: Graph, ids: dict[int, str]) -> list[dict[str, Any]]:
    targets = graph.row_ids.tolist()
    return [
        {"source": ids[source], "target": ids[targets[row]], "weight": weight}
        for block in graph.stored.edges()
        for row, source, weight in zip(*(column.tolist() for column in block), strict=True)
        if source in ids and targets[row] in ids and math.isfinite(weight)
    ]


def _metadata(
    graph: Graph,
    slug: str,
    scan: str,
    pruned: dict[str, float] | None,
    feature_url: str | None,
    source_set: str | None,
    n_layers: int,
) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "slug": slug,
        "scan": scan,
        "transcoder_list": [],
        "prompt_tokens": graph.token_strings,
        "prompt": str(graph.metadata.get("prompt", "".join(graph.token_strings))),
        "node_threshold": pruned["node"] if pruned else 1.0,
        "info": {
            "generator": {"name": GENERATOR, "version": installed_version()},
            "create_time_ms": int(time.time() * 1000),
        },
        "generation_settings": _plain(graph.metadata.get("settings", {})),
        "pruning_settings": {"node_threshold": pruned["node"], "edge_threshold": pruned["edge"]} if pruned else {},
        "crosslace": {
            "tokens": graph.tokens,
            "n_layers": n_layers,
            "scores": graph.scores(),
            "accounting": _plain(graph.accounting),
            "kept": {str(position): reason for position, reason in graph.kept.items()},
        },
    }
    if feature_url is None:
        metadata["schema_version"] = 1
    details = {"feature_json_base_url": feature_url, "neuronpedia_source_set": source_set}
    if given := {key: value for key, value in details.items() if value is not None}:
        metadata["feature_details"] = given
    return metadata


def _plain(value: Any) -> Any:
    """Only what JSON holds, and no number that it does not."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)


def installed_version() -> str:
    """Of this package, as it was installed."""
    try:
        return version("crosslace")
    except PackageNotFoundError:
        return "unknown"
