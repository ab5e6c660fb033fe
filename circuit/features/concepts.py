"""Features named by ground truth: which concept each detects, and how well.

A concept is a boolean per token ("the state is Texas here"); a feature detects it as well as its firing agrees with
it, in F1. Precision is over all tokens: a name says what a feature means wherever it fires. Recall is the better one of
two readings, over all tokens where the concept holds and over the last token of each prompt alone, because a model may
work a concept out only where it needs it.

Every second prompt is held out: the others choose a feature's concept and reading, and the F1 that is told is that of
the held-out ones. (The best of F features x C concepts x 2 readings is high by chance on the prompts that chose it.)
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...data.errors import Progress, UserError, silent
from ..precision import wide, widest
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
        self.hits = torch.zeros(features, concepts, dtype=widest(torch.device(device)), device=device)
        self.fires = torch.zeros(features, dtype=widest(torch.device(device)), device=device)
        self.holds = torch.zeros(concepts, dtype=widest(torch.device(device)), device=device)

    def update(self, acts_BF: Tensor, holds_BC: Tensor) -> None:
        """Rows are tokens; a feature fires where its activation is above 0."""
        # float32 products of 0 and 1 are exact up to 2^24 tokens a batch; the sums are kept in float64
        fires, holds = (acts_BF > 0).float(), holds_BC.float()
        self.hits += wide(fires.T @ holds)
        self.fires += wide(fires.sum(0))
        self.holds += wide(holds.sum(0))

    def scores(self) -> ConceptScores:
        fires, holds = self.fires[:, None], self.holds[None]
        return ConceptScores(
            f1=2 * self.hits / (fires + holds).clamp_min(1),
            precision=self.hits / fires.clamp_min(1),
            recall=self.hits / holds.clamp_min(1),
        )


def harmonic(precision: Tensor, recall: Tensor) -> Tensor:
    """F1."""
    return 2 * precision * recall / (precision + recall).clamp_min(1e-30)


def label_by_concepts(
    scores: Sequence[ConceptScores],
    held_out: Sequence[ConceptScores],
    layers: Sequence[int],
    concepts: Sequence[str],
    least_f1: float = 0.5,
) -> Labels:
    """Name each feature after the concept it detects best, where it does so with at least `least_f1`, and after the
    others that it detects as well as that."""
    labels = Labels()
    for layer, chosen_by, told in zip(layers, scores, held_out, strict=True):
        for feature in torch.nonzero(chosen_by.f1.amax(1) >= least_f1).flatten().tolist():
            row = chosen_by.f1[feature]
            ranked: list[int] = row.argsort(descending=True, stable=True)[: int((row >= least_f1).sum())].tolist()
            f1 = {concepts[c]: round(float(told.f1[feature, c]), 4) for c in ranked}
            name = concepts[ranked[0]]
            labels.set(layer, feature, Label(name, "truth", f1.pop(name), f1))
    return labels


# --- over prompts -------------------------------------------------------------------------------------------


class ConceptResult(NamedTuple):
    """Scores of every covered layer's features, in the reading that is better on the prompts that choose."""

    concepts: list[str]
    layers: list[int]
    scores: list[ConceptScores]
    """On the prompts that choose."""
    held_out: list[ConceptScores]
    """On the others."""

    def labels(self, least_f1: float = 0.5) -> Labels:
        return label_by_concepts(self.scores, self.held_out, self.layers, self.concepts, least_f1)

    def detectors(self, concept: str, least_f1: float = 0.5) -> list[tuple[int, int, float]]:
        """(layer, feature, F1 on held-out prompts) of the features that detect a concept, the best first."""
        if concept not in self.concepts:
            raise UserError(f"concept {concept!r} is not among those that were scored")
        c = self.concepts.index(concept)
        found = [
            (layer, f, float(held.f1[f, c]))
            for layer, scores, held in zip(self.layers, self.scores, self.held_out, strict=True)
            for f in torch.nonzero(scores.f1[:, c] >= least_f1).flatten().tolist()
        ]
        return sorted(found, key=lambda entry: -entry[2])


Prompts = Sequence[tuple[str | Sequence[int], Sequence[Sequence[str]]]]
"""Prompts, each with the concepts that hold at each of its tokens."""


class _Read(NamedTuple):
    """What one batch of prompts gives."""

    acts: Callable[[int], Tensor]
    """[S, T, F] of one covered layer."""
    holds_STC: Tensor
    readings: tuple[Tensor, Tensor]
    """[S, T]: all tokens that count, and of them the last ones."""
    held_out_S: Tensor


@torch.no_grad()
def score_concepts(model: LocalModel, prompts: Prompts, progress: Progress = silent) -> ConceptResult:
    """Score every feature against every concept, on every second prompt and on the others."""
    names, transcoder, device = _names(prompts), model.transcoder, model.lm.device
    counters = [  # [held out?][reading][layer]
        [[ConceptCounter(F, len(names), device) for F in transcoder.features] for _ in ("all", "last")]
        for _ in ("choose", "held out")
    ]
    for read in _read(model, prompts, names, progress):
        for l in range(transcoder.n_layers):
            acts_STF = read.acts(l)
            for half, by_reading in enumerate(counters):
                mine_S1 = (read.held_out_S == bool(half))[:, None]
                for reading, which_ST in zip(by_reading, read.readings, strict=True):
                    reading[l].update(acts_STF[which_ST & mine_S1], read.holds_STC[which_ST & mine_S1])
    scores, held_out = [], []
    for l in range(transcoder.n_layers):
        chosen, held = ([reading[l].scores() for reading in half] for half in counters)
        at_the_end = chosen[1].recall > chosen[0].recall
        for found, (all_tokens, last) in ((scores, chosen), (held_out, held)):
            recall = torch.where(at_the_end, last.recall, all_tokens.recall)
            found.append(ConceptScores(harmonic(all_tokens.precision, recall), all_tokens.precision, recall))
    return ConceptResult(names, list(transcoder.layers), scores, held_out)


def label_by_prompts(model: LocalModel, prompts: Prompts, least_f1: float = 0.5, progress: Progress = silent) -> Labels:
    """Labels such as `state: Texas` with their F1, from prompts whose concepts are known."""
    return score_concepts(model, prompts, progress).labels(least_f1)


class ConceptGroup(NamedTuple):
    """Features that detect a concept together: any of them fires where it holds."""

    concept: str
    members: list[tuple[int, int]]
    """(layer, feature), the best first."""
    f1: float
    """Of the group, on held-out prompts."""
    best_alone: float
    """Of its best member, on the same prompts."""


@torch.no_grad()
def concept_groups(
    model: LocalModel,
    prompts: Prompts,
    result: ConceptResult | None = None,
    least_f1: float = 0.5,
    most: int = 8,
    progress: Progress = silent,
) -> list[ConceptGroup]:
    """For every concept the group that detects it best, grown feature by feature while F1 grows on choosing prompts."""
    result = score_concepts(model, prompts, progress) if result is None else result
    candidates: dict[int, list[tuple[int, int]]] = {}  # concept -> (layer's place, feature), the best first
    for c in range(len(result.concepts)):
        ranked = [
            (float(value), l, int(f))
            for l, scores in enumerate(result.scores)
            for value, f in zip(*scores.f1[:, c].topk(min(most, len(scores.f1))), strict=True)
        ]
        candidates[c] = [(l, f) for value, l, f in sorted(ranked, key=lambda entry: -entry[0])[:most] if value > 0]
    wanted = sorted({place for places in candidates.values() for place in places})
    column = {place: i for i, place in enumerate(wanted)}
    fires, holds, last, held = [], [], [], []
    for read in _read(model, prompts, result.concepts, progress):
        counted_ST, last_ST = read.readings
        layers = {l: read.acts(l)[counted_ST] > 0 for l in {l for l, _ in wanted}}
        fires.append(torch.stack([layers[l][:, f] for l, f in wanted], 1).cpu())
        holds.append(read.holds_STC[counted_ST].cpu())
        last.append(last_ST[counted_ST].cpu())
        held.append(read.held_out_S[:, None].expand_as(counted_ST)[counted_ST].cpu())
    fires_NM, holds_NC, last_N, held_N = (torch.cat(parts) for parts in (fires, holds, last, held))
    groups = []
    for c, places in candidates.items():
        if not places:
            continue
        grown = [
            _grown([column[place] for place in places], fires_NM, holds_NC[:, c], reading_N, held_N)
            for reading_N in (torch.ones_like(last_N), last_N)
        ]
        members, chosen_by, told, alone = max(grown, key=lambda group: group[1])
        if chosen_by >= least_f1:
            named = [(result.layers[wanted[m][0]], wanted[m][1]) for m in members]
            groups.append(ConceptGroup(result.concepts[c], named, told, alone))
    return groups


def _grown(
    places: list[int], fires_NM: Tensor, holds_N: Tensor, reading_N: Tensor, held_N: Tensor
) -> tuple[list[int], float, float, float]:
    """Members, F1 on choosing tokens, on held-out ones, and of the best member on those."""
    fires, holds, asked = fires_NM[~held_N], holds_N[~held_N], reading_N[~held_N]
    members, best = max((_grown_from(start, places, fires, holds, asked) for start in places), key=lambda one: one[1])
    told, alone = (
        _f1(fires_NM[held_N][:, some].any(1), holds_N[held_N], reading_N[held_N]) for some in (members, members[:1])
    )
    return members, best, told, alone


def _grown_from(
    start: int, places: list[int], fires_NM: Tensor, holds_N: Tensor, asked_N: Tensor
) -> tuple[list[int], float]:
    """Add the feature that raises F1 most until none does."""
    members, together_N = [start], fires_NM[:, start]
    best = _f1(together_N, holds_N, asked_N)
    while len(members) < len(places):
        others = [(_f1(together_N | fires_NM[:, m], holds_N, asked_N), m) for m in places if m not in members]
        value, m = max(others)
        if value <= best:
            break
        members, together_N, best = [*members, m], together_N | fires_NM[:, m], value
    return members, best


def _f1(fires_N: Tensor, holds_N: Tensor, asked_N: Tensor) -> float:
    """Precision over all tokens, recall over those asked for."""
    hits_N, held_N = fires_N & holds_N, holds_N & asked_N
    precision = hits_N.sum() / fires_N.sum().clamp_min(1)
    return float(harmonic(precision, (hits_N & asked_N).sum() / held_N.sum().clamp_min(1)))


def _names(prompts: Prompts) -> list[str]:
    names = sorted({name for _, held in prompts for concepts in held for name in concepts})
    if not names:
        raise UserError("there is no concept to label features by")
    return names


def _read(model: LocalModel, prompts: Prompts, names: Sequence[str], progress: Progress) -> Iterator[_Read]:
    """The prompts in batches; every second one is held out."""
    number = {name: i for i, name in enumerate(names)}
    transcoder, device, site, done = model.transcoder, model.lm.device, model.transcoder.settings.read, 0
    for batch in _batches(model, prompts, max(*transcoder.features, len(names))):
        tokens_ST, valid_ST = padded([tokens for tokens, _ in batch], device)
        holds_STC = torch.zeros(*tokens_ST.shape, len(names), dtype=torch.bool)
        for s, (_, held) in enumerate(batch):
            for t, concepts in enumerate(held):
                holds_STC[s, t, [number[name] for name in concepts]] = True
        with model.lm.capture({site, *model.sinks.limits}) as sites:
            model.lm.run(tokens_ST)
        inputs = getattr(sites, site)
        counted_ST = valid_ST & ~model.masked_positions(tokens_ST, sites=sites)
        last_ST = counted_ST & (valid_ST.cumsum(1) == valid_ST.sum(1, keepdim=True))

        def acts(l: int, inputs: Any = inputs) -> Tensor:
            return transcoder.encode_layer(inputs[transcoder.layers[l]].to(transcoder.dtype), l)

        held_out_S = torch.arange(done, done + len(batch), device=device) % 2 == 1
        yield _Read(acts, holds_STC.to(device), (counted_ST, last_ST), held_out_S)
        done += len(batch)
        progress("naming features", done, len(prompts))


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
