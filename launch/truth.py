"""What the bundled world knows to be right, laid beside what features detect."""

import random
from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING

from ..circuit.concepts import label_by_prompts
from ..circuit.labels import Labels
from ..data.errors import Progress, silent

if TYPE_CHECKING:
    from ..circuit.replacement import ReplacementModel
    from ..data.world.world import World

MOST_QUESTIONS = 4000
LEAST_QUESTIONS = 5
"""Concepts of fewer questions are left out: a feature cannot be told to stand for one (a city, a person's initials)."""


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
    return label_by_prompts(model, prompts, progress=progress)


def plain(text: str) -> str:
    """A label without its score: `state: Texas` of `state: Texas (F1 0.97)`."""
    return text.partition(" (F1")[0]


def state_features(labels: Labels) -> dict[str, list[tuple[int, int]]]:
    """State -> the (layer, feature) pairs that are named after it."""
    found: dict[str, list[tuple[int, int]]] = {}
    for key, label in sorted(labels.items()):
        kind, _, state = plain(label.text).partition(": ")
        if kind == "state" and label.source == "truth":
            found.setdefault(state, []).append(key)
    return found
