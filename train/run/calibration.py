"""Thresholds that give a chosen L0 on held-out rows: what batchtopk exports, and the last correction of the others."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..parallel import SINGLE, Collectives
from ..settings import TOPK
from ..transcoder import Transcoder, candidates

# A threshold stands this share below the entry that it was found at, or rounding would say whether that one is active.
# Of a small one the share is that of the pre-activations, which are about one: theirs is the rounding.
_BELOW, _USUAL = 1e-5, 0.3


@torch.no_grad()
def calibrated_thresholds(
    transcoder: Transcoder, batches: Iterable[Tensor], rows: int, target: Sequence[float], comm: Collectives = SINGLE
) -> list[Tensor]:
    """Per layer [F]: thresholds at which `target[l]` features a token are active on `rows` normalised rows, of which
    `batches` are this rank's.

    topk kinds get one number a layer (one for all layers where batchtopk lets layers compete); jumprelu's own
    thresholds are all multiplied by one number a layer; relu gets one number a layer. The last two may be negative, and
    are then a shift (see `Transcoder.activate`). The exact order statistic, from a pool of candidates.
    """
    own = [transcoder.theta(l) for l in range(transcoder.n_layers)]
    relative = transcoder.settings.activation == "jumprelu"
    topk_kind = transcoder.settings.activation in TOPK
    together = transcoder.settings.activation == "batchtopk" and transcoder.settings.k_scope == "all"
    groups = [list(range(transcoder.n_layers))] if together else [[l] for l in range(transcoder.n_layers)]
    counts = [max(1, round(sum(target[l] for l in group) * rows)) for group in groups]
    pools: list[Tensor] = [own[0].new_zeros(0)] * len(groups)
    for x in batches:
        h = transcoder.preactivations(x)
        scores = [h_BF / theta for h_BF, theta in zip(h, own, strict=True)] if relative else h
        for g, group in enumerate(groups):
            pools[g] = candidates(torch.cat([pools[g], *(candidates(scores[l], counts[g]) for l in group)]), counts[g])
    thresholds: list[Tensor] = [own[0]] * transcoder.n_layers
    for g, group in enumerate(groups):
        level = comm.top_threshold(pools[g], counts[g])
        for l in group:
            found = own[l] * level if relative else level.expand(transcoder.features[l])
            found = found - _BELOW * found.abs().clamp_min(_USUAL)
            thresholds[l] = found.clamp_min(1e-30) if topk_kind else found
    return thresholds
