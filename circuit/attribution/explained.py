"""A graph's attention in one file beside it: heads of its strongest edges, and why the strongest heads looked there.

`heads.json` is written when asked for (docs/formats.md has its shape). Nodes are [kind, layer, position, index]: so
it stays true of a graph that is pruned later. `["constant"]` stands for what does not come from the residual stream.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...data.errors import UserError
from ..graph import Graph, Nodes
from ..replacement import LocalModel, memory_named
from .heads import EdgeHeads, Head, edge_heads, head_places, rank_heads, strongest_heads
from .qk import CONSTANT, Attention, attention

FORMAT, VERSION = "crosslace-heads", 1
HEADS_FILE = "heads.json"
HEADS_OF_AN_EDGE = 8
TERMS = 12
SIDES = {"query_side": "query", "key_side": "key", "attention": "attention"}


def explain_attention(replacement: LocalModel, graph: Graph, edges: int = 500, heads: int = 5) -> dict[str, Any]:
    """The heads of a graph's strongest edges, and the explanation of the `heads` that carry most of its influence, each
    from the query at which it carries most."""
    found, flow = strongest_heads(replacement, graph, edges)
    ranked = rank_heads(found, flow)
    return {
        "format": FORMAT,
        "version": VERSION,
        "edges": [edge_record(graph, one) for one in found],
        "top_heads": [list(head) for head in ranked],
        "attention": [_look(replacement, graph, head, found, flow) for head in ranked[:heads]],
    }


def edge_record(graph: Graph, one: EdgeHeads) -> dict[str, Any]:
    """An edge with its strongest heads, as JSON has it."""
    return {
        "target": node_key(graph.nodes, one.target),
        "source": node_key(graph.nodes, one.source),
        "value": one.value,
        "heads": [list(part) for part in one.strongest(HEADS_OF_AN_EDGE)],
        "bypass": {str(layer): float(one.bypass[layer]) for layer in one.between},
    }


def _look(
    replacement: LocalModel, graph: Graph, head: Head, found: Sequence[EdgeHeads], flow: Sequence[float]
) -> dict[str, Any]:
    strength = [each * abs(float(one.heads[head.layer, head.head])) for one, each in zip(found, flow)]
    return explain_head(replacement, graph, found[strength.index(max(strength))], head.layer, head.head)


def explain_head(replacement: LocalModel, graph: Graph, edge: EdgeHeads, layer: int, head: int) -> dict[str, Any]:
    """Why a head looked, from the query at which most of an edge went through it."""
    with memory_named("the number of heads or the prompt"):
        places = head_places(replacement, graph, (edge.target, edge.source), layer, head)
        query, key = divmod(int(places.abs().argmax()), places.shape[1])
        looked = attention(replacement, graph.tokens, layer, head, query)
    if key not in looked.explained:
        looked = attention(replacement, graph.tokens, layer, head, query, [*looked.explained, key])
    return attention_record(looked) | {"carried": {"edge": edge_record(graph, edge), "key": key}}


def node_key(nodes: Nodes, id: int) -> list[Any]:
    """What a node is called in files."""
    if id == CONSTANT:
        return ["constant"]
    node = nodes[id]
    return [node.kind, node.layer, node.position, node.label if node.index < 0 else node.index]


def attention_record(looked: Attention, terms: int = TERMS) -> dict[str, Any]:
    """An explanation with its strongest terms, as JSON has it."""
    name = lambda id: node_key(looked.nodes, id)
    place = {key: column for column, key in enumerate(looked.keys.tolist())}
    keys = []
    for key in looked.explained:
        keys.append(
            {
                "key": key,
                **{said: [[name(i), v] for i, v in looked.marginals(side, key, terms)] for said, side in SIDES.items()},
                "pairs": [[name(q), name(k), v] for q, k, v in looked.strongest_pairs(key, terms)],
                "silenced": [[name(one.source), *one[1:]] for one in looked.silenced(key)[:terms]],
                "remainder": looked.remainder(key, terms),
            }
        )
    return {
        "layer": looked.layer,
        "head": looked.head,
        "query": looked.query,
        "pattern": {str(key): float(looked.pattern[column]) for key, column in place.items()},
        "scores": {str(key): float(looked.scores[column]) for key, column in place.items()},
        "capped": {str(key): float(looked.capped[column]) for key, column in place.items()},
        "violation": looked.violation,
        "keys": keys,
    }


def save_heads(folder: str | Path, explained: dict[str, Any]) -> Path:
    """Write heads.json into a graph's folder, aside and renamed."""
    path = Path(folder) / HEADS_FILE
    aside = path.with_name(f"{HEADS_FILE}.tmp")
    aside.write_text(json.dumps(explained, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    aside.replace(path)
    return path


def load_heads(folder: str | Path) -> dict[str, Any] | None:
    """What `save_heads` wrote; None where a graph has none."""
    path = Path(folder) / HEADS_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as damage:
        raise UserError(f"{path} is damaged ({damage}); trace with heads=true again") from damage
    if not isinstance(found, dict) or (found.get("format"), found.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{path} holds no heads that this version reads (it reads {FORMAT} version {VERSION})")
    return found


def attention_text(graph: Graph, looked: dict[str, Any], terms: int = 3) -> str:
    """An explanation of one head in a few lines for a terminal."""
    at = lambda position: f"{graph.token_strings[position]!r}@{position}"
    shares = sorted(looked["pattern"].items(), key=lambda item: -item[1])[:3]
    seen = ", ".join(f"{at(int(key))} {share:.0%}" for key, share in shares)
    lines = [f"L{looked['layer']}H{looked['head']} from {at(looked['query'])} looked at {seen}"]
    key = looked["keys"][0]
    told = "; ".join(f"{key_text(graph, q)} with {key_text(graph, k)} {v:+.2f}" for q, k, v in key["pairs"][:terms])
    lines.append(f"  at {at(key['key'])} because of {told} (score {looked['scores'][str(key['key'])]:+.2f})")
    silenced = "; ".join(f"{key_text(graph, s)} {exact:+.2f}" for s, _, _, exact in key["silenced"][:terms])
    lines.append(f"  log share without: {silenced}")
    return "\n".join(lines)


def key_text(graph: Graph, key: Sequence[Any]) -> str:
    """A node by its key, in a few words."""
    if key[0] == "constant":
        return "constant"
    kind, layer, position, index = key
    token = f"{graph.token_strings[position]!r}@{position}"
    if kind == "embedding":
        return token
    return f"L{layer}:{index} @{position}" if kind == "feature" else f"{kind} L{layer} {token}"


def path_heads(replacement: LocalModel, graph: Graph, edges: Sequence[tuple[int, int]]) -> dict[tuple[int, int], str]:
    """For edges of paths, the strongest head of each where heads carry a tenth of it or more: `L1H3 +0.2`."""
    chosen = [edge for edge in dict.fromkeys(edges) if graph.nodes[edge[1]].kind not in ("bias", "logit")]
    if not chosen:
        return {}
    told = {}
    for one in edge_heads(replacement, graph, chosen):
        parts = [f"L{l}H{h} {part:+.2g}" for l, h, part in one.strongest(2) if abs(part) >= 0.1 * abs(one.value)]
        if parts:
            told[one.target, one.source] = ", ".join(parts)
    return told
