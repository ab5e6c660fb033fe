"""What each feature of a layer did over a stream of text, in bounded memory: examples, counts, a histogram.

All features of a layer are kept together and updated at once, with no loop over features.
Suffixes: S sequences, T tokens, F features, K kept examples, W tokens of a window.
"""

import torch
from torch import Tensor

from ..precision import wide, widest

BINS = 24


class Keeper:
    """The K best-scored tokens of every feature, at most one a sequence, each with the activations around it."""

    def __init__(self, features: int, keep: int, before: int, after: int, device: torch.device | str):
        self.keep, self.before = keep, before
        self.offsets = torch.arange(-before, after + 1, device=device)
        self.score = torch.full((features, keep), -torch.inf, device=device)
        self.sequence = torch.full((features, keep), -1, dtype=torch.int64, device=device)
        self.token = torch.zeros(features, keep, dtype=torch.int64, device=device)
        self.window = torch.zeros(features, keep, len(self.offsets), device=device)

    def update(self, score_SF: Tensor, token_SF: Tensor, acts_STF: Tensor, sequence_S: Tensor) -> None:
        """`score_SF` is -inf where a sequence has no example for a feature; only features that change are touched."""
        if self.keep == 0:
            return
        f_M = torch.nonzero(score_SF.amax(0) > self.score.amin(1)).squeeze(1)
        if len(f_M) == 0:
            return
        merged = torch.cat([self.score[f_M], score_SF[:, f_M].T], dim=1)
        score_MK, slot_MK = merged.topk(self.keep, dim=1)
        is_new = (slot_MK >= self.keep) & (score_MK > -torch.inf)
        s_MK, old_MK = (slot_MK - self.keep).clamp_min(0), slot_MK.clamp_max(self.keep - 1)
        token_MK = token_SF[s_MK, f_M[:, None]]
        self.score[f_M] = score_MK
        self.sequence[f_M] = torch.where(is_new, sequence_S[s_MK], self.sequence[f_M].gather(1, old_MK))
        self.token[f_M] = torch.where(is_new, token_MK, self.token[f_M].gather(1, old_MK))
        window_MKW = self.window[f_M].gather(1, old_MK[..., None].expand(-1, -1, len(self.offsets)))
        m, k = torch.nonzero(is_new, as_tuple=True)
        window_MKW[m, k] = self._window(acts_STF, s_MK[m, k], token_MK[m, k], f_M[m])
        self.window[f_M] = window_MKW

    def _window(self, acts_STF: Tensor, s: Tensor, token: Tensor, f: Tensor) -> Tensor:
        places = token[:, None] + self.offsets
        inside = (places >= 0) & (places < acts_STF.shape[1])
        return acts_STF[s[:, None], places.clamp(0, acts_STF.shape[1] - 1), f[:, None]].float() * inside


class Histogram:
    """Counts of active values per feature over equal bins from 0 up to a limit that doubles when it is passed."""

    def __init__(self, features: int, device: torch.device | str):
        self.counts = torch.zeros(features, BINS, dtype=torch.int64, device=device)
        self.limit = torch.zeros(features, device=device)
        self.least = torch.full((features,), torch.inf, device=device)
        self.most = torch.zeros(features, device=device)

    def update(self, feature_N: Tensor, value_N: Tensor) -> None:
        """Active values, with the feature that each is of."""
        if len(value_N) == 0:
            return
        value_N = value_N.float()
        self.least.scatter_reduce_(0, feature_N, value_N, "amin")
        self.most.scatter_reduce_(0, feature_N, value_N, "amax")
        self.limit = torch.where(self.limit == 0, self.most, self.limit)
        while bool((low := self.most > self.limit).any()):
            pairs = self.counts[low].unflatten(1, (BINS // 2, 2)).sum(2)
            self.counts[low] = torch.cat([pairs, torch.zeros_like(pairs)], dim=1)
            self.limit[low] *= 2
        bin_N = (value_N / self.limit[feature_N] * BINS).long().clamp_(0, BINS - 1)
        self.counts.view(-1).index_add_(0, feature_N * BINS + bin_N, torch.ones_like(bin_N))

    def quantiles(self, shares: list[float]) -> Tensor:
        """[F, len(shares)]: the activations below which these shares of a feature's active values lie, about."""
        reached = wide(self.counts.cumsum(1))
        total = reached[:, -1:]
        goal = torch.tensor(shares, dtype=widest(total.device), device=total.device) * total
        place = torch.searchsorted(reached, goal.contiguous()).clamp_max(BINS - 1)
        before = torch.where(place > 0, reached.gather(1, (place - 1).clamp_min(0)), 0.0)
        inside = (goal - before) / wide(self.counts).gather(1, place).clamp_min(1)
        found = (place + inside.clamp(0, 1)) * wide(self.limit[:, None]) / BINS
        low, high = wide(self.least)[:, None], wide(self.most)[:, None]
        return torch.where(total > 0, found.clamp(low.clamp_max(3e38), high), 0.0)


class LayerExamples:
    """All that is gathered of one layer's features in one pass over the text."""

    def __init__(
        self, features: int, top: int, sampled: int, before: int, after: int, device: torch.device | str, seed: int = 0
    ):
        self.top = Keeper(features, top, before, after, device)
        self.sampled = Keeper(features, sampled, before, after, device)
        self.histogram = Histogram(features, device)
        self.fired = torch.zeros(features, dtype=torch.int64, device=device)
        self.tokens = 0
        self.random = torch.Generator(device=device).manual_seed(seed)

    def update(self, acts_STF: Tensor, counted_ST: Tensor, sequence_S: Tensor) -> None:
        """Activations of a batch; tokens that do not count (padding, masked positions) are zero in it."""
        acts_STF = acts_STF * counted_ST[..., None]
        peak_SF, where_SF = acts_STF.max(dim=1)
        silent = peak_SF <= 0
        self.top.update(peak_SF.float().masked_fill(silent, -torch.inf), where_SF, acts_STF, sequence_S)
        # A uniform sample of the tokens on which a feature fires: those with the largest of random numbers.
        chance_ST = torch.rand(counted_ST.shape, generator=self.random, device=acts_STF.device)
        luck_SF, drawn_SF = (chance_ST[..., None] * (acts_STF > 0)).max(dim=1)
        self.sampled.update(luck_SF.masked_fill(silent, -torch.inf), drawn_SF, acts_STF, sequence_S)
        s, t, f = torch.nonzero(acts_STF, as_tuple=True)
        self.fired += torch.bincount(f, minlength=len(self.fired))
        self.histogram.update(f, acts_STF[s, t, f])
        self.tokens += int(counted_ST.sum())

    @property
    def density(self) -> Tensor:
        """[F] share of counted tokens on which each feature fires."""
        return wide(self.fired) / max(1, self.tokens)
