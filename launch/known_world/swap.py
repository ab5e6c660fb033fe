"""The swap: put the state of one city's prompt in place of another's, and see whether the answer follows.

At the last position of the first prompt, the features that tell states apart (`truth.state_coded`) are set to what
they are in the second prompt, wherever the two prompts differ. Everything up to the last layer that is touched is
frozen, the rest is live. The answer counts only if it is the other state's in full, every token the first choice.

The control does the same with features drawn at random from those that do not tell states apart: as many in each layer,
silenced and set to the same values.
"""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...circuit.replacement import Intervention
from ...data.errors import Progress, UserError, silent

if TYPE_CHECKING:
    from ...circuit.model import ReplacementModel
    from ...data.worlds import Question, World

Key = tuple[int, int]
"""A feature: (layer, index)."""


@dataclass(frozen=True)
class Swap:
    """One pair and what came of it."""

    prompt: str
    other: str
    before: str
    """The prompt's own answer."""
    wanted: str
    """The other prompt's answer."""
    answered: bool
    """Does the model give the other answer, in full?"""
    control: bool
    """Does it after the random swap?"""
    after: str
    """The first token that the model says after the swap."""
    probability_before: float
    """Of the other answer's first token."""
    probability_after: float


def pairs_of(world: "World", count: int, seed: int, relation: str = "capital") -> list[tuple["Question", "Question"]]:
    """Pairs of held-out questions about cities of different states, in which the answers differ."""
    questions = [q for q in world.questions("two_hop", "held_out") if q.facts["relation"] == relation]
    pairs = [
        (a, b) for a in questions for b in questions if a.facts["state"] != b.facts["state"] and a.answer != b.answer
    ]
    if not pairs:
        raise UserError("the world holds no two held-out cities of different states; take a larger world")
    return random.Random(seed).sample(pairs, min(count, len(pairs)))


def run_swaps(
    model: "ReplacementModel",
    world: "World",
    coded: Collection[Key],
    count: int,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Swap]:
    """Swap the states of `count` pairs."""
    pairs = pairs_of(world, count, seed)
    asked = list({q.prompt: q for pair in pairs for q in pair}.values())
    last = {q.prompt: [acts[-1] for acts in model.activations(world.tokens(q))] for q in asked}
    draw = random.Random(seed)
    results = []
    for a, b in pairs:
        changes = changed(model, coded, last[a.prompt], last[b.prompt])
        control = random_changes(model, changes, last[a.prompt], coded, draw)
        results.append(swap(model, world, a, b, changes, control))
        progress("swapping states", len(results), len(pairs))
    return results


def changed(
    model: "ReplacementModel", coded: Collection[Key], own: list[Tensor], other: list[Tensor]
) -> dict[Key, float]:
    """The features to set, to their activations in the other prompt."""
    number = {layer: l for l, layer in enumerate(model.transcoder.layers)}
    pairs = {key: (float(own[number[key[0]]][key[1]]), float(other[number[key[0]]][key[1]])) for key in sorted(coded)}
    return {key: there for key, (here, there) in pairs.items() if here != there}


def random_changes(
    model: "ReplacementModel",
    changes: Mapping[Key, float],
    own: list[Tensor],
    coded: Collection[Key],
    draw: random.Random,
) -> dict[Key, float]:
    """As many features of each layer that tell no states apart: active ones for those silenced, any for those set."""
    number = {layer: l for l, layer in enumerate(model.transcoder.layers)}
    found: dict[Key, float] = {}
    for (layer, _), value in changes.items():
        acts = own[number[layer]]
        active = [i for i in acts.nonzero().flatten().tolist() if (layer, i) not in coded and (layer, i) not in found]
        if value == 0.0 and active:
            found[layer, draw.choice(active)] = 0.0
            continue
        free = [(layer, i) for i in range(len(acts)) if (layer, i) not in coded and (layer, i) not in found]
        if free:
            found[draw.choice(free)] = value
    return found


def swap(
    model: "ReplacementModel",
    world: "World",
    a: "Question",
    b: "Question",
    changes: Mapping[Key, float],
    control: Mapping[Key, float],
) -> Swap:
    """Carry one swap and its control out, on the prompt followed by the wanted answer: each token must be foreseen."""
    prompt, answer = world.tokens(a), world.answer_tokens(b)
    at = len(prompt) - 1
    groups = [
        [Intervention(layer, at, feature, value=value) for (layer, feature), value in some.items()]
        for some in (changes, control)
    ]
    swapped, random_ = model.intervene_many(prompt + answer[:-1], groups, mode="constrained")
    choices = [result.logits[at:].argmax(-1).tolist() for result in (swapped, random_)]
    before, after = (logits[at].float().softmax(-1) for logits in (swapped.clean_logits, swapped.logits))
    return Swap(
        prompt=a.prompt,
        other=b.prompt,
        before=a.answer,
        wanted=b.answer,
        answered=choices[0] == answer,
        control=choices[1] == answer,
        after=model.lm.token_strings([choices[0][0]])[0].strip(),
        probability_before=float(before[answer[0]]),
        probability_after=float(after[answer[0]]),
    )


def summary(swaps: Sequence[Swap]) -> dict[str, Any]:
    """How often the answer followed."""
    return {
        "pairs": len(swaps),
        "success_rate": sum(s.answered for s in swaps) / len(swaps),
        "control_success_rate": sum(s.control for s in swaps) / len(swaps),
    }


def records(swaps: Sequence[Swap]) -> list[dict[str, Any]]:
    """Every pair, for `swap.json`."""
    return [asdict(s) for s in swaps]
