"""A feature's name from its windows: by its own tokens, or in a judge's words.

The prompts are text files (`prompts/`); a user's own folder with the same names takes their place.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from ...data.errors import UserError
from ..features import Label
from .evidence import Evidence, Window

PROMPTS = Path(__file__).with_name("prompts")
NAMES = ("explain", "detect", "fuzz")
LONGEST = 120
"""Characters of a label: what is longer is a story, not a name."""

Words = Callable[[Sequence[int]], list[str]]


class Judge(Protocol):
    """Whatever answers a prompt: a local language model, an endpoint."""

    name: str

    def ask(self, prompts: Sequence[str]) -> Iterator[str | None]:
        """One answer a prompt, in order; None where there was none (the budget is spent, the endpoint failed)."""
        ...


class Prompts(NamedTuple):
    """The three templates."""

    explain: str
    detect: str
    fuzz: str


def load_prompts(folder: str | Path | None = None) -> Prompts:
    """The package's own templates, or a user's where a file of that name is in `folder`."""
    own = None if folder is None else Path(folder)
    if own is not None and not own.is_dir():
        raise UserError(f"labels.prompts: {own} is not a folder; it should hold {', '.join(f'{n}.txt' for n in NAMES)}")
    texts = []
    for name in NAMES:
        path = PROMPTS / f"{name}.txt"
        if own is not None and (own / path.name).exists():
            path = own / path.name
        texts.append(path.read_text(encoding="utf-8"))
        wanted = "{examples}" if name == "explain" else "{label}"
        if wanted not in texts[-1]:
            raise UserError(f"labels.prompts: {path} has no {wanted}, so every feature would get the same question")
    return Prompts(*texts)


def fill(template: str, **values: str) -> str:
    """Put values into a template in one pass: braces in the text itself, or in an answer, are left alone."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), template)


def marked(window: Window, words: Words, least: float | None = None) -> str:
    """A window's text, the tokens that fire in << >>; with `least`, those of at least this share of the largest."""
    top = max(window.acts, default=0.0)
    floor = 0.0 if least is None else least * top
    shown = []
    for word, act in zip(words(window.tokens), window.acts, strict=True):
        shown.append(f"<<{word}>>" if act > floor else word)
    return "".join(shown).replace(">><<", "").replace("\n", "\\n").strip()


def question(evidence: Evidence, template: str, words: Words, promotes: Sequence[str] = ()) -> str:
    """What the explainer is asked: strongest and uniform windows, the tokens after, what the feature promotes."""
    windows = [*evidence.strongest, *evidence.uniform]
    examples = "\n".join(f"{i + 1}. {marked(window, words)}" for i, window in enumerate(windows))
    after = [word for window in evidence.strongest for word in words(window.tokens[window.at + 1 : window.at + 2])]
    quiet = "\n".join(f"- {marked(window, words)}" for window in evidence.negatives[: len(windows) // 2])
    return fill(
        template,
        examples=examples,
        after=", ".join(repr(word) for word in dict.fromkeys(after) if word.strip()) or "nothing in common",
        promotes=", ".join(repr(word) for word in promotes) or "unknown",
        silent=quiet or "none",
    )


def label_of_answer(answer: str | None, source: str = "model") -> Label | None:
    """The first line that says something, without quotes and lead-ins; None where the answer is no label."""
    for line in (answer or "").splitlines():
        text = line.strip().strip("*`\"'“” ").removeprefix("Label:").removeprefix("label:").strip().strip("\"'“”.")
        if any(c.isalnum() for c in text):
            return Label(text[:LONGEST].rstrip(), source)
    return None
