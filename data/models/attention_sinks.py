"""Attention sinks: the few positions with a huge residual stream, which no average and no transcoder should see.

A position is masked when it is the first of its sequence, when it holds the token that begins texts, and when its
norm belongs to a second mode. Words have norms of every size up to some largest one, each near the next. Sinks stand
apart: among the largest 1% of the sorted norms there is a place where one is at least twice the one below it. That is
looked for at each layer, on what the MLP reads and on what it writes, in a sample of the text; the limits that it
tells are kept with the store, and everything that uses the store's transcoders masks by them.

A multiple of the median would not do: on one model 17 of 20,000 rows stand at 4 to 11 medians with nothing between,
on another the word " the" reaches 12 on a smooth tail.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import SettingsError, check_range

GAP = 2.0
"""Neighbours in the sorted norms this many times apart belong to two modes."""
LARGEST = 0.01
"""A second mode is looked for among this share of the rows."""
LEAST_ROWS = 100
"""Fewer norms tell nothing of modes."""
SITES_LOOKED_AT = "resid", "mlp_out"

Norms = Mapping[str, Mapping[int, Tensor]]
"""Site -> layer of the model -> a tensor."""


class Limit(NamedTuple):
    """What a sample told of one layer and site."""

    limit: float
    """A larger norm is a sink's."""
    known: bool
    """The sample has sinks here; else the limit is GAP times its largest row, and rows above it are unforeseen."""


def find_limit(norms: Tensor) -> Limit | None:
    """The limit between ordinary rows and sinks, of norms [N] of rows that are not masked by their token; None where
    they are too few, or nothing but zeros."""
    count = len(norms)
    sorted_norms = norms.float().sort().values
    if count < LEAST_ROWS or not sorted_norms[-1] > 0:
        return None
    tail = sorted_norms[count - int(count * LARGEST) - 1 :]
    gaps = (tail[1:] / tail[:-1].clamp_min(torch.finfo(torch.float32).tiny)).tolist()
    at = next((place for place, gap in enumerate(gaps) if gap >= GAP), None)
    if at is None:
        return Limit(GAP * float(tail[-1]), False)
    # in the middle of the gap, yet never further from the ordinary rows than a gap has to be
    return Limit(float(tail[at]) * min(GAP, gaps[at] ** 0.5), True)


def check_sinks(sinks: str) -> None:
    """Refuse a `store.sinks` that is none."""
    if sinks in ("auto", "first", "none"):
        return
    try:
        multiple = float(sinks)
    except ValueError:
        raise SettingsError(
            f"store.sinks={sinks} is not known; it takes auto, first, none, or a multiple of the median norm such as 10"
        ) from None
    check_range("store.sinks", multiple, low=1.0)


@dataclass(frozen=True)
class SinkRule:
    """What a store masks, and what everything that uses its transcoders has to leave to the model."""

    bos: int | None
    sinks: str = "first"
    """auto: by token and by a gap in the norms; first: by token alone; none: nothing; a number: by token, and above so
    many medians of the residual stream's norm."""
    limits: dict[str, dict[int, Limit]] = field(default_factory=dict)
    """Site -> layer of the model -> limit."""
    rows: int = 0
    """Norms in the sample."""

    # -- what the sample tells ------------------------------------------------------------------------------------

    def learned(self, norms: Norms) -> "SinkRule":
        """The rule with the limits that norms [N] of a sample tell, which hold no row that is masked by its token."""
        if self.sinks in ("first", "none"):
            return self
        limits: dict[str, dict[int, Limit]] = {}
        for site, by_layer in norms.items():
            for layer, norms_N in by_layer.items():
                limit = self._limit(site, norms_N)
                if limit is not None:
                    limits.setdefault(site, {})[layer] = limit
        return SinkRule(self.bos, self.sinks, limits, max(len(n) for by in norms.values() for n in by.values()))

    def _limit(self, site: str, norms_N: Tensor) -> Limit | None:
        if self.sinks == "auto":
            return find_limit(norms_N)
        if site != "resid" or not len(norms_N):
            return None
        return Limit(float(self.sinks) * norms_N.float().median().item(), True)

    # -- what is masked -------------------------------------------------------------------------------------------

    @property
    def layers(self) -> list[int]:
        """Layers whose norms have to be looked at."""
        return sorted({layer for by_layer in self.limits.values() for layer in by_layer})

    def by_token(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """First positions, and other positions of the token that begins texts: two masks of tokens [..., T]."""
        first = torch.zeros_like(tokens, dtype=torch.bool)
        begins = torch.zeros_like(first)
        if self.sinks == "none":
            return first, begins
        first[..., 0] = True
        if self.bos is not None:
            begins = (tokens == self.bos) & ~first
        return first, begins

    def large(self, norms: Norms) -> Tensor | None:
        """[...] rows that stand apart at some site and layer; None where the rule looks at no norms."""
        found: Tensor | None = None
        for site, layer, limit in self._limits():
            large = norms[site][layer] > limit.limit
            found = large if found is None else found | large
        return found

    def norms(self, sites: Norms) -> Norms:
        """What `large` looks at, of activations sites[site][layer] [..., D]."""
        return {
            site: {layer: row_norms(sites[site][layer]) for layer in by_layer} for site, by_layer in self.limits.items()
        }

    def places(self, norms: Norms, sinks: Tensor) -> dict[str, int]:
        """How many of the rows that `sinks` [...] picks stand apart at each site and layer, by "site.layer"; under
        "unforeseen", how many do so only where the sample had no sinks."""
        counts: dict[str, int] = {}
        foreseen = torch.zeros_like(sinks)
        for site, layer, limit in self._limits():
            large = (norms[site][layer] > limit.limit) & sinks
            counts[f"{site}.{layer}"] = int(large.sum())
            if limit.known:
                foreseen |= large
        counts["unforeseen"] = int((sinks & ~foreseen).sum())
        return {name: count for name, count in counts.items() if count}

    def _limits(self) -> Iterator[tuple[str, int, Limit]]:
        for site, by_layer in self.limits.items():
            for layer, limit in by_layer.items():
                yield site, layer, limit

    # -- as a store's attributes ----------------------------------------------------------------------------------

    def to_attributes(self) -> dict[str, Any]:
        limits = {
            site: {str(layer): {"limit": one.limit, "sinks_in_sample": one.known} for layer, one in by_layer.items()}
            for site, by_layer in self.limits.items()
        }
        return {"bos": self.bos, "sinks": self.sinks, "limits": limits, "sample_rows": self.rows}

    @classmethod
    def from_attributes(cls, masked: Mapping[str, Any]) -> "SinkRule":
        """The rule of a store or of a transcoder, from what it keeps under "masked"."""
        if "limits" not in masked:  # older stores: a multiple of the residual stream's median norm
            norms = masked.get("median_norm") or {}
            multiple = masked.get("multiple", 10.0)
            old = {int(layer): Limit(multiple * norm, True) for layer, norm in norms.items()}
            return cls(masked.get("bos"), str(multiple), {"resid": old} if old else {})
        limits = {
            site: {int(layer): Limit(one["limit"], one["sinks_in_sample"]) for layer, one in by_layer.items()}
            for site, by_layer in masked["limits"].items()
        }
        return cls(masked["bos"], masked["sinks"], limits, masked["sample_rows"])


def described(masked: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a store left out, in words: reasons with counts, and of sinks the tokens and the places where they stand
    apart. `masked` is what a store or a transcoder keeps under that name; "kept" are the rows that were not."""
    counts: dict[str, int] = masked.get("rows", {})
    found = [(f"masked: {reason}", str(n)) for reason, n in counts.items() if n and "." not in reason]

    def strongest(start: str) -> str:
        chosen = {name.removeprefix(start): n for name, n in counts.items() if name.startswith(start)}
        return ", ".join(f"{name} ({n})" for name, n in sorted(chosen.items(), key=lambda item: -item[1])[:6])

    for start, label in (("sink.token.", "sinks: tokens"), ("sink.resid.", "resid"), ("sink.mlp_out.", "mlp_out")):
        if words := strongest(start):
            found.append((label if start.endswith("token.") else f"sinks: layers of {label}", words))
    if unforeseen := counts.get("sink.unforeseen"):
        found.append(("sinks: unforeseen", f"{unforeseen} where the sample had none; raise store.sample_tokens"))
    if counts.get("sink", 0) > 0.01 * masked.get("kept", math.inf):
        found.append(("note", "more than 1% of the rows are sinks: look at their tokens, or take store.sinks=first"))
    if "limits" not in masked and masked.get("median_norm"):
        found.append(("note", "sinks were told by the old rule, a multiple of the median: cache again for today's"))
    return found


def row_norms(x: Tensor) -> Tensor:
    """[...] float32 norms of rows [..., D] of any dtype."""
    narrow = x.float() if x.dtype == torch.float64 else x
    return torch.linalg.vector_norm(narrow, dim=-1, dtype=torch.float32)
