"""Prompts with answers: what a small English model is sure of, so that there is something to explain.

Each answer is the most likely next token of SmolLM2-135M-Instruct with probability above one half, without BOS. Another
model may not know them: `answered` says so, and what it does not answer is not traced as if it did. A prompt with a
partner differs from it in one word, tokens side by side, so that features of one can be set in the other.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...data.models import LanguageModel

VERSION = "2026-11"
SURE = 0.5
"""The probability that an answer must have."""


class Question(NamedTuple):
    kind: str
    prompt: str
    answer: str
    partner: str | None = None
    """Another prompt of the list, of as many tokens, that differs in one word and in the answer."""


QUESTIONS = (
    Question("acronym", "The National Digital Analytics Group (N", "DA", "The National Trade Analytics Group (N"),
    Question("acronym", "The National Trade Analytics Group (N", "TA", "The National Digital Analytics Group (N"),
    Question("acronym", "The National Digital Services Group (N", "DS", "The National Digital Analytics Group (N"),
    Question("acronym", "The National Football League (N", "FL"),
    Question("acronym", "The National Basketball Association (N", "BA"),
    Question("acronym", "The International Energy Research Agency (I", "ER"),
    Question("acronym", "The Federal Bureau of Investigation (F", "BI"),
    Question("acronym", "The Central Intelligence Agency (C", "IA"),
    Question("acronym", "The Global Trade Council (G", "TC"),
    Question("acronym", "The Royal Astronomical Society (R", "AS"),
    Question("acronym", "The Royal Geographical Society (R", "GS"),
    Question("acronym", "The American Medical Association (A", "MA"),
    Question("indirect object", "When Mary and John went to the store, John gave a drink to", " Mary",
             "When Mary and John went to the store, Mary gave a drink to"),
    Question("indirect object", "When Mary and John went to the store, Mary gave a drink to", " John",
             "When Mary and John went to the store, John gave a drink to"),
    Question("indirect object", "When Tom and Anna went to the park, Tom gave a book to", " Anna",
             "When Tom and Anna went to the park, Anna gave a book to"),
    Question("indirect object", "When Tom and Anna went to the park, Anna gave a book to", " Tom",
             "When Tom and Anna went to the park, Tom gave a book to"),
    Question("indirect object", "When Sarah and David met at the office, David handed a letter to", " Sarah"),
    Question("indirect object", "When James and Emma got home, James gave the keys to", " Emma"),
    Question("indirect object", "When Alice and Robert went to the market, Robert gave a basket to", " Alice"),
    Question("capital", "The capital of France is", " Paris", "The capital of Japan is"),
    Question("capital", "The capital of Japan is", " Tokyo", "The capital of France is"),
    Question("capital", "The capital of Germany is", " Berlin", "The capital of Greece is"),
    Question("capital", "The capital of Greece is", " Athens", "The capital of Germany is"),
    Question("capital", "The capital of China is", " Beijing", "The capital of England is"),
    Question("capital", "The capital of England is", " London", "The capital of China is"),
    Question("capital", "The Eiffel Tower is in the city of", " Paris"),
    Question("capital", "The Colosseum is in the city of", " Rome"),
    Question("capital", "Madrid is the capital of", " Spain"),
    Question("president", "The president of the United States in 1995 was Bill", " Clinton"),
    Question("president", "The first president of the United States was George", " Washington"),
    Question("president", "The president of the United States during the Civil War was Abraham", " Lincoln"),
    Question("president", "The president of the United States in 1985 was Ronald", " Reagan"),
    Question("president", "The president of the United States in 2010 was Barack", " Obama"),
    Question("code", "def add(a, b):\n    return a", " +", "def subtract(a, b):\n    return a"),
    Question("code", "def subtract(a, b):\n    return a", " -"),
    Question("code", "def multiply(x, y):\n    return x", " *"),
    Question("code", "import numpy as", " np", "import pandas as"),
    Question("code", "import pandas as", " pd", "import numpy as"),
    Question("code", "import matplotlib.pyplot as", " plt"),
    Question("code", "for i in", " range"),
    Question("code", "try:\n    x = int(value)\nexcept", " ValueError"),
    Question("sequence", "Monday, Tuesday, Wednesday, Thursday,", " Friday"),
    Question("sequence", "January, February, March, April,", " May"),
    Question("sequence", "1, 2, 3, 4, ", "5"),
    Question("sequence", "10, 20, 30, ", "4"),
    Question("agreement", "The key to the cabinets is old. The keys to the cabinet", " are"),
    Question("agreement", "The man near the cars is tall. The men near the car", " are"),
    Question("french", "S'il vous pla", "\N{LATIN SMALL LETTER I WITH CIRCUMFLEX}"),
    Question("french", "Libert\xe9, \xe9galit\xe9, fratern", "it\xe9"),
    Question("fact", "The opposite of hot is", " cold", "The opposite of up is"),
    Question("fact", "The opposite of up is", " down", "The opposite of hot is"),
    Question("fact", "The sun rises in the east and sets in the", " west"),
    Question("fact", "The Statue of Liberty is located in New", " York"),
    Question("fact", "She is taller than her brother, and he is shorter than", " her"),
)  # fmt: skip


def one_of_each(questions: Sequence[Question], count: int) -> list[Question]:
    """The first `count`, taken from the kinds in turn."""
    kinds: dict[str, list[Question]] = {}
    for question in questions:
        kinds.setdefault(question.kind, []).append(question)
    turns = [group[turn] for turn in range(len(questions)) for group in kinds.values() if turn < len(group)]
    return turns[:count]


def answer_token(lm: LanguageModel, question: Question) -> int | None:
    """The answer as a token; None where it is none of this model's vocabulary."""
    ids = lm.tokenizer(question.answer, add_special_tokens=False)["input_ids"]
    return ids[0] if len(ids) == 1 else None


@torch.no_grad()
def answered(lm: LanguageModel, questions: Sequence[Question]) -> tuple[list[Question], list[str]]:
    """Those that the model answers as the list says, surely; and a sentence about each of the others."""
    known, others = [], []
    for question in questions:
        token = answer_token(lm, question)
        probability = lm(lm.tokenize(question.prompt)[None])[0, -1].float().softmax(-1)
        best = int(probability.argmax())
        if best == token and float(probability[best]) > SURE:
            known.append(question)
        else:
            said = f"{lm.token_strings([best])[0]!r} ({float(probability[best]):.2f})"
            others.append(f"{question.prompt!r} is not answered by {question.answer!r} but by {said}: left out")
    return known, others
