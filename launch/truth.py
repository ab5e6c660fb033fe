"""What the bundled world knows to be right, laid beside what features detect.

A feature is named after the concept that it detects best on training questions: at the last position, where the
answer is made, or at the earlier ones, where the words are read. A concept holds at a position from the end of the
words that tell it.
"""

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..circuit.labels import ConceptCounter, Labels, label_by_concepts
from ..data.errors import Progress, silent

if TYPE_CHECKING:
    from ..circuit.replacement import ReplacementModel
    from ..data.world.families import Question
    from ..data.world.world import World

MOST_QUESTIONS = 6000
LEAST_F1 = 0.5
KINDS = ("state", "relation", "answer", "concept", "language", "initial", "first", "second", "carry")
"""Kinds of concept to look for; which city or name it is, is not one: there are as many as questions."""


class Encoded(NamedTuple):
    """Questions of one length, through the model and the transcoder."""

    questions: list["Question"]
    acts: list[Tensor]
    """Per covered layer [B, T, F]."""


@torch.no_grad()
def encoded(
    model: "ReplacementModel", world: "World", questions: Sequence["Question"], batch: int = 256
) -> Iterator[Encoded]:
    """The features of many prompts."""
    by_length: dict[int, list[tuple[Question, list[int]]]] = {}
    for question in questions:
        tokens = world.tokens(question)
        by_length.setdefault(len(tokens), []).append((question, tokens))
    read = model.transcoder.settings.read
    for _, members in sorted(by_length.items()):
        for start in range(0, len(members), batch):
            some = members[start : start + batch]
            tokens_BT = torch.tensor([tokens for _, tokens in some], device=model.lm.device)
            with model.lm.capture((read,), model.transcoder.layers) as found:
                model.lm(tokens_BT)
            masked = model.keep_mask(tokens_BT)[..., None]
            x_BTLD = found.stacked(read).to(model.transcoder.dtype)
            acts = [
                model.transcoder.encode_layer(x_BTLD[:, :, l], l) * ~masked for l in range(model.transcoder.n_layers)
            ]
            yield Encoded([question for question, _ in some], acts)


def label_features(model: "ReplacementModel", world: "World", seed: int = 0, progress: Progress = silent) -> Labels:
    """Names for all features that detect a concept, by ground truth on training questions."""
    questions = world.questions(split="train")
    if len(questions) > MOST_QUESTIONS:
        questions = random.Random(seed).sample(questions, MOST_QUESTIONS)
    concepts_of = {q.prompt: world.labels(q) for q in questions}
    concepts = sorted(
        {c for rows in concepts_of.values() for row in rows for c in row if c.split(":")[0].split()[0] in KINDS}
    )
    number = {concept: i for i, concept in enumerate(concepts)}
    device = model.lm.device
    make = lambda: [ConceptCounter(n, len(concepts), device) for n in model.transcoder.features]
    at_end, before = make(), make()
    done = 0
    for group in encoded(model, world, questions):
        holds = torch.zeros(*group.acts[0].shape[:2], len(concepts), dtype=torch.bool)
        for row, question in enumerate(group.questions):
            for position, names in enumerate(concepts_of[question.prompt]):
                holds[row, position, [number[name] for name in names if name in number]] = True
        holds = holds.to(device)
        for l, acts in enumerate(group.acts):
            at_end[l].update(acts[:, -1], holds[:, -1])
            before[l].update(acts[:, 1:-1].flatten(0, 1), holds[:, 1:-1].flatten(0, 1))
        done += len(group.questions)
        progress("naming features", done, len(questions))
    layers = model.transcoder.layers
    named = [
        label_by_concepts([c.scores() for c in counters], layers, concepts, LEAST_F1) for counters in (at_end, before)
    ]
    labels = Labels()
    for key, label in sorted((entry for part in named for entry in part.items()), key=lambda entry: entry[1].f1 or 0.0):
        labels.set(*key, label)  # the better of two comes later and stays
    return labels


def state_features(labels: Labels) -> dict[str, list[tuple[int, int]]]:
    """State -> the (layer, feature) pairs that are named after it."""
    found: dict[str, list[tuple[int, int]]] = {}
    for key, label in sorted(labels.items()):
        name, _, rest = label.text.partition(": ")
        if name == "state":
            found.setdefault(rest.partition(" (F1")[0], []).append(key)
    return found
