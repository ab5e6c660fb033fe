"""What a label is made from, and what it is judged by: windows of text on which a feature fires, and on which not.

    text to explain ("train")   ->  strongest and uniformly drawn windows   ->  the explainer
    text to judge ("held_out")  ->  uniformly drawn windows, fired           ->  positives
                                    a pool of windows, silent                ->  negatives, half of them alike in words

No window serves both ends. Suffixes: S sequences, T tokens, F features, P windows of the pool, D model width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ...data.errors import Progress, UserError, silent
from ..features import FeatureSettings, LayerExamples, gather_examples, padded
from ..replacement import LocalModel


class Dictionary(Protocol):
    """Anything that turns a layer's input into features: a transcoder, the MLP's neurons, random directions."""

    layers: list[int]
    features: list[int]
    dtype: torch.dtype
    settings: Any

    def encode_layer(self, x: Tensor, l: int) -> Tensor: ...


class View:
    """A dictionary on its language model, as far as reading text needs it: the model's own transcoder, or a control."""

    def __init__(self, model: LocalModel, dictionary: Dictionary | None = None):
        self.model, self.lm, self.sinks = model, model.lm, model.sinks
        self.transcoder: Any = model.transcoder if dictionary is None else dictionary

    def masked_positions(self, tokens: Tensor, sites: Any = None) -> Tensor:
        return self.model.masked_positions(tokens, sites=sites)


class Window(NamedTuple):
    """A piece of text with one feature's activations."""

    tokens: list[int]
    acts: list[float]
    at: int
    """The place of the token that the window was chosen for."""


class Evidence(NamedTuple):
    """One feature's windows."""

    layer: int
    feature: int
    strongest: list[Window]
    uniform: list[Window]
    positives: list[Window]
    negatives: list[Window]


@dataclass(frozen=True)
class EvidenceSettings:
    """How much text, and how many windows of a feature."""

    tokens: int
    held_out: int
    strongest: int = 8
    uniform: int = 6
    positives: int = 10
    negatives: int = 10
    pool: int = 512
    before: int = 12
    after: int = 6
    seed: int = 0


class Collected(NamedTuple):
    """The windows of every feature of some layers, still as tensors; `of` makes one feature's lists."""

    explain: dict[int, LayerExamples]
    explain_texts: list[Tensor]
    judge: dict[int, LayerExamples]
    judge_texts: list[Tensor]
    pool: list[Window]
    fires: dict[int, Tensor]
    """[P, F]: whether a feature fires anywhere in a window of the pool."""
    embedded_PD: Tensor
    embeddings_VD: Tensor
    settings: EvidenceSettings

    def of(self, layer: int, feature: int) -> Evidence:
        s, found = self.settings, self.explain[layer]
        strongest = windows_of(found.top, feature, self.explain_texts)
        uniform = windows_of(found.sampled, feature, self.explain_texts)
        positives = windows_of(self.judge[layer].sampled, feature, self.judge_texts)
        return Evidence(layer, feature, strongest, uniform, positives, self._negatives(layer, feature, strongest, s))

    def _negatives(self, layer: int, feature: int, strongest: list[Window], s: EvidenceSettings) -> list[Window]:
        silent_P = torch.nonzero(~self.fires[layer][:, feature]).squeeze(1).cpu()
        if not len(silent_P):
            return []
        random = torch.Generator().manual_seed(s.seed + 7919 * layer + feature)
        drawn = silent_P[torch.randperm(len(silent_P), generator=random)]
        words = sorted({token for window in strongest for token in window.tokens[window.at :][:1]})
        alike = drawn[:0]
        if words:
            wanted_D = nnf.normalize(self.embeddings_VD[words].mean(0), dim=0)
            near = (self.embedded_PD[silent_P] @ wanted_D).argsort(descending=True)
            alike = silent_P[near[: s.negatives // 2]]
        chosen = list(dict.fromkeys([*alike.tolist(), *drawn.tolist()]))[: s.negatives]
        return [self.pool[p] for p in chosen]


def collect(
    view: View, corpus: Any, layers: Sequence[int], settings: EvidenceSettings, progress: Progress = silent
) -> Collected:
    """Read the text to explain once, and the text to judge twice: for windows that fire, and for the pool's silence."""
    explain_texts: list[Tensor] = []
    judge_texts: list[Tensor] = []
    explain = _gathered(view, corpus, "train", settings.tokens, layers, explain_texts, settings, progress)
    judge = _gathered(view, corpus, "held_out", settings.held_out, layers, judge_texts, settings, progress)
    if not judge_texts:
        raise UserError("the corpus has no held-out text, and labels are judged by nothing else; see dataset.held_out")
    pool, owners = _pool(judge_texts, settings)
    fires = _fires(view, judge_texts, pool, owners, layers, progress)
    embeddings_VD = nnf.normalize(view.lm.embed(torch.arange(view.lm.d_vocab, device=view.lm.device)).float(), dim=1)
    embeddings_VD = embeddings_VD.cpu()
    embedded_PD = torch.stack([embeddings_VD[window.tokens].mean(0) for window in pool])
    embedded_PD = nnf.normalize(embedded_PD, dim=1)
    texts = (explain, explain_texts, judge, judge_texts)
    return Collected(*texts, pool, fires, embedded_PD, embeddings_VD, settings)


def _gathered(
    view: View,
    corpus: Any,
    split: str,
    tokens: int,
    layers: Sequence[int],
    texts: list[Tensor],
    s: EvidenceSettings,
    progress: Progress,
) -> dict[int, LayerExamples]:
    drawn = s.uniform if split == "train" else s.positives
    reading = FeatureSettings(
        tokens=tokens, split=split, top=max(1, s.strongest), quantiles=1, per_quantile=drawn, before=s.before,
        after=s.after, seed=s.seed,
    )  # fmt: skip
    return gather_examples(view, corpus.sequences(split, tokens), layers, reading, texts, progress)


def windows_of(keeper: Any, feature: int, texts: Sequence[Tensor]) -> list[Window]:
    """A keeper's windows of one feature, the best scored first."""
    found = []
    for place in keeper.score[feature].argsort(descending=True).tolist():
        if not keeper.score[feature, place] > -torch.inf:
            break
        text, at = texts[int(keeper.sequence[feature, place])], int(keeper.token[feature, place])
        start, end = max(0, at - keeper.before), min(len(text), at - keeper.before + keeper.window.shape[-1])
        acts = keeper.window[feature, place, start - at + keeper.before : end - at + keeper.before]
        found.append(Window(text[start:end].tolist(), acts.tolist(), at - start))
    return found


def _pool(texts: Sequence[Tensor], s: EvidenceSettings) -> tuple[list[Window], list[tuple[int, int]]]:
    """Windows drawn evenly over all tokens of the text, each with its text and where it starts."""
    random = torch.Generator().manual_seed(s.seed)
    lengths = torch.tensor([len(text) for text in texts])
    centres = torch.randperm(int(lengths.sum()), generator=random)[: s.pool].sort().values
    ends = lengths.cumsum(0)
    pool, owners = [], []
    for centre, text in zip(centres.tolist(), torch.searchsorted(ends, centres, right=True).tolist()):
        at = centre - int(ends[text] - lengths[text])
        start, end = max(0, at - s.before), min(int(lengths[text]), at + s.after + 1)
        pool.append(Window(texts[text][start:end].tolist(), [0.0] * (end - start), at - start))
        owners.append((text, start))
    return pool, owners


@torch.no_grad()
def _fires(
    view: View,
    texts: Sequence[Tensor],
    pool: Sequence[Window],
    owners: Sequence[tuple[int, int]],
    layers: Sequence[int],
    progress: Progress,
) -> dict[int, Tensor]:
    transcoder, read = view.transcoder, view.transcoder.settings.read
    fires = {
        layer: torch.zeros(len(pool), transcoder.features[transcoder.layers.index(layer)], dtype=torch.bool)
        for layer in layers
    }
    by_text: dict[int, list[int]] = {}
    for p, (text, _) in enumerate(owners):
        by_text.setdefault(text, []).append(p)
    for done, (text, members) in enumerate(by_text.items()):
        tokens_ST, _ = padded([texts[text]], view.lm.device)
        with view.lm.capture({read, *view.sinks.limits}) as sites:
            view.lm.run(tokens_ST)
        counted_T = ~view.masked_positions(tokens_ST, sites=sites)[0]
        for layer in layers:
            x_TD = getattr(sites, read)[layer][0].to(transcoder.dtype)
            acts_TF = transcoder.encode_layer(x_TD, transcoder.layers.index(layer))
            fires_TF = ((acts_TF > 0) & counted_T[:, None]).cpu()
            for p in members:
                start = owners[p][1]
                fires[layer][p] = fires_TF[start : start + len(pool[p].tokens)].any(0)
        progress("reading silent text", done + 1, len(by_text))
    return fires


def every(collected: Collected, keys: Iterable[tuple[int, int]]) -> Iterable[Evidence]:
    """One after the other, so that lists of a million features never lie in memory together."""
    return (collected.of(layer, feature) for layer, feature in keys)
