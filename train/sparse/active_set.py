"""Which entries of h [B, F] a layer's step has to look at: the active ones, and those in an estimator's window.

On the CPU the lists are as long as there are entries. On an accelerator their length must be known beforehand, or the
host would wait for the device: topk kinds have one by nature, and the others take a `capacity` (`workspace.Room`).
Places left over hold `ABSENT` as their pre-activation, which no activation, penalty or estimator reacts to.

Ties are kept, here as in the dense path: topk kinds keep every h >= tau with h > 0, tau the count-th largest.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..parallel import Collectives
from .products import entries_above

ABSENT = -1e30

# A subsample of about this many pre-activations bounds batchtopk's threshold from below.
_SAMPLE = 1 << 15


@dataclass(frozen=True)
class Rule:
    """How active entries are chosen."""

    activation: str
    """relu, jumprelu, topk or batchtopk."""

    k_scope: str = "layer"
    """batchtopk: choose within each layer, or among all."""

    bandwidth: float = 1.0
    """jumprelu: the estimator's window."""

    ste_reaches_h: bool = True
    """jumprelu: whether the estimator's gradient reaches h."""


class Chosen(NamedTuple):
    """Entries of one layer, listed by token."""

    tokens: Tensor
    features: Tensor
    h: Tensor
    """Pre-activations; ABSENT in places left over."""
    found: Tensor | int
    """Entries there were; more than len(tokens) if the capacity did not suffice."""


def read_freely(tensor: Tensor) -> bool:
    """Whether the host can look at this tensor's numbers without waiting."""
    return tensor.device.type == "cpu"


def short(index: Tensor) -> Tensor:
    """Places in lists, of four bytes each on an accelerator: much of what it moves. (The C++ kernels take eight.)"""
    return index if read_freely(index) else index.int()


def is_absent(h: Tensor) -> Tensor:
    """[N]: the places left over."""
    return h < ABSENT / 2


def just_below(threshold: Tensor | float, like: Tensor) -> Tensor:
    """The threshold tau' with h > tau' exactly where h >= tau and h > 0."""
    tau = torch.as_tensor(threshold, dtype=like.dtype, device=like.device)
    return torch.nextafter(tau, torch.full_like(tau, -torch.inf)).clamp_min(0)


def choose_above(h_BF: Tensor, threshold: Tensor | float, capacity: int | None = None) -> Chosen:
    """All h > threshold; with a capacity no more than that many, at no synchronisation, and the true count beside."""
    if capacity is None:
        tokens, features, values = entries_above(h_BF, threshold)
        return Chosen(tokens, features, values, len(values))
    kept_BF = h_BF > threshold
    pairs = torch.nonzero_static(kept_BF, size=capacity, fill_value=-1)
    empty = pairs[:, 0] < 0
    tokens = pairs[:, 0].where(~empty, h_BF.shape[0] - 1)  # at the end, so that tokens keep rising
    features = pairs[:, 1].clamp_min(0)
    return Chosen(short(tokens), short(features), h_BF[tokens, features].masked_fill(empty, ABSENT), kept_BF.sum())


def choose_active(h_BF: Tensor, rule: Rule, theta_F: Tensor | None, capacity: int | None = None) -> Chosen:
    """relu, jumprelu: active entries and, for jumprelu, those in the window, |h - theta| < bandwidth / 2."""
    if rule.activation == "relu" or theta_F is None:
        return choose_above(h_BF, 0.0, capacity)
    return choose_above(h_BF, theta_F.detach() - rule.bandwidth / 2, capacity)


def compact(chosen: Chosen, capacity: int | None) -> Chosen:
    """The same entries in a list of `capacity` places, at no synchronisation; `found` says how many there were."""
    if capacity is None or read_freely(chosen.h):
        return chosen
    present = ~is_absent(chosen.h)
    if capacity >= len(chosen.h):
        return chosen._replace(found=present.sum())
    places = torch.nonzero_static(present, size=capacity, fill_value=-1)[:, 0]
    empty, at = places < 0, places.clamp_min(0)
    tokens = chosen.tokens[at].where(~empty, chosen.tokens[-1])  # at the end, so that tokens keep rising
    return Chosen(tokens, chosen.features[at], chosen.h[at].masked_fill(empty, ABSENT), present.sum())


def choose_topk(h_BF: Tensor, k: int, comm: Collectives) -> Chosen:
    """Each token's k largest over all feature shards, where positive."""
    if read_freely(h_BF):
        return choose_above(h_BF, just_below(comm.row_threshold(h_BF, k), h_BF))
    values_BK, features_BK = h_BF.topk(min(k, h_BF.shape[1]), dim=1)
    tau_B1 = values_BK[:, -1:] if comm.feature_ranks == 1 else comm.row_threshold(h_BF, k)
    values = values_BK.masked_fill((values_BK < tau_B1) | (values_BK <= 0), ABSENT).flatten()
    tokens = torch.arange(len(h_BF), device=h_BF.device).repeat_interleave(values_BK.shape[1])
    return Chosen(short(tokens), short(features_BK.flatten()), values, len(values))


def choose_largest(h_BF: Tensor, count: int) -> Chosen:
    """The `count` largest positive entries, ties of the last one too; on a CPU perhaps more, for `keep_reaching`."""
    count = min(count, h_BF.numel())
    if read_freely(h_BF):
        found = choose_above(h_BF, _lower_bound(h_BF, count))
        return found if len(found.h) >= count else choose_above(h_BF, 0.0)
    values, flat = h_BF.flatten().topk(count, sorted=False)
    flat, order = flat.sort()
    values = values[order].masked_fill(values[order] <= 0, ABSENT)
    return Chosen(short(flat // h_BF.shape[1]), short(flat % h_BF.shape[1]), values, count)


def _lower_bound(h_BF: Tensor, count: int) -> float:
    """A number that more than `count` entries very likely exceed, and not many more: half as many again, by sample."""
    flat = h_BF.view(-1)
    stride = max(1, flat.numel() // _SAMPLE) | 1  # odd, so that it does not fall on the same few features
    sample = flat[::stride]
    rank = int(1.5 * count / stride) + 16
    if rank >= sample.numel():
        return 0.0
    return max(0.0, float(sample.topk(rank, sorted=False).values.min()))


def largest_values(chosen: Chosen, count: int, numel: int) -> Tensor:
    """What `top_threshold` needs: the `count` largest values, filled up where fewer are positive."""
    count = min(count, numel)
    if len(chosen.h) > count:
        return chosen.h.topk(count, sorted=False).values
    return torch.cat([chosen.h, chosen.h.new_full((count - len(chosen.h),), ABSENT)])


def keep_reaching(chosen: Chosen, tau: Tensor, cut: bool = False) -> Chosen:
    """Only the entries that reach tau; on an accelerator the others stay as empty places. `cut`: the list was given
    fewer places than there might be such entries."""
    kept = (chosen.h >= tau) & (chosen.h > 0)
    if read_freely(chosen.h):
        return Chosen(chosen.tokens[kept], chosen.features[kept], chosen.h[kept], int(kept.sum()))
    # Where all of a list is kept, there may have been more: the list was too short.
    found = kept.sum() + kept.all() if cut else kept.sum()
    return Chosen(chosen.tokens, chosen.features, chosen.h.masked_fill(~kept, ABSENT), found)


def choose_dead(h_BF: Tensor, dead_F: Tensor, k: int, comm: Collectives) -> Chosen:
    """Each token's k largest pre-activations among the dead features, where positive: who reconstructs the error."""
    if not read_freely(h_BF):
        return choose_topk(h_BF.masked_fill(~dead_F, ABSENT), k, comm)
    dead = dead_F.nonzero()[:, 0]
    few = h_BF[:, dead] if len(dead) >= 1 else h_BF.new_full((len(h_BF), 1), ABSENT)
    chosen = choose_topk(few.contiguous(), k, comm)
    return chosen._replace(features=dead[chosen.features])
