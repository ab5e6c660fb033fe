"""The circuit that the world's ground truth asks for: city -> its state -> the answer.

    question -> graph -> its strongest paths -> those through a feature of a state, by state -> the state with the most

Of the paths that lead from a token of the city to the answer, those count that pass a feature named after any state. A
path's strength is the product of its edges, each as a share of all that its target receives. A state is worked out by
several features, and some features stand for several states: the strengths of a state's paths are added, each times the
F1 with which its feature detects that state. The state with the largest sum is named, and the strongest of its paths is
shown. It is the right state or it is not; over many held-out cities, that is a test of graph and names together.
"""

import random
from collections import defaultdict
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...circuit.features import Labels, name_features
from ...data.errors import Progress, silent
from ..workspace import runs

if TYPE_CHECKING:
    from ...circuit.attribution import TraceSettings
    from ...circuit.graph import Graph, GraphPath
    from ...circuit.model import ReplacementModel
    from ...data.worlds import Question, World


MOST_PATHS = 500
"""How many of the strongest paths are looked at."""


class StatePath(NamedTuple):
    """The strongest path from a city to the answer through the features of the state that carries most of it."""

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


def state_path(graph: "Graph", labels: Labels, positions: Collection[int], target: int) -> StatePath | None:
    """From a token at one of the positions to the target, through the state whose paths are together the strongest."""
    states: dict[int, dict[str, float]] = {}
    for node in graph.nodes:
        label = labels.label(node.layer, node.index) if node.kind == "feature" else None
        found = {} if label is None else label.concepts
        if of := {name: 1.0 if f1 is None else f1 for name, f1 in found.items() if name.startswith("state: ")}:
            states[node.id] = of
    carried: dict[str, float] = defaultdict(float)
    best: dict[str, tuple[float, GraphPath]] = {}
    for path in graph.top_paths(None, target, MOST_PATHS) if states else ():
        named = [states[id] for id in path.nodes if id in states]
        if named and int(graph.nodes.position[path.nodes[0]]) in positions:
            for state, f1 in named[-1].items():
                worth = path.strength * f1
                carried[state] += worth
                best[state] = max(best.get(state, (worth, path)), (worth, path), key=lambda one: one[0])
    if not best:
        return None
    state = max(carried, key=carried.__getitem__)
    return StatePath(state, best[state][1].strength, best[state][1].nodes)


def answer_node(graph: "Graph", token: int) -> int | None:
    """The logit of a token, if the graph has it."""
    return next((logit.id for logit in graph.logits if logit.token == token), None)


def question_path(world: "World", graph: "Graph", labels: Labels, question: "Question") -> StatePath | None:
    """The state path of a world's question."""
    target = answer_node(graph, world.answer_tokens(question)[0])
    return None if target is None else state_path(graph, labels, city_positions(world, question), target)


def traced(
    model: "ReplacementModel", world: "World", run: Path, question: "Question", slug: str, settings: "TraceSettings"
) -> dict[str, Any]:
    """Trace one question into the run's graphs; the summary of its graph."""
    from ...circuit.viewer import render_graph_svg

    labels = Labels.load(run)
    graph = model.trace(question.prompt, settings)
    name_features(graph, labels)
    graph.metadata |= {"prompt": question.prompt, "asked": {"prompt": question.prompt, "trace": asdict(settings)}}
    folder = graph.save(run / "graphs" / slug)
    path = question_path(world, graph, labels, question)
    picture = render_graph_svg(graph, labels, title=question.prompt, path=path.nodes if path else None)
    runs.write_text(folder / "graph.svg", picture)
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
