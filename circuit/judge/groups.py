"""What groups of a graph's features are worth: how much of the graph they carry, and whether the model needs them.

A group is necessary as far as the answer falls when its features are silenced, more than when as many others are, each
of the same layer and position and of the nearest strength. The groups are sufficient as far as the answer stays when
every other feature of the graph is silenced. The model itself answers (`steer`).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from ...data.errors import UserError
from ..graph import Graph, collapsed
from ..model import ReplacementModel
from ..replacement import Intervention
from .causal import matched, places


class GroupEffect(NamedTuple):
    """The share of the answer's probability that is left when a group is silenced, and when a matched one is."""

    name: str
    features: int
    influence: float
    """Its share of all features' influence."""
    left: float
    matched: float


class GroupScores(NamedTuple):
    """A graph's groups, all together and one by one."""

    carried: float
    """Share of all features' influence that the groups hold."""
    scores: dict[str, float]
    """Replacement score, completeness ... of the graph that has the groups' features alone."""
    whole: dict[str, float]
    """The same of the graph."""
    left: float
    """Share of the answer's probability with all groups silenced; the less, the more they are necessary."""
    left_matched: float
    kept: float
    """With all other features of the graph silenced; the more, the more the groups are sufficient."""
    kept_matched: float
    """With all silenced but the matched ones, as many as the groups have."""
    effects: list[GroupEffect]


@torch.no_grad()
def judge_groups(
    rm: ReplacementModel, graph: Graph, groups: Mapping[str, Sequence[int]] | None = None, most: int = 12
) -> GroupScores:
    """Score groups (by default the graph's supernodes) on its likeliest target, `most` of them one by one; `graph` is
    whole, so that what is in no group can be silenced."""
    groups = graph.supernodes if groups is None else groups
    found = collapsed(graph, {name: list(ids) for name, ids in groups.items()})
    answer = max(graph.logits, key=lambda logit: logit.probability)
    if answer.token < 0:
        raise UserError(f"groups are tried out on a next token, and {answer.label!r} is none; trace without targets")
    names, members = list(groups), [[id for id in ids if id < graph.n_features] for ids in groups.values()]
    influence = graph.influence()[: graph.n_features]
    strength = [float(influence[ids].sum() / influence.sum().clamp_min(1e-30)) for ids in members]
    best = sorted(range(len(names)), key=lambda g: -strength[g])[:most]
    inside = sorted({id for ids in members for id in ids})
    others = matched(rm, graph, inside)
    everything = set(range(graph.n_features))
    silenced = [inside, others, sorted(everything - set(inside)), sorted(everything - set(others))]
    for g in best:
        silenced += [members[g], matched(rm, graph, members[g])]
    off = [[Intervention(*place, times=0.0) for place in places(graph, ids)] for ids in silenced]
    results = rm.intervene_many(graph.tokens, off, mode="steer")
    share = [float(one.probabilities()[answer.token] / one.probabilities(True)[answer.token]) for one in results]
    effects = [
        GroupEffect(names[g], len(members[g]), strength[g], share[4 + 2 * at], share[5 + 2 * at])
        for at, g in enumerate(best)
    ]
    return GroupScores(found.carried, found.scores, graph.scores(), *share[:4], effects=effects)
