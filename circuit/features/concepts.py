"""Features named by ground truth: which concept each detects, and how well.

A concept is a boolean per token ("the state is Texas here"); a feature detects it as well as its firing agrees with
it, in F1. Two readings are scored and the better one counts: over all tokens, and over the last token of each prompt
alone, because a model may work a concept out only where it needs it.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...data.errors import Progress, UserError, silent
from ..replacement import LocalModel
from .gather import LARGEST_BATCH, padded
from .labels import Label, Labels


class ConceptScores(NamedTuple):
    """How well each feature of a layer detects each concept."""

    f1: Tensor
    """[F, C]"""
    precision: Tensor
    """[F, C]"""
    recall: Tensor
    """[F, C]"""


class ConceptCounter:
    """Counts, batch by batch, how often each feature fires where each concept holds."""

    def __init__(self, features: int, concepts: int, device: torch.device | str = "cpu"):
        self.hits = torch.zeros(features, concepts, dtype=torch.float64, device=device)
        self.fires = torch.zeros(features, dtype=torch.float64, device=device)
        self.holds = torch.zeros(concepts, dtype=torch.float64, device=device)

    def update(self, acts_BF: Tensor, holds_BC: Tensor) -> None:
        """Rows are tokens; a feature fires where its activation is above 0."""
        # float32 products of 0 and 1 are exact up to 2^24 tokens a batch; the sums are kept in float64
        fires, holds = (acts_BF > 0).float(), holds_BC.float()
        self.hits += (fires.T @ holds).double()
        self.fires += fires.sum(0).double()
        self.holds += holds.sum(0).double()

    def scores(self) -> ConceptScores:
        fires, holds = self.fires[:, None], self.holds[None]
        return ConceptScores(
            f1=2 * self.hits / (fires + holds).clamp_min(1),
            precision=self.hits / fires.clamp_min(1),
            recall=self.hits / holds.clamp_min(1),
        )


def label_by_concepts(
    scores: Sequence[ConceptScores], layers: Sequence[int], concepts: Sequence[str], least_f1: float = 0.5
) -> Labels:
    """Name each feature after the concept it detects best, where it does so with at least `least_f1`."""
    labels = Labels()
    for layer, layer_scores in zip(layers, scores, strict=True):
        best, which = layer_scores.f1.max(dim=1)
        for feature in torch.nonzero(best >= least_f1).flatten().tolist():
            f1 = float(best[feature])
            text = f"{concepts[int(which[feature])]} (F1 {f1:.2f})"
            labels.set(layer, feature, Label(text, "truth", round(f1, 4)))
    return labels


# --- over prompts -------------------------------------------------------------------------------------------


class ConceptResult(NamedTuple):
    """Scores of every covered layer's features, in the better of the two readings."""

    concepts: list[str]
    layers: list[int]
    scores: list[ConceptScores]

    def labels(self, least_f1: float = 0.5) -> Labels:
        return label_by_concepts(self.scores, self.layers, self.concepts, least_f1)

    def detectors(self, concept: str, least_f1: float = 0.5) -> list[tuple[int, int, float]]:
        """(layer, feature, F1) of the features that detect a concept, the best first."""
        if concept not in self.concepts:
            raise UserError(f"concept {concept!r} is not among those that were scored")
        c = self.concepts.index(concept)
        found = [
            (layer, f, float(scores.f1[f, c]))
            for layer, scores in zip(self.layers, self.scores, strict=True)
            for f in torch.nonzero(scores.f1[:, c] >= least_f1).flatten().tolist()
        ]
        return sorted(found, key=lambda entry: -entry[2])


@torch.no_grad()
def score_concepts(
    model: LocalModel,
    prompts: Sequence[tuple[str | Sequence[int], Sequence[Sequence[str]]]],
    progress: Progress = silent,
) -> ConceptResult:
    """Score every feature against every concept. Each prompt comes with the concepts that hold at each token."""
    names = sorted({name for _, held in prompts for concepts in held for name in concepts})
    if not names:
        raise UserError("there is no concept to label features by")
    number = {name: i for i, name in enumerate(names)}
    transcoder, device = model.transcoder, model.lm.device
    counters = [[ConceptCounter(F, len(names), device) for F in transcoder.features] for _ in ("all", "last")]
    done = 0
    for batch in _batches(model, prompts, max(*transcoder.features, len(names))):
        tokens_ST, valid_ST = padded([tokens for tokens, _ in batch], device)
        holds_STC = torch.zeros(*tokens_ST.shape, len(names), dtype=torch.bool)
        for s, (_, held) in enumerate(batch):
            for t, concepts in enumerate(held):
                holds_STC[s, t, [number[name] for name in concepts]] = True
        holds_STC = holds_STC.to(device)
        with model.lm.capture({transcoder.settings.read, *model.sinks.limits}) as sites:
            model.lm(tokens_ST)
        counted_ST = valid_ST & ~model.masked_positions(tokens_ST, sites=sites)
        last_ST = counted_ST & (valid_ST.cumsum(1) == valid_ST.sum(1, keepdim=True))
        for l, layer in enumerate(transcoder.layers):
            x = getattr(sites, transcoder.settings.read)[layer].to(transcoder.dtype)
            acts_STF = transcoder.encode_layer(x, l)
            for reading, which_ST in zip(counters, (counted_ST, last_ST), strict=True):
                reading[l].update(acts_STF[which_ST], holds_STC[which_ST])
        done += len(batch)
        progress("naming features", done, len(prompts))
    scores = [_better(*(reading[l].scores() for reading in counters)) for l in range(transcoder.n_layers)]
    return ConceptResult(names, list(transcoder.layers), scores)


def label_by_prompts(
    model: LocalModel,
    prompts: Sequence[tuple[str | Sequence[int], Sequence[Sequence[str]]]],
    least_f1: float = 0.5,
    progress: Progress = silent,
) -> Labels:
    """Labels such as `state: Texas (F1 0.97)`, from prompts whose concepts are known."""
    return score_concepts(model, prompts, progress).labels(least_f1)


def _better(first: ConceptScores, second: ConceptScores) -> ConceptScores:
    take = second.f1 > first.f1
    return ConceptScores(*(torch.where(take, b, a) for a, b in zip(first, second, strict=True)))


def _batches(
    model: LocalModel, prompts: Iterable[tuple[str | Sequence[int], Sequence[Sequence[str]]]], width: int
) -> Iterable[list[tuple[Tensor, Sequence[Sequence[str]]]]]:
    batch: list[tuple[Tensor, Sequence[Sequence[str]]]] = []
    longest = 0
    for prompt, held in prompts:
        tokens = model.lm.tokenize(prompt).cpu()
        if len(tokens) != len(held):
            raise UserError(f"a prompt of {len(tokens)} tokens came with concepts of {len(held)}: one list a token")
        longest = max(longest, len(tokens))
        if batch and (len(batch) + 1) * longest * width > LARGEST_BATCH:
            yield batch
            batch, longest = [], len(tokens)
        batch.append((tokens, held))
    if batch:
        yield batch
