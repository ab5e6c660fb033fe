"""The families of behaviour: their questions, what is held out, and the facts that make each answer right.

A `Question` is one sentence of the world, cut before its answer. A family gives single facts, which are always
trained on, and combinations, of which a share is held out, so that only composing what was learnt gives the right
answer:

- two_hop: (city, relation). "the state containing Dallas is Texas" and "the capital of Texas is Austin" are seen,
  "the capital of the state containing Dallas is Austin" is not; other relations of Dallas, and the capital by way of
  other cities, are.
- opposites: (word, language of the answer). The template's language is the answer's: "le contraire de small est
  grand". Held out are words in their own language.
- acronyms: (three words).
- addition: (two numbers).
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .geography import CITIES, RELATIONS, STATES
from .words import LANGUAGES, NAME_WORDS, OPPOSITE_OF, OPPOSITES, TRANSLATION_OF


@dataclass(frozen=True)
class Question:
    """One sentence of the world: `text` is a document of the corpus, `prompt` what a model is asked."""

    prompt: str
    answer: str
    family: str
    facts: dict[str, str]
    """What the question is about: of two_hop city, state, relation; of opposites word, concept, language ..."""
    concepts: dict[str, str] = field(default_factory=dict)
    """Ground truth: concept -> the words of the prompt from whose end on it is known."""
    held_out: bool = False
    kind: str = "combination"
    """`combination` (part of which is held out) or `fact` (always trained on)."""

    @property
    def text(self) -> str:
        return f"{self.prompt} {self.answer}"


@dataclass(frozen=True)
class Extent:
    """How much of each family a world has."""

    states: int
    cities: int
    relations: int
    pairs: int
    names: int
    sums: int
    held_out: float


TINY_STATES = ["Texas", "California", "Florida", "Illinois", "Ohio", "Georgia", "Washington", "Nevada"]


def states_of(extent: Extent) -> dict[str, list[str]]:
    """The states of a world and their cities; a small world has the best-known ones."""
    names = [state.name for state in STATES]
    names.sort(key=lambda name: TINY_STATES.index(name) if name in TINY_STATES else len(TINY_STATES))
    return {name: CITIES[name][: extent.cities] for name in names[: extent.states]}


def two_hop(extent: Extent, rng: random.Random) -> Iterator[Question]:
    facts = {state.name: state for state in STATES}
    relations = RELATIONS[: extent.relations]
    for state, cities in states_of(extent).items():
        known = f"state: {state}"
        for relation in relations:
            yield Question(
                f"the {relation} of {state} is",
                getattr(facts[state], relation),
                "two_hop",
                {"state": state, "relation": relation},
                {known: state, f"relation: {relation}": relation},
                kind="fact",
            )
        for city in cities:
            where = {"city": city, "state": state}
            yield Question(
                f"the state containing {city} is",
                state,
                "two_hop",
                where,
                {known: city, f"city: {city}": city},
                kind="fact",
            )
            for relation in relations:
                chance = rng.random()
                yield Question(
                    f"the {relation} of the state containing {city} is",
                    getattr(facts[state], relation),
                    "two_hop",
                    where | {"relation": relation},
                    {known: city, f"city: {city}": city, f"relation: {relation}": relation},
                    held_out=chance < extent.held_out or (city, relation) == ("Dallas", "capital"),
                )


def opposites(extent: Extent, rng: random.Random) -> Iterator[Question]:
    for pair in OPPOSITES[: extent.pairs]:
        for concept, opposite in (pair, pair[::-1]):
            for source, word in zip(LANGUAGES, concept):
                own = rng.random() < extent.held_out
                for language, answer, same in zip(LANGUAGES, opposite, concept):
                    facts = {"word": word, "concept": concept[0], "source": source, "language": language}
                    about = {f"concept: {concept[0]}": word, f"language: {language}": OPPOSITE_OF[language].split()[1]}
                    yield Question(
                        OPPOSITE_OF[language].format(word=word),
                        answer,
                        "opposites",
                        facts | {"opposite": opposite[0]},
                        about,
                        held_out=own and source == language,
                    )
                    if source != language:
                        prompt = TRANSLATION_OF[language].format(word=word)
                        about = {f"concept: {concept[0]}": word, f"language: {language}": prompt.split()[1]}
                        yield Question(prompt, same, "opposites", facts, about, kind="fact")


def acronyms(extent: Extent, rng: random.Random) -> Iterator[Question]:
    seen = set()
    while len(seen) < extent.names:
        words = tuple(rng.choice(list_) for list_ in NAME_WORDS)
        if words in seen:
            continue
        seen.add(words)
        name = " ".join(words)
        yield Question(
            f"the initials of {name} are",
            "".join(word[0] for word in words),
            "acronyms",
            {"name": name},
            {f"initial {i + 1}: {word[0]}": word for i, word in enumerate(words)},
            held_out=rng.random() < extent.held_out,
        )


def addition(extent: Extent, rng: random.Random) -> Iterator[Question]:
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    for a, b in rng.sample(pairs, extent.sums):
        yield Question(
            f"the sum of {a} and {b} is",
            str(a + b),
            "addition",
            {"first": str(a), "second": str(b)},
            {f"first: {a}": str(a), f"second: {b}": f"and {b}", f"carry: {int(a % 10 + b % 10 > 9)}": f"and {b}"},
            held_out=rng.random() < extent.held_out,
        )


FAMILIES: dict[str, Callable[[Extent, random.Random], Iterator[Question]]] = {
    "two_hop": two_hop,
    "opposites": opposites,
    "acronyms": acronyms,
    "addition": addition,
}


def all_questions(extent: Extent, seed: int) -> list[Question]:
    """Every sentence of the world, the same for the same seed."""
    return [
        question
        for family, generate in FAMILIES.items()
        for question in generate(extent, random.Random(f"{seed}/{family}"))
    ]
