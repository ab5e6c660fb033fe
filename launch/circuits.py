"""The circuit that the world's ground truth asks for: city -> its state -> the answer.

The path is the strongest of those that lead from a token of the city to the answer through a feature named after any
state, where a path's strength is the product of its edges, each as a share of all that its target receives. It names
the right state or it does not; over many held-out cities, that is a test of graph and names together.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..circuit.labels import Labels
from ..data.errors import Progress, silent
from .trace import name_features
from .truth import plain

if TYPE_CHECKING:
    from ..circuit.attribution import TraceSettings
    from ..circuit.graph import Graph
    from ..circuit.replacement import ReplacementModel
    from ..data.world.families import Question
    from ..data.world.world import World


class StatePath(NamedTuple):
    """The strongest path from a city through a state's feature to the answer."""

    state: str
    """The state that it names."""
    strength: float
    nodes: list[int]


def city_positions(world: "World", question: "Question") -> list[int]:
    """The tokens of the prompt that write the city."""
    city = question.facts["city"]
    start = question.prompt.index(f" {city} ") + 1
    spans = world.tokenizer(question.prompt, return_offsets_mapping=True)["offset_mapping"]
    return [t for t, (left, right) in enumerate(spans) if right > start and left < start + len(city) and right > left]


def state_path(graph: "Graph", labels: Labels, sources: Sequence[int], target: int) -> StatePath | None:
    """The strongest path from one of the source nodes to the target through a feature named after a state."""
    states = {
        node.id: plain(labels.get(node.layer, node.index) or "")
        for node in graph.nodes
        if node.kind == "feature" and (labels.get(node.layer, node.index) or "").startswith("state: ")
    }
    if not states:
        return None
    reach, came_from = forward(graph, sources)
    onward, goes_to = backward(graph, target)
    best = max(states, key=lambda id: float(reach[id] * onward[id]))
    strength = float(reach[best] * onward[best])
    if strength == 0:
        return None
    nodes = [best]
    while (before := int(came_from[nodes[0]])) >= 0:
        nodes.insert(0, before)
    while nodes[-1] != target:
        nodes.append(int(goes_to[nodes[-1]]))
    return StatePath(states[best], strength, nodes)


def shares(graph: "Graph") -> Tensor:
    """[R, N]: each edge's size as a share of all that its target receives."""
    size = graph.rows.abs().double()
    return size / (size.sum(1, keepdim=True) + graph.left_out[:, None].double()).clamp_min(1e-300)


def forward(graph: "Graph", sources: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Per node, the strength of the best path from a source, and the node before it (-1 at a source)."""
    part, targets = shares(graph), graph.targets
    best = part.new_zeros(len(graph.nodes))
    best[list(sources)] = 1.0
    before = torch.full((len(graph.nodes),), -1)
    for rows in by_layer(graph):
        value, via = (part[rows] * best).max(1)
        best[targets[rows]], before[targets[rows]] = value, via
    return best, before


def backward(graph: "Graph", target: int) -> tuple[Tensor, Tensor]:
    """Per node, the strength of the best path to the target, and the node after it."""
    part, targets = shares(graph), graph.targets
    best = part.new_zeros(len(graph.nodes))
    best[target] = 1.0
    after = torch.full((len(graph.nodes),), -1)
    for rows in reversed(by_layer(graph)):
        through = part[rows] * best[targets[rows], None]
        value, via = through.max(0)
        better = value > best
        best = torch.where(better, value, best)
        after = torch.where(better, targets[rows][via], after)
    return best, after


def by_layer(graph: "Graph") -> list[Tensor]:
    """The graph's rows, layer by layer, the logits' last."""
    depth = graph.nodes.layer[graph.targets].clone()
    depth[graph.n_features :] = int(graph.nodes.layer.max()) + 1
    return [(depth == d).nonzero().squeeze(1) for d in depth.unique().tolist()]


def answer_node(graph: "Graph", token: int) -> int | None:
    """The logit of a token, if the graph has it."""
    return next((logit.id for logit in graph.logits if logit.token == token), None)


def question_path(world: "World", graph: "Graph", labels: Labels, question: "Question") -> StatePath | None:
    """The state path of a world's question."""
    target = answer_node(graph, world.answer_tokens(question)[0])
    positions = set(city_positions(world, question))
    sources = [id for id in graph.nodes.ids("embedding") if int(graph.nodes.position[id]) in positions]
    return None if target is None else state_path(graph, labels, sources, target)


def traced(
    model: "ReplacementModel", world: "World", run: Path, question: "Question", slug: str, settings: "TraceSettings"
) -> dict[str, Any]:
    """Trace one question into the run's graphs; the summary of its graph."""
    from ..circuit.viewer.picture import render_graph_svg
    from .runs import write_text

    labels = Labels.load(run)
    graph = model.trace(question.prompt, settings)
    name_features(graph, labels)
    graph.metadata["prompt"] = question.prompt
    folder = graph.save(run / "graphs" / slug)
    path = question_path(world, graph, labels, question)
    picture = render_graph_svg(graph, labels, title=question.prompt, path=path.nodes if path else None)
    write_text(folder / "graph.svg", picture)
    top = max(graph.logits, key=lambda logit: logit.probability)
    scores = graph.scores()
    return {
        "prompt": question.prompt,
        "top_token": model.lm.token_strings([top.token])[0].strip(),
        "replacement_score": scores["replacement_score"],
        "completeness": scores["completeness"],
        "path": [question.facts["city"], path.state, question.answer] if path else [],
    }


def check_paths(
    model: "ReplacementModel",
    world: "World",
    labels: Labels,
    count: int,
    settings: "TraceSettings",
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """How often the path of a held-out city's capital question names the right state."""
    questions = [q for q in world.questions("two_hop", "held_out") if q.facts["relation"] == "capital"]
    sample = random.Random(seed).sample(questions, min(count, len(questions)))
    found = []
    for question in sample:
        graph = model.trace(question.prompt, settings)
        path = question_path(world, graph, labels, question)
        named = path.state if path else None
        found.append({"city": question.facts["city"], "state": question.facts["state"], "named": named})
        progress("checking paths", len(found), len(sample))
    right = sum(entry["named"] == f"state: {entry['state']}" for entry in found)
    return {"cities": len(found), "right": right, "share": right / len(found), "paths": found}
