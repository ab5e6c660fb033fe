"""Weights between features that hold on every prompt, for the neighbourhood of one feature.

The virtual weight of source j on target i is what j writes, read by i, through the residual stream alone:
`V_ij = sum of W_dec_{j->l} over the layers l below i's own, dot W_enc_i` (attention and norms left aside; where the
encoder reads after the MLP's norm, its weight is folded in). Most virtual weights are interference between features
that never fire together, so they are weighted by co-activation (TWERA): `E[a_j a_i] / E[a_j] * V_ij`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...data.errors import Progress, UserError, check_choice, check_range, silent
from ...data.models import LanguageModel
from ...train.transcoder import Transcoder
from ..precision import wide, widest

SIDES = ("inputs", "outputs")


@dataclass(frozen=True)
class GlobalWeightSettings:
    rows: int = 200_000
    """Rows of the store that co-activation is estimated on."""

    batch: int = 2048
    """Rows read at once."""

    top: int = 20
    """Neighbours listed on each side."""

    def __post_init__(self) -> None:
        for name in ("rows", "batch", "top"):
            check_range(f"global_weights.{name}", getattr(self, name), low=1)


class Neighbour(NamedTuple):
    """One feature beside another, and how they go together."""

    layer: int
    feature: int
    virtual: float
    """V between the two."""
    twera: float
    """V weighted by co-activation; 0 where the source never fired."""
    together: float
    """Share of the source's active tokens on which both fire."""


class Store(Protocol):
    """An activation store, as far as it is needed here."""

    def rows_in_order(self, size: int) -> Iterator[Any]: ...


@torch.no_grad()
def virtual_weights(
    transcoder: Transcoder, layer: int, feature: int, side: str, lm: LanguageModel | None = None
) -> dict[int, Tensor]:
    """V between one feature and all of each other layer, by model layer: [F] each.

    `side` inputs gives what earlier features write to this one, outputs what this one writes to later ones. A
    transcoder that reads after the MLP's norm needs `lm` for that norm's weight.
    """
    check_choice("side", side, SIDES)
    here = _place(transcoder, layer, feature)
    if side == "inputs":
        read_D = _read(transcoder, here, lm)[feature]
        return {transcoder.layers[j]: _written(transcoder, j, here) @ read_D for j in range(here)}
    return {
        transcoder.layers[i]: _read(transcoder, i, lm) @ _written(transcoder, here, i)[feature]
        for i in range(here + 1, transcoder.n_layers)
    }


def _written(transcoder: Transcoder, source: int, target: int) -> Tensor:
    """[F, D]: what the source layer's features have written by the time covered layer `target` reads."""
    return transcoder.W_dec[source][:, : target - source].sum(1)


def _read(transcoder: Transcoder, l: int, lm: LanguageModel | None) -> Tensor:
    """[F, D]: encoders as they read the residual stream, up to a norm's denominator."""
    W_enc = transcoder.W_enc[l]
    if transcoder.settings.read == "resid":
        return W_enc
    if lm is None:
        raise UserError("this transcoder reads after the MLP's norm; its virtual weights need the model too")
    norm = lm.layers[transcoder.layers[l]].mlp_norm
    return W_enc if norm is None else norm.centred(W_enc * norm.weight.to(W_enc.dtype))


@torch.no_grad()
def coactivation(
    transcoder: Transcoder, store: Store, layer: int, feature: int, settings: GlobalWeightSettings, progress: Progress
) -> "Coactivation":
    """How often and how strongly every feature fires together with one, over a store."""
    here = _place(transcoder, layer, feature)
    together = Coactivation(transcoder)
    for batch in store.rows_in_order(settings.batch):
        x_BLD = batch.x.to(transcoder.device, transcoder.dtype)
        own_B = wide(transcoder.encode_layer(x_BLD[:, here], here)[:, feature])
        for l in range(transcoder.n_layers):
            together.update(l, transcoder.encode_layer(x_BLD[:, l], l), own_B)
        together.rows += len(own_B)
        progress("counting co-activation", min(together.rows, settings.rows), settings.rows)
        if together.rows >= settings.rows:
            break
    if together.rows == 0:
        raise UserError("the store has no rows to estimate co-activation on")
    return together


class Coactivation:
    """Sums over rows: a_j, a_j a_i, and how often j fires and both fire, for one feature i and all j of each layer."""

    def __init__(self, transcoder: Transcoder):
        def zeros() -> list[Tensor]:
            device = transcoder.device
            return [torch.zeros(F, dtype=widest(device), device=device) for F in transcoder.features]

        self.sum, self.product, self.fires, self.both = zeros(), zeros(), zeros(), zeros()
        self.own_sum, self.own_fires, self.rows = 0.0, 0.0, 0

    def update(self, l: int, acts_BF: Tensor, own_B: Tensor) -> None:
        acts_BF = wide(acts_BF)
        self.sum[l] += acts_BF.sum(0)
        self.product[l] += own_B @ acts_BF
        self.fires[l] += (acts_BF > 0).sum(0)
        self.both[l] += wide(own_B > 0) @ wide(acts_BF > 0)
        if l == 0:
            self.own_sum += float(own_B.sum())
            self.own_fires += float((own_B > 0).sum())


@torch.no_grad()
def neighbourhood(
    transcoder: Transcoder,
    store: Store,
    layer: int,
    feature: int,
    settings: GlobalWeightSettings = GlobalWeightSettings(),
    lm: LanguageModel | None = None,
    progress: Progress = silent,
) -> dict[str, list[Neighbour]]:
    """The features that most drive one (`inputs`) and that it most drives (`outputs`), by the size of their TWERA."""
    found = coactivation(transcoder, store, layer, feature, settings, progress)
    result = {}
    for side in SIDES:
        neighbours = []
        for other, V_F in virtual_weights(transcoder, layer, feature, side, lm).items():
            twera_F, share_F = twera(found, transcoder.layers.index(other), wide(V_F), side)
            for f in twera_F.abs().topk(min(settings.top, len(twera_F))).indices.tolist():
                neighbours.append(Neighbour(other, f, float(V_F[f]), float(twera_F[f]), float(share_F[f])))
        neighbours.sort(key=lambda neighbour: -abs(neighbour.twera))
        result[side] = neighbours[: settings.top]
    return result


def twera(found: Coactivation, l: int, V_F: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """E[a_j a_i] / E[a_j] * V_ij, j the source of each pair, and the share of j's active rows on which both fire."""
    source_sum = found.sum[l] if side == "inputs" else torch.full_like(found.sum[l], found.own_sum)
    source_fires = found.fires[l] if side == "inputs" else torch.full_like(found.fires[l], found.own_fires)
    expected = torch.where(source_sum > 0, found.product[l] / source_sum.clamp_min(1e-300), 0.0)
    return expected * V_F, torch.where(source_fires > 0, found.both[l] / source_fires.clamp_min(1), 0.0)


def _place(transcoder: Transcoder, layer: int, feature: int) -> int:
    if layer not in transcoder.layers:
        raise UserError(f"the transcoder does not cover layer {layer}; it covers {transcoder.layers}")
    here = transcoder.layers.index(layer)
    if not 0 <= feature < transcoder.features[here]:
        raise UserError(f"layer {layer} has features 0 to {transcoder.features[here] - 1}, not {feature}")
    return here
