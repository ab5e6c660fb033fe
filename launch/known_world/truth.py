"""What the bundled world knows to be right, laid beside what features detect."""

import random
from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING

import torch

from ...circuit.features import Labels, label_by_prompts
from ...data.errors import Progress, silent

if TYPE_CHECKING:
    from torch import Tensor

    from ...circuit.model import ReplacementModel
    from ...data.worlds import World

MOST_QUESTIONS = 2500
MOST_CITIES = 700
STATE_CODED = 0.5
LEAST_QUESTIONS = 5
"""Concepts of fewer questions are left out: a feature cannot be told to stand for one (a city, a person's initials)."""

LEAST_F1 = 0.3
"""Most features of states fire for two or three of them, or for some of a state's cities: fifteen times chance is a
name, and its F1 stands beside it."""


def label_features(model: "ReplacementModel", world: "World", seed: int = 0, progress: Progress = silent) -> Labels:
    """Names for the features that detect a concept, by ground truth on questions that the world was trained on."""
    questions = world.questions(split="train") + world.questions(split="train", kind="fact")
    if len(questions) > MOST_QUESTIONS:
        questions = random.Random(seed).sample(questions, MOST_QUESTIONS)
    held = [world.labels(question) for question in questions]
    counts = Counter(concept for at_tokens in held for concept in set(chain(*at_tokens)))
    common = {concept for concept, count in counts.items() if count >= LEAST_QUESTIONS}
    prompts = [
        (world.tokens(question), [[c for c in concepts if c in common] for concepts in at_tokens])
        for question, at_tokens in zip(questions, held)
    ]
    return label_by_prompts(model, prompts, LEAST_F1, progress)


def state_coded(
    model: "ReplacementModel", world: "World", seed: int = 0, least: float = STATE_CODED
) -> set[tuple[int, int]]:
    """The (layer, feature) pairs whose activation at the end of a capital question is a matter of the state.

    The share of its variance that the city's state explains (the adjusted eta squared of a one-way analysis of
    variance) is at least `least`, over questions that the world was trained on. A feature that fires for three states
    carries the state as well as one that fires for Texas alone and can be named after it.
    """
    questions = [q for q in world.questions("two_hop", "train") if q.facts["relation"] == "capital"]
    if len(questions) > MOST_CITIES:
        questions = random.Random(seed).sample(questions, MOST_CITIES)
    names = sorted({question.facts["state"] for question in questions})
    state_N = torch.tensor([names.index(question.facts["state"]) for question in questions])
    last = [[acts_TF[-1] for acts_TF in model.activations(world.tokens(question))] for question in questions]
    found = set()
    for layer, acts in zip(model.transcoder.layers, zip(*last)):
        share_F = explained_share(torch.stack(acts), state_N.to(acts[0].device))
        found |= {(layer, feature) for feature in (share_F >= least).nonzero()[:, 0].tolist()}
    return found


def explained_share(acts_NF: "Tensor", group_N: "Tensor") -> "Tensor":
    """[F]: the share of each feature's variance that its group explains, adjusted for chance; 0 of a silent one."""
    n, groups = len(acts_NF), int(group_N.max()) + 1
    acts_NF = acts_NF.double()
    size_G = torch.bincount(group_N, minlength=groups).double()
    sums_GF = acts_NF.new_zeros(groups, acts_NF.shape[1]).index_add_(0, group_N, acts_NF)
    mean_GF = sums_GF / size_G[:, None].clamp_min(1)
    within_F = (acts_NF - mean_GF[group_N]).square().sum(0) / max(1, n - groups)
    total_F = (acts_NF - acts_NF.mean(0)).square().sum(0) / max(1, n - 1)
    return torch.where(total_F > 0, 1 - within_F / total_F.clamp_min(1e-30), 0.0)


def state_features(labels: Labels) -> dict[str, list[tuple[int, int]]]:
    """State -> the (layer, feature) pairs that are named after it."""
    found: dict[str, list[tuple[int, int]]] = {}
    for key, label in sorted(labels.items()):
        kind, _, state = label.text.partition(": ")
        if kind == "state" and label.source == "truth":
            found.setdefault(state, []).append(key)
    return found
