"""Whether the features that a graph names are what makes the model answer: silence them, or set another prompt's.

For a prompt whose answer is known, the features of the strongest paths from any token to the answer are silenced, and
so is as large a set of other active features, each of the same layer and position as one of them and of the nearest
strength: the answer's probability should fall with the first and stay with the second. For a prompt with a partner of
as many tokens, the features of both prompts' paths are set to what they are in the partner: the partner's answer should
take over, and should not when the matched features are set. The model itself answers (`steer`): its attention, norms
and MLPs are live.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...data.errors import Progress, silent
from ..graph import Graph, Node
from ..intervals import mean_of
from ..model import ReplacementModel
from ..replacement import Intervention
from .questions import Question, answer_token

PATHS = 30
"""Strongest paths whose features are taken."""
Place = tuple[int, int, int]
"""Layer, position, feature."""


class Silenced(NamedTuple):
    """One prompt's answer, with nothing changed, with its paths' features silenced, and with the matched ones."""

    kind: str
    prompt: str
    answer: str
    features: int
    clean: float
    path: float
    matched: float
    path_text: str
    """The strongest path."""


class Swapped(NamedTuple):
    """Probability of the prompt's own answer and of its partner's, before and after."""

    kind: str
    prompt: str
    partner: str
    features: int
    own: float
    other: float
    own_swapped: float
    other_swapped: float
    other_matched: float
    """The partner's answer when the matched features are set in the place of the paths'."""
    moved: bool
    """Whether the partner's answer is now the likelier of the two."""


def path_features(graph: Graph, answer: int) -> tuple[list[int], str]:
    """Node ids of the features on the strongest paths to the answer, and the strongest path in words."""
    target = next(logit.id for logit in graph.logits if logit.token == answer)
    paths = graph.top_paths(None, target, count=PATHS, direct=False)
    ids = sorted({node for path in paths for node in path.nodes if node < graph.n_features})
    return ids, " -> ".join(_name(graph.nodes[node]) for node in paths[0].nodes) if paths else ""


def _name(node: Node) -> str:
    """A node's label; an unnamed feature's layer, number and position."""
    return node.label or f"L{node.layer}/{node.index}@{node.position}"


def matched(rm: ReplacementModel, graph: Graph, ids: Sequence[int]) -> list[int]:
    """For each feature another one that is active at its layer and position, of the nearest strength, each once."""
    nodes, n = graph.nodes, graph.n_features
    number = {layer: l for l, layer in enumerate(rm.transcoder.layers)}
    strength = torch.zeros(n, dtype=torch.float64)
    for node in range(n):
        place = nodes[node]
        W = rm.transcoder.W_dec[number[place.layer]][place.index]
        strength[node] = float(nodes.activation[node]) * float(W.norm())
    taken, found = set(ids), []
    layer, position = nodes.layer[:n].cpu(), nodes.position[:n].cpu()
    for node in ids:
        same = ((layer == layer[node]) & (position == position[node])).nonzero()[:, 0].tolist()
        free = [other for other in same if other not in taken]
        if free:
            best = min(free, key=lambda other: abs(float(strength[other] - strength[node])))
            taken.add(best)
            found.append(best)
    return found


def places(graph: Graph, ids: Sequence[int]) -> list[Place]:
    return [(node.layer, node.position, node.index) for node in (graph.nodes[i] for i in ids)]


def check_silencing(rm: ReplacementModel, question: Question, graph: Graph) -> Silenced:
    answer = answer_token(rm.lm, question)
    assert answer is not None
    ids, words = path_features(graph, answer)
    groups = [places(graph, ids), places(graph, matched(rm, graph, ids))]
    off = [[Intervention(*place, times=0.0) for place in group] for group in groups]
    path, other = rm.intervene_many(graph.tokens, off, mode="steer")
    at = lambda result, clean=False: float(result.probabilities(clean)[answer])
    return Silenced(
        question.kind, question.prompt, question.answer, len(ids), at(path, True), at(path), at(other), words
    )


def check_swap(
    rm: ReplacementModel, question: Question, partner: Question, graph: Graph, partner_graph: Graph
) -> Swapped | None:
    """None where the two prompts do not lie side by side."""
    if len(graph.tokens) != len(partner_graph.tokens):
        return None
    own, other = answer_token(rm.lm, question), answer_token(rm.lm, partner)
    assert own is not None and other is not None
    acts: list[Tensor] = rm.activations(partner_graph.tokens)
    number = {layer: l for l, layer in enumerate(rm.transcoder.layers)}
    found = [(g, path_features(g, answer)[0]) for g, answer in ((graph, own), (partner_graph, other))]
    sets = [
        sorted({place for g, ids in found for place in places(g, ids)}),
        sorted({place for g, ids in found for place in places(g, matched(rm, g, ids))}),
    ]
    groups = [[Intervention(l, t, f, value=float(acts[number[l]][t, f])) for l, t, f in group] for group in sets]
    path, control = rm.intervene_many(graph.tokens, groups, mode="steer")
    before, after, beside = path.probabilities(True), path.probabilities(), control.probabilities()
    return Swapped(
        question.kind, question.prompt, partner.prompt, len(sets[0]),
        float(before[own]), float(before[other]), float(after[own]), float(after[other]), float(beside[other]),
        bool(after[other] > after[own]),
    )  # fmt: skip


@torch.no_grad()
def causal_part(
    rm: ReplacementModel, questions: Sequence[Question], graphs: Mapping[str, Graph], progress: Progress = silent
) -> dict[str, Any]:
    """The `causal` part of an evaluation: each answer with its paths silenced, and the swaps. `graphs` holds
    each question's, by prompt."""
    silenced: list[Silenced] = []
    for count, question in enumerate(questions):
        silenced.append(check_silencing(rm, question, graphs[question.prompt]))
        progress("silencing paths", count + 1, len(questions))
    by_prompt = {question.prompt: question for question in questions}
    pairs = [(q, by_prompt[q.partner]) for q in questions if q.partner in by_prompt]
    swapped = [check_swap(rm, q, p, graphs[q.prompt], graphs[p.prompt]) for q, p in pairs]
    swaps = [swap for swap in swapped if swap is not None]
    share = lambda value: lambda row: getattr(row, value) / row.clean
    means = {name: mean_of([share(name)(row) for row in silenced]) for name in ("path", "matched")}
    summary = {name: {"mean": mean.value, "interval": mean.interval} for name, mean in means.items()}
    return {
        "silenced": [row._asdict() for row in silenced],
        "left_of_the_answer": summary,
        "lower_than_matched": sum(row.path < row.matched for row in silenced) / max(1, len(silenced)),
        "swapped": [row._asdict() for row in swaps],
        "swaps_that_moved_the_answer": sum(row.moved for row in swaps) / len(swaps) if swaps else None,
    }
