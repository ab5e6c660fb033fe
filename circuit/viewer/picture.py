"""The part of an attribution graph that fits a glance, as one self-contained SVG for reports and pages.

Features are drawn in groups: the graph's supernodes where it has any, else those that share a label and a position.
The groups that carry the most influence are kept, and between them the edges that carry the most.
"""

import heapq
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...data.errors import check_choice
from ..features import Labels
from ..graph import Graph, band_width, carried_text, feature_groups, flow_between, span_text, summary_text
from .drawing import Box, Line, draw, token_key

LEAST_SHARE = 0.06  # of the strongest edge: weaker ones are drawn only where a box would else hang free
TITLE_LENGTH = 34


class Group(NamedTuple):
    """Nodes that are drawn as one box."""

    key: str
    title: str
    ids: list[int]
    position: int


def render_graph_svg(
    graph: Graph,
    labels: Labels | None = None,
    *,
    title: str | None = None,
    most: int = 12,
    logits: int = 2,
    path: Sequence[int] | None = None,
    theme: str = "auto",
) -> str:
    """Draw the `most` influential groups of features, the first `logits` targets and the prompt; scores and accounting
    stand below.

    `path` names the nodes of a path to draw boldly, from input to logit; None finds the strongest. `theme` is light,
    dark or auto, which follows the reader's system.
    """
    check_choice("theme", theme, ("auto", "light", "dark"))
    groups = boxes_of(graph, labels)
    influence = graph.influence()
    strength = {group.key: float(influence[group.ids].sum()) for group in groups}
    groups = sorted(groups, key=lambda group: strength[group.key], reverse=True)
    named_on_path = set(path or [])
    kept = [g for i, g in enumerate(groups) if i < most or named_on_path & set(g.ids)]
    outcomes = [Group(f"logit:{logit.id}", logit.label, [logit.id], logit.position) for logit in graph.logits[:logits]]
    inputs = [
        Group(token_key(position), "", graph.nodes.ids("embedding", position=position), position)
        for position in range(len(graph.tokens))
    ]
    everything = [group for group in [*inputs, *kept, *outcomes] if group.ids]
    scores, shares = group_scores(graph, everything)
    bold = _bold(everything, torch.where(scores > 0, shares, 0.0), path)
    lines = _lines(everything, scores, bold)

    width = band_width(graph)
    bands = sorted({_home(graph, group.ids, "layer") // width for group in kept})
    whole = sum(strength.values()) or 1.0
    boxes = [
        _feature_box(graph, group, bands.index(_home(graph, group.ids, "layer") // width), strength[group.key] / whole)
        for group in kept
    ]
    for group, logit in zip(outcomes, graph.logits, strict=False):
        weight = "p" if graph.weight_name == "probability" else "weight"
        note = f"{weight} = {logit.probability:.2f}"
        boxes.append(
            Box(group.key, _short(logit.label.strip() or logit.label), note, "logit", len(bands), group.position)
        )
    rows = [span_text(band * width, (band + 1) * width - 1) for band in bands] + ["output"]
    title = _title(graph) if title is None else title
    carried = sum(strength[group.key] for group in kept) / whole
    notes = f"{carried_text(graph, carried)}\n{summary_text(graph)}".splitlines()
    return draw(boxes, lines, graph.token_strings, rows, title, theme, notes, graph.kept)


def boxes_of(graph: Graph, labels: Labels | None = None) -> list[Group]:
    """Every feature in a group; those without a label by themselves, or of a deep model by layers and position."""
    groups = []
    for number, group in enumerate(feature_groups(graph, band_width(graph) > 1, labels)):
        key = f"group:{number}" if group.position is None else f"feature:{group.ids[0]}"
        position = _home(graph, group.ids, "position") if group.position is None else group.position
        groups.append(Group(key, group.title, group.ids, position))
    return groups


def group_scores(graph: Graph, groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """[G, G] signed influence that each group (column) gives to each (row), and its share of all that the row gets."""
    scores = flow_between(graph, {group.key: group.ids for group in groups}).cpu().fill_diagonal_(0)
    influence = (graph.influence() + graph.weights).cpu()
    total = torch.stack([influence[group.ids].sum() for group in groups]) if groups else scores.new_zeros(0)
    return scores, scores.abs() / total.clamp_min(1e-30)[:, None]


def _lines(groups: Sequence[Group], scores: Tensor, bold: set[tuple[int, int]]) -> list[Line]:
    """The strong edges, and for each box its strongest input and output."""
    size = scores.abs()
    strongest = float(size.max()) if size.numel() else 0.0
    if strongest <= 0:
        return []
    chosen = {(int(t), int(s)) for t, s in torch.nonzero(size >= LEAST_SHARE * strongest).tolist()} | bold
    for i, group in enumerate(groups):
        if group.key.startswith("token:"):
            continue
        for ends, values in (((i, int(size[i].argmax())), size[i]), ((int(size[:, i].argmax()), i), size[:, i])):
            if float(values.max()) > 0:
                chosen.add(ends)
    return [
        Line(
            groups[s].key,
            groups[t].key,
            math.copysign(math.sqrt(float(size[t, s]) / strongest), float(scores[t, s])),
            on_path=(t, s) in bold,
        )
        for t, s in sorted(chosen)
    ]


def _bold(groups: Sequence[Group], shares: Tensor, path: Sequence[int] | None) -> set[tuple[int, int]]:
    """The edges (target, source) between groups that are drawn boldly."""
    if path is not None:
        group_of = {id: number for number, group in enumerate(groups) for id in group.ids}
        steps = [group_of[id] for id in path if id in group_of]
        return {(target, source) for source, target in itertools.pairwise(steps) if source != target}
    targets = [i for i, group in enumerate(groups) if group.key.startswith("logit:")]
    inner = {i for i, group in enumerate(groups) if not group.key.startswith(("logit:", "token:"))}
    ends = {i for i, group in enumerate(groups) if group.key.startswith("token:")}
    steps = strongest_path(shares, targets[0], inner, ends) if targets else []
    return set(itertools.pairwise(steps))


def strongest_path(shares: Tensor, start: int, inner: set[int], ends: set[int]) -> list[int]:
    """From `start` back through at least one of `inner` to one of `ends`, with the largest product of shares."""
    queue: list[tuple[float, tuple[int, ...]]] = [(0.0, (start,))]
    done: set[tuple[int, bool]] = set()
    while queue:
        cost, path = heapq.heappop(queue)
        here = path[-1]
        if here in ends:
            return list(path)
        if (here, len(path) > 1) in done:
            continue
        done.add((here, len(path) > 1))
        for source in torch.nonzero(shares[here]).flatten().tolist():
            allowed = source in inner or (source in ends and len(path) > 1)
            if allowed and source not in path:
                heapq.heappush(queue, (cost - math.log(float(shares[here, source])), (*path, source)))
    return []


def _home(graph: Graph, ids: Sequence[int], column: str) -> int:
    """The layer or position where most of a group's influence is."""
    influence, found = graph.influence(), {}
    for id, place in zip(ids, getattr(graph.nodes, column)[list(ids)].tolist(), strict=True):
        found[place] = found.get(place, 0.0) + float(influence[id])
    return max(found, key=found.__getitem__)


def _feature_box(graph: Graph, group: Group, row: int, share: float) -> Box:
    """A box that says how many features it holds, and their share of all features' influence."""
    layers = sorted({int(graph.nodes.layer[id]) for id in group.ids})
    where = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}–{layers[-1]}"
    count = f"{len(group.ids)} features" if len(group.ids) > 1 else f"feature {int(graph.nodes.index[group.ids[0]])}"
    count += f" · {share:.0%}" if share >= 0.005 else ""
    band = group.title.startswith(("layer ", "layers "))
    title, note = group.title, count if band else f"{where} · {count}"
    says = {id: label.partition(" says ")[2] for id in group.ids if (label := graph.nodes.labels.get(id, ""))}
    if band and any(says.values()):  # the row says which layers: the box, what its strongest feature makes likelier
        strongest = max(filter(says.get, says), key=graph.influence().__getitem__)
        title, note = says[strongest], f"{note}, most by L{graph.nodes[strongest].layer}:{graph.nodes[strongest].index}"
    return Box(group.key, _short(title), note, "feature", row, group.position, len(group.ids))


def _short(text: str) -> str:
    return text if len(text) <= TITLE_LENGTH else text[: TITLE_LENGTH - 1] + "…"


def _title(graph: Graph) -> str:
    prompt = str(graph.metadata.get("prompt", "".join(graph.token_strings))).strip()
    prompt = prompt if len(prompt) <= 90 else "…" + prompt[-89:]
    answer = graph.logits[0].label.strip() if graph.logits else ""
    return f"{prompt} → {answer}" if answer else prompt
