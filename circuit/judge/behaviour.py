"""What a language model does while its MLP outputs are replaced: cross-entropy, divergence, agreement.

Every figure is kept as sums per sequence, one row a sequence, so that processes can add their rows up, and so that
the intervals resample whole sequences: tokens of one text are not independent draws.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...data.errors import Progress, silent
from ...data.models import LanguageModel
from ..precision import wide, widest

HARD_CONFIDENCE = 0.8
"""A token is hard where the model is right with less than this probability."""

STATISTICS = ("tokens", "ce", "kl", "top1", "hard_tokens", "hard_top1")
"""The columns of a condition's sums."""

LOGIT_ROWS = 2048
"""Rows of [rows, vocabulary] that are turned into probabilities at once."""


class Substitute(Protocol):
    """Stands in for MLP outputs. Called once a layer, in order, within one forward pass; layer 0 starts a pass."""

    def __call__(self, layer: int, sites: Mapping[str, Tensor]) -> Tensor: ...


class Condition(NamedTuple):
    """One way to run the model."""

    name: str
    install: Callable[[Tensor], AbstractContextManager[object]]
    """Given the mask [B, T] of positions that keep the model's own output, the hooks to run under."""


class TextBatch(NamedTuple):
    """Sequences side by side, padded on the right where one is shorter: no earlier token sees the padding."""

    tokens_BT: Tensor
    real_BT: Tensor
    """False at padding."""
    counted_BT: Tensor
    """True where the prediction *made at* this position counts: the next token is real and of the same document."""
    first: int
    """The number of the first sequence, over all processes."""


def spliced(lm: LanguageModel, substitute: Substitute, layers: Iterable[int], masked_BT: Tensor):
    """Overwrite the MLP outputs of `layers`; positions in `masked_BT` keep the model's own."""
    chosen = frozenset(layers)

    def overwrite(layer: int, sites: Mapping[str, Tensor]) -> Tensor | None:
        y_hat = substitute(layer, sites)  # at every layer: a cross-layer feature writes to later ones
        if layer not in chosen:
            return None
        own = sites["mlp_out"]
        return torch.where(masked_BT[..., None], own, y_hat.to(own.dtype))

    return lm.overwrite(overwrite)


def splice_condition(name: str, lm: LanguageModel, substitute: Substitute, layers: Iterable[int]) -> Condition:
    """A condition that replaces the outputs of `layers`."""
    return Condition(name, lambda masked_BT: spliced(lm, substitute, layers, masked_BT))


class MeanSubstitute:
    """Every MLP output at its mean: the ablation that `ce_recovered` is measured from."""

    def __init__(self, mean_LD: Tensor):
        self.mean_LD = mean_LD

    def __call__(self, layer: int, sites: Mapping[str, Tensor]) -> Tensor:
        return self.mean_LD[layer].expand_as(sites["mlp_out"])


@torch.no_grad()
def measure_behaviour(
    lm: LanguageModel,
    batches: Iterable[TextBatch],
    conditions: Sequence[Condition],
    masked_positions: Callable[[Tensor], Tensor],
    n_sequences: int,
    progress: Progress = silent,
    observe: Callable[[TextBatch, Tensor], AbstractContextManager[object]] | None = None,
) -> Tensor:
    """Sums [conditions + 1, sequences, statistics]; row 0 is the clean model.

    `observe(batch, masked_BT)` gives hooks for the clean pass, so that reconstruction is measured in the same pass.
    """
    sums_CSK = torch.zeros(len(conditions) + 1, n_sequences, len(STATISTICS), dtype=widest(lm.device), device=lm.device)
    seen = 0
    for batch in batches:
        tokens_BT = batch.tokens_BT.to(lm.device)
        masked_BT = masked_positions(tokens_BT) | ~batch.real_BT.to(lm.device)
        counted_BT = batch.counted_BT.to(lm.device)[:, :-1] & ~masked_BT[:, :-1]
        rows = slice(batch.first, batch.first + len(tokens_BT))
        if observe is None:
            clean = lm(tokens_BT)[:, :-1]
        else:
            with observe(batch, masked_BT):
                clean = lm(tokens_BT)[:, :-1]
        targets_BT = tokens_BT[:, 1:]
        sums_CSK[0, rows] = _statistics(clean, clean, targets_BT, counted_BT)
        for number, condition in enumerate(conditions, start=1):
            with condition.install(masked_BT):
                changed = lm(tokens_BT)[:, :-1]
            sums_CSK[number, rows] = _statistics(clean, changed, targets_BT, counted_BT)
        seen += len(tokens_BT)
        progress("behaviour", seen, n_sequences)
    return sums_CSK


def _statistics(clean_BTV: Tensor, changed_BTV: Tensor, targets_BT: Tensor, counted_BT: Tensor) -> Tensor:
    """The sums of one batch, a row a sequence: [B, statistics]."""
    sums_BK = torch.zeros(len(targets_BT), len(STATISTICS), dtype=widest(targets_BT.device), device=targets_BT.device)
    sequence_N, position_N = counted_BT.nonzero(as_tuple=True)
    for start in range(0, len(sequence_N), LOGIT_ROWS):
        b, t = sequence_N[start : start + LOGIT_ROWS], position_N[start : start + LOGIT_ROWS]
        log_p = clean_BTV[b, t].float().log_softmax(-1)
        log_q = changed_BTV[b, t].float().log_softmax(-1)
        target = targets_BT[b, t]
        best = log_p.argmax(-1)
        agree = wide(best == log_q.argmax(-1))
        hard = wide((best == target) & (log_p.amax(-1).exp() < HARD_CONFIDENCE))
        columns = (
            torch.ones_like(agree),
            -wide(log_q.gather(-1, target[:, None])[:, 0]),
            wide((log_p.exp() * (log_p - log_q)).sum(-1)),
            agree,
            hard,
            hard * agree,
        )
        sums_BK.index_add_(0, b, torch.stack(columns, -1))
    return sums_BK


class Interval(NamedTuple):
    """A figure with its 95% interval; None where the text holds too little to say."""

    value: float | None
    low: float | None
    high: float | None


def resampled(sums: Tensor, figure: Callable[[Tensor], Tensor], seed: int = 0, draws: int = 1000) -> Interval:
    """A figure of summed statistics, and the interval from resampling sequences with replacement.

    `sums` is [..., sequences, statistics]; `figure` maps totals [..., draws, statistics] to [draws].
    """
    n = sums.shape[-2]
    value = figure(sums.sum(-2, keepdim=True)).item()
    if n < 2:
        return Interval(_finite(value), None, None)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(n, (draws, n), generator=generator)
    weights_RS = torch.zeros(draws, n, dtype=torch.float64).scatter_add_(1, picks, wide(torch.ones_like(picks)))
    spread = figure(weights_RS.to(sums.device) @ sums)
    spread = spread[spread.isfinite()]
    if len(spread) < draws // 2:
        return Interval(_finite(value), None, None)
    low, high = spread.quantile(torch.tensor([0.025, 0.975], dtype=spread.dtype, device=spread.device)).tolist()
    return Interval(_finite(value), low, high)


def _finite(value: float) -> float | None:
    return value if torch.isfinite(torch.tensor(value)) else None


_COLUMN = {name: index for index, name in enumerate(STATISTICS)}


def _per_token(name: str, tokens: str = "tokens") -> Callable[[Tensor], Tensor]:
    return lambda totals: totals[..., _COLUMN[name]] / totals[..., _COLUMN[tokens]]


def summary(sums_SK: Tensor, seed: int = 0) -> dict[str, object]:
    """The figures of one condition, each with its interval under `NAME_interval`."""
    figures = {
        "ce": _per_token("ce"),
        "kl": _per_token("kl"),
        "top1": _per_token("top1"),
        "top1_hard": _per_token("hard_top1", "hard_tokens"),
    }
    result: dict[str, object] = {}
    for name, figure in figures.items():
        found = resampled(sums_SK, figure, seed)
        result[name] = found.value
        result[f"{name}_interval"] = [found.low, found.high]
    result["hard_tokens"] = int(sums_SK[:, _COLUMN["hard_tokens"]].sum().item())
    return result


def ce_recovered(clean_SK: Tensor, ablated_SK: Tensor, replaced_SK: Tensor, seed: int = 0) -> Interval:
    """(ablated - replaced) / (ablated - clean), with its interval."""
    ce = _per_token("ce")

    def figure(totals: Tensor) -> Tensor:
        clean, ablated, replaced = (ce(part) for part in totals)
        return (ablated - replaced) / (ablated - clean)

    return resampled(torch.stack([clean_SK, ablated_SK, replaced_SK]), figure, seed)
