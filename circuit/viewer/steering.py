"""What changed multipliers of a graph's features do, and what the graph had said they would."""

import re
from collections.abc import Sequence
from typing import Any

import torch

from ...data.errors import UserError
from ..graph import Graph, Node
from ..model import ReplacementModel
from ..replacement import Intervention, InterventionResult, Mode
from .payload import node_keys

MOST_CHANGES, SHOWN = 500, 8
FEATURE = re.compile(r"(\d{1,5})/(\d{1,6})/(\d{1,9})")


def key_ids(graph: Graph, keys: Sequence[str]) -> list[int]:
    """The nodes with these keys."""
    ids = {key: id for id, key in enumerate(node_keys(graph.nodes))}
    missing = [key for key in keys if key not in ids]
    if missing:
        raise UserError(f"the graph has no node {str(missing[0])[:80]!r}")
    return [ids[key] for key in keys]


def steered(model: ReplacementModel, graph: Graph, body: dict[str, Any], mode: Mode, tokens: int) -> dict[str, Any]:
    """`changes` are multipliers by node key, or `{"value": activation}`, also of features that are silent here;
    `groups` name nodes whose activations are watched; `target` is a node that is compared besides the logits."""
    group = [_intervention(key, change) for key, change in _table(body, "changes", MOST_CHANGES).items()]
    if not group:
        raise UserError("change a multiplier first")
    result = model.intervene(graph.tokens, group, mode)
    exact = result if mode == "direct" else model.intervene(graph.tokens, group, "direct")
    before, after = result.probabilities(clean=True), result.probabilities()
    shown = torch.cat([before.topk(min(SHOWN, len(before))).indices, after.topk(min(SHOWN, len(after))).indices])
    shown = shown.unique()
    shown = shown[torch.maximum(before, after)[shown].argsort(descending=True)][: SHOWN + 2]
    found: dict[str, Any] = {
        "mode": mode,
        "next": [
            {"token": name, "before": float(before[id]), "after": float(after[id])}
            for name, id in zip(model.lm.token_strings(shown), shown.tolist(), strict=True)
        ],
        "levels": {name: _level(graph, result, keys) for name, keys in _table(body, "groups", MOST_CHANGES).items()},
        "targets": _predictions(graph, group, body.get("target"), _table(body, "groups", MOST_CHANGES), exact, result),
    }
    if tokens:
        texts = model.generate_many(graph.tokens, [[], group], tokens, mode)
        found["text"] = {"before": texts[0].text, "after": texts[1].text}
    return found


def _table(body: dict[str, Any], name: str, most: int) -> dict[str, Any]:
    table = body.get(name) or {}
    if not isinstance(table, dict) or len(table) > most:
        raise UserError(f"{name} takes at most {most} entries by name")
    return table


def _intervention(key: str, change: Any) -> Intervention:
    """From a feature's key, and its multiplier or value."""
    if not (place := FEATURE.fullmatch(key)):
        raise UserError(f"only features can be changed, not {key[:80]!r}")
    layer, position, feature = map(int, place.groups())
    sets = isinstance(change, dict)
    number = change.get("value") if isinstance(change, dict) else change
    if not isinstance(number, int | float) or isinstance(number, bool) or not abs(number) <= 1e6:
        raise UserError(f"a multiplier or value is a number, not {str(number)[:40]}")
    value, times = (float(number), None) if sets else (None, float(number))
    return Intervention(layer, position, feature, value, times)


def _level(graph: Graph, result: InterventionResult, keys: Any) -> float | None:
    """A group's activation as a share of what it was."""
    if not isinstance(keys, list) or len(keys) > MOST_CHANGES:
        raise UserError(f"a group takes a list of at most {MOST_CHANGES} nodes")
    places = [(n.layer, n.position, n.index) for n in map(graph.nodes.__getitem__, key_ids(graph, keys)) if _feature(n)]
    was = sum(float(result.clean_activation(*place)) for place in places)
    return sum(float(result.activation(*place)) for place in places) / was if was > 0 else None


def _feature(node: Node) -> bool:
    return node.kind == "feature"


def _predictions(
    graph: Graph,
    group: Sequence[Intervention],
    target: Any,
    groups: dict[str, list[str]],
    exact: InterventionResult,
    result: InterventionResult,
) -> list[dict[str, Any]]:
    """Of each logit, of a chosen target and of the watched groups: what the edges from what was changed say, what
    happens with all else frozen (the same, or something is wrong), and what happened. Features that are silent here
    have no edges. A group's figures are sums over those of its nodes that were not changed themselves."""
    place = {(n.layer, n.position, n.index): n for n in graph.nodes if n.kind == "feature"}
    shares = {}  # of a source's edges that the change adds or takes away
    for it in group:
        node = place.get((it.layer, int(it.position), it.feature))  # type: ignore[arg-type]
        if node is not None:
            shares[node.id] = (it.times if it.times is not None else (it.value or 0.0) / node.activation) - 1
    ids = [logit.id for logit in graph.logits if logit.token >= 0]
    if isinstance(target, str) and target:
        ids += [id for id in key_ids(graph, [target]) if id not in ids]
    watched = {key: [id] for key, id in zip(node_keys([graph.nodes[id] for id in ids]), ids, strict=True)}
    for name, keys in groups.items():
        watched.setdefault(name, key_ids(graph, keys))
    open_to = {
        name: members
        for name, among in watched.items()
        if (members := [id for id in among if id not in shares and graph.has_row(id)])
    }
    return [
        {
            "key": name,
            "predicted": sum(share * graph.edge(id, source) for id in members for source, share in shares.items()),
            "unseen": len(group) - len(shares),
            "direct": sum(_moved(graph.nodes[id], exact) for id in members),
            "measured": sum(_moved(graph.nodes[id], result) for id in members),
        }
        for name, members in open_to.items()
    ]


def _moved(node: Node, result: InterventionResult) -> float:
    """How far a feature's pre-activation, or a token's logit above the mean, went."""
    if node.kind == "feature":
        place = (node.layer, node.position, node.index)
        return float(result.preactivation(*place) - result.preactivation(*place, clean=True))
    after, before = result.logits[node.position].double(), result.clean_logits[node.position].double()
    return float((after[node.index] - after.mean()) - (before[node.index] - before.mean()))
