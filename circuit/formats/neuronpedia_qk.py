"""Why heads looked where they did, in Neuronpedia's graph JSON: `qk_tracing_results`, written and read.

The format has one explanation a node: the strongest pairs of a score, and the marginals of its query's and key's sides.
Ours stands at the target of the edge that the head carries; which head, query and key it is about is noted beside, as
`crosslace`. Terms whose nodes are not in the graph are described in `qk_only_nodes`.

In a graph's metadata, and between the two programs, an explanation is
`{"node", "pairs": [[node, node, value]], "query_side": [[node, value]], "key_side": [[node, value]], "about"}`, nodes
being [kind, layer, position, index] or ["constant"].
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from ...data.errors import UserError

RESULTS = "qk_tracing_results"
LISTS = {"pairs": "pair_wise_contributors", "query_side": "top_q_marginal_contributors"} | {
    "key_side": "top_k_marginal_contributors"
}
MOST = 1000
CONSTANT = "QK_constant"
"""The id of what does not come from the residual stream: no node of ours."""


def explanations_of(heads: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The explanations of a graph's heads.json, one a target node, the strongest head's first."""
    found: dict[str, dict[str, Any]] = {}
    for looked in (heads or {}).get("attention", []):
        target, key = looked["carried"]["edge"]["target"], looked["carried"]["key"]
        told = next(one for one in looked["keys"] if one["key"] == key)
        about = {"layer": looked["layer"], "head": looked["head"], "query": looked["query"], "key": key}
        found.setdefault(str(target), {"node": target, **{name: told[name] for name in LISTS}, "about": about})
    return list(found.values())


def add_results(
    data: dict[str, Any],
    explanations: list[dict[str, Any]],
    id_of: Mapping[tuple, str],
    describe: Callable[[tuple], dict[str, Any]],
) -> None:
    """Put explanations into a file's nodes, as far as those are in it."""
    by_id = {entry["node_id"]: entry for entry in data["nodes"]}
    others: dict[str, dict[str, Any]] = {}

    def name(key: list[Any]) -> str:
        key_ = tuple(key)
        if key_ in id_of:
            return id_of[key_]
        entry = describe(key_)
        others[entry["node_id"]] = entry
        return entry["node_id"]

    for one in explanations:
        entry = by_id.get(id_of.get(tuple(one["node"]), ""))
        if entry is None:
            continue
        entry[RESULTS] = {
            theirs: [[*map(name, term[:-1]), term[-1]] for term in one[ours]] for ours, theirs in LISTS.items()
        } | ({"crosslace": one["about"]} if one.get("about") else {})
    if others:
        data["qk_only_nodes"] = others


def constant_entry() -> dict[str, Any]:
    """What stands for the constant of queries and keys."""
    place = {"layer": "E", "ctx_idx": 0, "jsNodeId": CONSTANT, "clerp": "Constant of queries and keys"}
    return {"node_id": CONSTANT, "feature": None, "feature_type": "bias", **place, "activation": None}


def read_results(
    data: dict[str, Any], place: Callable[[dict[str, Any], str], tuple], where: str
) -> list[dict[str, Any]]:
    """The explanations of a file, nodes as ours; whatever is not as the schema says is refused."""
    others = data.get("qk_only_nodes", {})
    if not isinstance(others, dict):
        raise UserError(f"{where}: qk_only_nodes is not a mapping")
    entries = {entry["node_id"]: entry for entry in data["nodes"]}
    for node_id, entry in others.items():
        needed = ("feature_type", "layer", "ctx_idx", "jsNodeId", "clerp")
        if not isinstance(entry, dict) or any(field not in entry for field in needed):
            raise UserError(f"{where}: {node_id!r} of qk_only_nodes lacks what a node has")
        at = entry["ctx_idx"]
        if type(at) is not int or not 0 <= at < len(data["metadata"]["prompt_tokens"]):
            raise UserError(f"{where}: {node_id!r} of qk_only_nodes is at position {at!r}, outside the prompt")
        entries.setdefault(node_id, {"feature": None, **entry, "node_id": node_id})

    def key(node_id: Any) -> list[Any]:
        if node_id == CONSTANT:
            return ["constant"]
        if not isinstance(node_id, str) or node_id not in entries:
            raise UserError(f"{where}: {RESULTS} names node {node_id!r}, which is not there")
        return list(place(entries[node_id], where))

    found = []
    for entry in data["nodes"]:
        if (results := entry.get(RESULTS)) is None:
            continue
        if not isinstance(results, dict):
            raise UserError(f"{where}: {RESULTS} of node {entry['node_id']!r} is not a mapping")
        one: dict[str, Any] = {"node": key(entry["node_id"])}
        for ours, theirs in LISTS.items():
            terms, length = results.get(theirs), 3 if ours == "pairs" else 2
            if not isinstance(terms, list) or len(terms) > MOST or not all(_is_term(term, length) for term in terms):
                raise UserError(f"{where}: {theirs} of node {entry['node_id']!r} is not a list of nodes and numbers")
            one[ours] = [[*map(key, term[:-1]), term[-1]] for term in terms]
        about = results.get("crosslace")
        found.append(one | ({"about": about} if isinstance(about, dict) else {}))
    return found


def _is_term(term: Any, length: int) -> bool:
    if not isinstance(term, list) or len(term) != length:
        return False
    value = term[-1]
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
