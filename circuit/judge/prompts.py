"""Prompt sets for graph scores: fixed and versioned, so that two evaluations speak of the same prompts."""

from typing import NamedTuple

from ...data.errors import UserError

VERSION = "2026-11"


class PromptSet(NamedTuple):
    """A named list of prompts; results of different versions are not compared."""

    name: str
    version: str
    prompts: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.name}/{self.version}"


ENGLISH = (
    "The capital of the state containing Dallas is",
    "The opposite of small is",
    "The Eiffel Tower stands in the city of",
    "The first president of the United States was George",
    "Two plus three equals",
    "The chemical symbol for gold is",
    "Water is made of hydrogen and",
    "The day after Monday is",
    "Monday, Tuesday, Wednesday,",
    "Fact: the largest planet in the solar system is",
    "The doctor put on her white",
    "She opened the book and began to",
    "The author of Romeo and Juliet is William",
    "Bees make honey, and cows give",
    "In winter the lake is covered with",
    "The French word for cat is",
    "He was born in Tokyo, the capital of",
    "The sun rises in the east and sets in the",
    "A triangle has three",
    "The keys to the old cabinet in the hall",
    "When Mary and John went to the shop, John gave a bag to",
    "The war lasted from the year 1732 to the year 17",
    "Roses are red, violets are",
    "The National Weather Service (N",
)

STDLIB = (
    "import os\nimport",
    "def __init__(self,",
    "for i in range(",
    "if __name__ ==",
    "    return self._",
    "class Error(Exception):\n",
    "    except KeyError:\n        ",
    "        raise TypeError(",
    "from collections import",
    "    if not isinstance(",
    "try:\n    import",
    "    with open(filename, 'r') as",
    "def __repr__(self):\n        return",
    "    while True:\n        ",
    "        self.name =",
    "x = [i for i in",
    "    @classmethod\n    def",
    "print('hello",
    "    else:\n        return",
    "lambda x:",
)

_SETS = {"english": ENGLISH, "stdlib": STDLIB}


def prompt_set(name: str, prompts: tuple[str, ...] | list[str] | None = None) -> PromptSet:
    """A bundled set by name, or `prompts` under a name of one's own (the world's questions)."""
    if prompts is None and name not in _SETS:
        raise UserError(f"prompt set {name!r} is not known; there are {', '.join(_SETS)} and questions")
    chosen = tuple(_SETS[name] if prompts is None else prompts)
    if not chosen:
        raise UserError(f"prompt set {name!r} is empty; graph scores need at least one prompt")
    return PromptSet(name, VERSION, chosen)
