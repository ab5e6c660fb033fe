"""Nodes, paths and figures of a graph as lines for a terminal."""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from .collapse import Collapsed, collapsed, main_groups, widest_path
from .graph import Graph
from .nodes import Node
from .paths import GraphPath

LIKELY = 0.1  # a second answer that is less likely gets no paths


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


def main_circuit(graph: Graph, most: int = 12, bands: bool = True) -> Collapsed | None:
    """The groups of features that carry the most influence on the answer, with tokens and logits; None where no feature
    carries any."""
    groups = main_groups(graph, most, bands)
    return collapsed(graph, groups) if groups else None


def circuit_rows(graph: Graph, found: Collapsed) -> list[tuple[str, str, str, float, str, str]]:
    """A row for each group of features: name, layers, token, share of all features' influence, and the two tokens,
    groups or logits that it reads most from and acts most on, each with its share of the group's influence (a minus
    where it holds down), and what of its input is error."""
    influence = graph.influence()
    total = float(influence[graph.nodes.mask("feature")].sum()) or 1.0
    from_error = graph.nodes.mask("error").to(influence)
    rows = []
    for g, (name, ids) in enumerate(zip(found.names, found.groups)):
        nodes = [graph.nodes[id] for id in ids]
        if nodes[0].kind != "feature":
            continue
        layers, positions = sorted({n.layer for n in nodes}), sorted({n.position for n in nodes})
        span = f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
        at = ", ".join(f"{graph.token_strings[p]!r} @{p}" for p in positions[:2]) + " ..." * (len(positions) > 2)
        own = float(influence[ids].sum()) or 1.0
        ends = [_strongest(found, flow / own, g) for flow in (found.flow[g], found.flow[:, g])]
        members = torch.tensor(ids, device=influence.device)  # a feature's id is its row
        unexplained = graph.rows_of(members).abs() @ from_error + graph.cancelled[members]
        errors = float(unexplained @ graph.influence_per_input[members]) / own
        ends[0] = ", ".join(part for part in (ends[0], f"errors {errors:.0%}") if part)
        count = "" if len(ids) == 1 else f" ({len(ids)})"
        rows.append((name + count, span, at, own / total, *ends))
    return rows


def _strongest(found: Collapsed, share: Tensor, own: int, most: int = 2, least: float = 0.02) -> str:
    """The groups with the largest shares, in a few words."""
    order = share.abs().argsort(descending=True).tolist()
    return ", ".join(
        f"{found.names[g].partition(' says ')[0].removeprefix('logit ')} {float(share[g]):.0%}"
        for g in [g for g in order if g != own and abs(float(share[g])) >= least][:most]
    )


def flow_text(graph: Graph, found: Collapsed | None) -> str:
    """The widest paths through groups to the likeliest logits: from any token, from the tokens that matter most, and by
    way of the groups that have a name; how much the groups carry, and what the rest is."""
    if found is None:
        return "no feature carries any influence on the answer"
    influence, nodes = graph.influence(), graph.nodes
    by_token = influence.new_zeros(len(graph.tokens)).index_add_(0, nodes.position, influence * nodes.mask("embedding"))
    lines = []
    starts = [f"{graph.token_strings[at]!r} @{at}" for at in by_token.argsort(descending=True)[:3].tolist()]
    for logit in [logit for n, logit in enumerate(graph.logits[:2]) if n == 0 or logit.probability >= LIKELY]:
        end = f"logit {logit.label!r}"
        named = [name for name in found.names if name in graph.supernodes][:3]
        paths = [widest_path(found, end), *(widest_path(found, end, through) for through in [*starts, *named])]
        widths = {tuple(path): min(abs(float(found.flow[t, s])) for s, t in pairwise(path)) for path in paths if path}
        for path, least in widths.items():
            if least < max(widths.values()) / 20:
                continue
            steps = "  ->  ".join(found.names[g] for g in path)
            lines.append(f"widest path: {steps}   (each step carries {least:.1%} of the answer or more)")
    lines.append(carried_text(graph, found.carried))
    at_token = influence.new_zeros(len(graph.tokens)).index_add_(0, nodes.position, influence * nodes.mask("feature"))
    shown = [
        f"{graph.token_strings[at]!r} @{at} {float(at_token[at] / at_token.sum()):.0%}"
        for at in at_token.argsort(descending=True)[:4].tolist()
        if at_token[at] > 0
    ]
    lines.append(f"features by token: {', '.join(shown)}")
    return "\n".join(lines)


def carried_text(graph: Graph, carried: float) -> str:
    """How much of the influence the groups that are shown carry, what the rest is, and what attention moves."""
    influence, nodes = graph.influence(), graph.nodes
    share = lambda *kinds: float(influence[nodes.mask(*kinds)].sum())
    errors = share("error") + float(graph.influence_per_input @ graph.cancelled)
    ends = {"tokens": share("embedding", "position"), "errors": errors, "kept": share("kept"), "biases": share("bias")}
    whole = sum(ends.values()) or 1.0
    said = ", ".join(f"{name} {value / whole:.0%}" for name, value in ends.items())
    return "\n".join(
        [
            f"the groups above hold {carried:.0%} of all features' influence",
            f"where the answer's influence comes from in the end: {said}",
            f"attention carries {moved_share(graph):.0%} of it from token to token, by patterns that are frozen here",
        ]
    )


def moved_share(graph: Graph) -> float:
    """Share of the influence along all edges that crosses from one position to another."""
    positions = graph.nodes.position
    crossed = whole = 0.0
    for some in graph.stored.blocks():
        carried = graph.rows_of(some).abs() * graph.influence_per_input[some, None]
        crossed += float((carried * (positions[graph.row_ids[some], None] != positions)).sum())
        whole += float(carried.sum())
    return crossed / (whole or 1.0)
