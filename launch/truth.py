"""What the bundled world knows to be right, laid beside what features detect."""

import random
from typing import TYPE_CHECKING

from ..circuit.concepts import label_by_prompts
from ..circuit.labels import Labels
from ..data.errors import Progress, silent

if TYPE_CHECKING:
    from ..circuit.replacement import ReplacementModel
    from ..data.world.world import World

MOST_QUESTIONS = 6000
LEFT_OUT = ("city", "name")
"""Kinds of concept that have as many members as there are questions: no feature stands for one."""


def label_features(model: "ReplacementModel", world: "World", seed: int = 0, progress: Progress = silent) -> Labels:
    """Names for the features that detect a concept, by ground truth on questions that the world was trained on."""
    questions = world.questions(split="train") + world.questions(split="train", kind="fact")
    if len(questions) > MOST_QUESTIONS:
        questions = random.Random(seed).sample(questions, MOST_QUESTIONS)
    prompts = []
    for question in questions:
        held = [[c for c in concepts if kind_of(c) not in LEFT_OUT] for concepts in world.labels(question)]
        prompts.append((world.tokens(question), held))
    return label_by_prompts(model, prompts, progress=progress)


def kind_of(concept: str) -> str:
    """`state` of `state: Texas`."""
    return concept.partition(":")[0]


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
