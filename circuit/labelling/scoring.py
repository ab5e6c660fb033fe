"""What a label is worth: can its words tell where the feature fires, on text that the explainer never saw?

    detection    a judge says of whole windows whether the feature fires there       balanced accuracy
    fuzzing      a judge says whether the marked tokens are the ones that fire        balanced accuracy
    simulation   no judge: each token's likeness to the label's words predicts how    correlation, and area under
                 strongly the feature fires                                           the curve over windows

Detection and fuzzing as in delphi (Paulo et al. 2024), simulation in the spirit of Bills et al. (2023) with word
embeddings in place of a language model. An answer that is neither yes nor no counts as wrong, and is counted.
"""

import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ...data.errors import Progress, silent
from ..features import Label
from .evidence import Collected, Evidence, Window, every
from .explain import Judge, Prompts, Words, fill, marked

Key = tuple[int, int]
LEAST_WINDOWS = 3
"""Windows of each kind below which a feature is not scored: the interval would be all of 0 to 1."""


class Score(NamedTuple):
    """How well a label tells firing from silent windows."""

    balanced_accuracy: float
    low: float
    """The interval's ends, 95%."""
    high: float
    positives: int
    negatives: int
    nonsense: int
    """Answers that were neither yes nor no; they count as wrong."""
    unanswered: int
    """Questions without an answer (the budget was spent, the endpoint failed); they count for nothing."""


class Simulation(NamedTuple):
    """How well likeness to the label's words predicts activations, without any judge."""

    correlation: float
    """Pearson's, over the tokens of all windows."""
    area: float
    """The share of (firing, silent) pairs of windows that it ranks rightly; .5 is chance."""


def balanced(hits: int, positives: int, rejections: int, negatives: int) -> tuple[float, float, float]:
    """Balanced accuracy and its 95% interval, two binomials with two successes and failures added (Agresti-Coull)."""
    value = (hits / positives + rejections / negatives) / 2
    variance = 0.0
    for right, n in ((hits, positives), (rejections, negatives)):
        p = (right + 2) / (n + 4)
        variance += p * (1 - p) / (n + 4) / 4
    centre = ((hits + 2) / (positives + 4) + (rejections + 2) / (negatives + 4)) / 2
    half = 1.96 * math.sqrt(variance)
    return value, max(0.0, min(value, centre - half)), min(1.0, max(value, centre + half))


# --- with a judge -------------------------------------------------------------------------------------------


class Question(NamedTuple):
    """One window put to the judge."""

    key: Key
    prompt: str
    truth: bool


def verdict(answer: str) -> bool | None:
    """yes or no, however it is dressed; None where it is neither or both."""
    words = set(re.findall(r"[a-z]+|[01]", answer.lower()))
    yes, no = bool(words & {"yes", "true", "1"}), bool(words & {"no", "false", "0"})
    return None if yes == no else yes


def detection(evidence: Evidence, label: Label, prompts: Prompts, words: Words) -> list[Question]:
    """Whole windows, nothing marked."""
    key = (evidence.layer, evidence.feature)
    return [
        Question(key, fill(prompts.detect, label=label.text, text=_text(window, words)), truth)
        for windows, truth in ((evidence.positives, True), (evidence.negatives, False))
        for window in windows
    ]


def fuzzing(evidence: Evidence, label: Label, prompts: Prompts, words: Words, seed: int = 0) -> list[Question]:
    """Firing windows with the right tokens marked, and windows with as many wrong ones marked."""
    key, random_ = (evidence.layer, evidence.feature), random.Random(f"{seed} {evidence.layer} {evidence.feature}")
    questions = []
    for number, window in enumerate(evidence.positives):
        firing = [act > 0 for act in window.acts]
        quiet = [i for i, fires in enumerate(firing) if not fires]
        truth = number % 2 == 0 or not quiet
        if not truth:
            chosen = set(random_.sample(quiet, min(len(quiet), sum(firing))))
            window = window._replace(acts=[float(i in chosen) for i in range(len(window.acts))])
        questions.append(Question(key, fill(prompts.fuzz, label=label.text, text=marked(window, words)), truth))
    return questions


def ask(judge: Judge, questions: Iterable[Question], batch: int = 256, progress: Progress = silent) -> dict[Key, Score]:
    """Put all questions to the judge, feature after feature, and count."""
    counts: dict[Key, list[int]] = {}
    queue, done = iter(questions), 0
    while part := list(islice(queue, batch)):
        for asked, answer in zip(part, judge.ask([q.prompt for q in part]), strict=True):
            # right and asked, of the firing and of the silent; nonsense; unanswered
            count = counts.setdefault(asked.key, [0] * 6)
            if answer is None:
                count[5] += 1
                continue
            said = verdict(answer)
            count[4] += said is None
            place = 0 if asked.truth else 2
            count[place] += said is asked.truth
            count[place + 1] += 1
        done += len(part)
        progress(f"asking {judge.name}", done, done)
    return {
        key: Score(*balanced(*count[:4]), count[1], count[3], count[4], count[5])
        for key, count in counts.items()
        if min(count[1], count[3]) >= LEAST_WINDOWS
    }


def _text(window: Window, words: Words) -> str:
    return "".join(words(window.tokens)).replace("\n", "\\n").strip()


# --- without one --------------------------------------------------------------------------------------------


def simulate(
    collected: Collected, labels: dict[Key, Label], words_of: "LabelTokens", progress: Progress = silent
) -> dict[Key, Simulation]:
    """Simulation scores of all features that have a label and enough windows."""
    found: dict[Key, Simulation] = {}
    for number, evidence in enumerate(every(collected, labels)):
        key = (evidence.layer, evidence.feature)
        score = simulated(evidence, words_of(labels[key].text), collected.embeddings_VD)
        if score is not None:
            found[key] = score
        if number % 64 == 0 or number + 1 == len(labels):
            progress("scoring labels", number + 1, len(labels))
    return found


def simulated(evidence: Evidence, label_tokens: Sequence[int], embeddings_VD: Tensor) -> Simulation | None:
    """One feature's; None where it has too few windows to be scored."""
    windows = [*evidence.positives, *evidence.negatives]
    n = len(evidence.positives)
    if n < LEAST_WINDOWS or len(evidence.negatives) < LEAST_WINDOWS:
        return None
    lengths = [len(window.tokens) for window in windows]
    tokens_N = torch.tensor([token for window in windows for token in window.tokens])
    acts_N = torch.tensor([act for window in windows for act in window.acts])
    if not label_tokens:
        return Simulation(0.0, 0.5)
    like_N = (embeddings_VD[tokens_N] @ embeddings_VD[list(label_tokens)].T).amax(1)
    best_P = torch.stack([part.amax() for part in like_N.split(lengths)])
    above = (best_P[:n, None] > best_P[None, n:]).float() + 0.5 * (best_P[:n, None] == best_P[None, n:]).float()
    return Simulation(correlation(like_N, acts_N), float(above.mean()))


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's; 0 where either does not vary."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return float(nnf.cosine_similarity(a, b, dim=0)) if float(a.norm()) > 1e-12 and float(b.norm()) > 1e-12 else 0.0


class LabelTokens:
    """The tokens that a label's words name, in each spelling that the tokenizer knows as one token."""

    LEAD_INS = frozenset({"on", "says", "the", "of", "a", "an", "and", "in", "or", "to", "is", "for", "with", "that"})

    def __init__(self, tokenizer: object):
        self.tokenizer, self.known = tokenizer, {}

    def __call__(self, text: str) -> list[int]:
        if text not in self.known:
            quoted = re.findall(r"“([^”]*)”", text)
            pieces = quoted or [w for w in re.findall(r"\w+|[^\w\s]+", text) if w.lower() not in self.LEAD_INS]
            self.known[text] = sorted({token for piece in pieces for token in self._tokens(piece)})
        return self.known[text]

    def _tokens(self, piece: str) -> Iterator[int]:
        encode = lambda word: self.tokenizer.encode(word, add_special_tokens=False)  # type: ignore[attr-defined]
        spellings = [encode(spelling) for spelling in dict.fromkeys((piece, " " + piece))]
        whole = [ids for ids in spellings if len(ids) == 1]
        # A word of several tokens counts by all of them.
        yield from (token for ids in whole or spellings[-1:] for token in ids)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, ties by their mean rank."""
    return correlation(_ranks(torch.tensor(first)), _ranks(torch.tensor(second)))


def _ranks(values: Tensor) -> Tensor:
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    ends = count.cumsum(0).double()
    return (ends - (count.double() - 1) / 2)[place]
