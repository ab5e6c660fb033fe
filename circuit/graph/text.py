"""Nodes, paths and figures of a graph as lines for a terminal."""

from collections.abc import Mapping
from itertools import pairwise

from .collapse import collapsed, main_groups, widest_path
from .graph import Graph
from .nodes import Node
from .paths import GraphPath


def node_text(graph: Graph, node: Node) -> str:
    """A node in a few words: token, feature with its name, or kind and place."""
    place = f"@{node.position}"
    if node.kind == "embedding":
        return f"{graph.token_strings[node.position]!r}{place}"
    if node.kind == "feature":
        name = f" {node.label}" if node.label else ""
        return f"L{node.layer}:{node.index}{name} {place}"
    if node.kind == "logit":
        return f"{node.label!r}{later_place(graph, node)}"
    return f"{node.kind} L{node.layer} {place}" if node.layer >= 0 else f"{node.kind} {place}"


def later_place(graph: Graph, node: Node) -> str:
    """Where a logit stands, unless that is the prompt's end, where most do."""
    return "" if node.position == len(graph.tokens) - 1 else f" @{node.position}"


def path_text(graph: Graph, path: GraphPath, heads: Mapping[tuple[int, int], str] | None = None) -> str:
    """A path as one line, each arrow with what the edge (target, source) adds to its target, and by which heads."""
    text = node_text(graph, graph.nodes[path.nodes[0]])
    for source, target in zip(path.nodes, path.nodes[1:]):
        through = (heads or {}).get((target, source))
        by = f" by {through}" if through else ""
        text += f"  —{graph.edge(target, source):+.3g}{by}→  {node_text(graph, graph.nodes[target])}"
    return f"{text}   ({abs(path.strength):.1%} of its input)"


def strongest_paths_text(graph: Graph) -> str:
    """The strongest path from a token to each logit by way of features, where there is one."""
    lines, weight = [], "p" if graph.weight_name == "probability" else "weight"
    for logit in graph.logits:
        lines.append(f"{node_text(graph, graph.nodes[logit.id])} {weight}={logit.probability:.3f}")
        paths = graph.top_paths(None, logit.id, direct=False)
        lines += [f"  {path_text(graph, path)}" for path in paths] or ["  no path through features"]
    return "\n".join(lines)


def kept_text(graph: Graph) -> str:
    """Which positions are left to the model, and why; empty where none is."""
    if not graph.kept:
        return ""
    shown = ", ".join(f"{graph.token_strings[at]!r} @{at} ({why})" for at, why in sorted(graph.kept.items()))
    return f"left to the model, without features: {shown}\n"


def account_holds(graph: Graph) -> bool:
    """Whether the edges miss what the model computed by no more than rounding in the graph's dtype explains."""
    allowed = {"float64": 1e-6}.get(graph.accounting.get("dtype", ""), 1e-3)  # some norms are float32 inside
    return float(graph.accounting.get("largest_relative_violation", 0)) <= allowed


def summary_text(graph: Graph) -> str:
    """Scores and accounting in two lines: they belong wherever a graph is shown."""
    scores, accounting = graph.scores(), graph.accounting
    named = [("replacement_score", "replacement score"), ("completeness", "completeness")]
    theirs = [("replacement_score_ct", "replacement"), ("completeness_ct", "completeness")]
    listed = lambda pairs: ", ".join(f"{name} {scores[key]:.3f}" for key, name in pairs if key in scores)
    said = f"{listed(named)} (as circuit-tracer reckons: {listed(theirs)})"
    if graph.partial:
        told = "scores" in graph.metadata and graph.metadata["scores"]
        said += ", of the whole graph, of which this is part" if told else ", of the part that the file holds"
    said += "\n" + kept_text(graph)
    if "active_features" not in accounting:  # a foreign file's graph
        return f"{said}{graph.n_features} features; how many were active, and what edges miss, the graph does not say"
    return said + (
        f"{accounting['active_features']} active features, "
        f"{accounting['left_out_features']} left out (their effect is in the errors); "
        f"edges miss what the model computed by at most {accounting['largest_violation']:.1e}"
        f"{'' if account_holds(graph) else ': more than rounding explains, do not trust this graph'}"
    )


def circuit_rows(graph: Graph, most: int = 12) -> list[tuple[str, str, str, float, str, str]]:
    """The groups of features that carry the most influence on the answer: name, layers, token, share of all features'
    influence, what they read most from and where most of what they do goes."""
    groups, influence = main_groups(graph, most), graph.influence()
    total = float(influence[graph.nodes.mask("feature")].sum()) or 1.0
    name_of = {id: name for name, ids in groups.items() for id in ids}
    rows = []
    for name, ids in groups.items():
        nodes = [graph.nodes[id] for id in ids]
        layers, positions = sorted({n.layer for n in nodes}), sorted({n.position for n in nodes})
        span = f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
        at = ", ".join(f"{graph.token_strings[p]!r} @{p}" for p in positions[:2]) + (
            " ..." if len(positions) > 2 else ""
        )
        chief = max(ids, key=lambda id: float(influence[id]))
        sides = [[link.id for link in links] for links in (graph.inputs(chief, 20), graph.outputs(chief, 20))]
        shown = graph.nodes.mask("feature", "embedding", "logit")
        ends = [next((id for id in side if id not in ids and shown[id]), None) for side in sides]
        told = ["" if id is None else name_of.get(id) or node_text(graph, graph.nodes[id]) for id in ends]
        rows.append((name, span, at, float(influence[ids].sum()) / total, *told))
    return rows


def flow_text(graph: Graph, most: int = 12) -> str:
    """The widest paths through groups to the likeliest logits, also by way of the groups that have a name, how much the
    groups carry, and what the rest is."""
    groups = main_groups(graph, most)
    if not groups:
        return "no feature carries any influence on the answer"
    found, lines = collapsed(graph, groups), []
    for logit in graph.logits[:2]:
        end = f"logit {logit.label!r}"
        named = [name for name in groups if name in graph.supernodes][:3]
        paths = [widest_path(found, end), *(widest_path(found, end, name) for name in named)]
        for path in dict.fromkeys(tuple(path) for path in paths if path):
            least = min(abs(float(found.flow[t, s])) for s, t in pairwise(path))
            steps = "  ->  ".join(found.names[g] for g in path)
            lines.append(f"widest path: {steps}   (each step carries {least:.1%} of the answer or more)")
    influence, nodes = graph.influence(), graph.nodes
    share = lambda *kinds: float(influence[nodes.mask(*kinds)].sum())
    errors = share("error") + float(graph.influence_per_input @ graph.cancelled)
    ends = {"tokens": share("embedding", "position"), "errors": errors, "kept": share("kept"), "biases": share("bias")}
    whole = sum(ends.values()) or 1.0
    said = ", ".join(f"{name} {value / whole:.0%}" for name, value in ends.items())
    lines.append(f"the {len(groups)} groups above hold {found.carried:.0%} of all features' influence")
    lines.append(f"where the answer's influence comes from in the end: {said}")
    by_token = []
    for at in range(len(graph.tokens)):
        by_token.append((float(influence[graph.nodes.ids("feature", position=at)].sum()), at))
    features = sum(value for value, _ in by_token) or 1.0
    best = [(value / features, at) for value, at in sorted(by_token, reverse=True)[:4] if value]
    shown = ", ".join(f"{graph.token_strings[at]!r} @{at} {value:.0%}" for value, at in best)
    lines.append(f"features by token: {shown}")
    return "\n".join(lines)
