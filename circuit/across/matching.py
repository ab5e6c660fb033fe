"""Features of two transcoders of one model, paired by what they write and by when they fire.

text -> the model's activations -> own features a [N, n] of a layer, all of the other's b [N, F]
likeness [n, F] = (cosine of decoders + cosine of activations over the text) / 2
one of the other's features to each, so that the likeness is greatest in total   (assign)
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...data.errors import UserError
from ...data.models import LanguageModel
from ...train.transcoder import Transcoder

Key = tuple[int, int]
"""A feature: (layer of the model, index)."""
LEAST = 0.5
"""Features that are less alike than this are no pair."""


class Match(NamedTuple):
    """The other transcoder's feature that stands for one of this one's."""

    index: int
    decoder: float
    """Cosine of the decoders, over all layers that they write to."""
    activation: float
    """Cosine of the activations over the text."""

    @property
    def likeness(self) -> float:
        return (self.decoder + self.activation) / 2


@torch.no_grad()
def match_features(
    lm: LanguageModel, own: Transcoder, others: Sequence[Transcoder], features: Iterable[Key], text: Iterable[Tensor]
) -> list[dict[Key, Match]]:
    """For each of the others, its counterparts of some of `own`'s features; `text` is token sequences [T]."""
    for other in others:
        if (other.layers, other.reach, other.settings.read) != (own.layers, own.reach, own.settings.read):
            raise UserError(
                "features are paired between transcoders of one configuration: layers, reach and read differ"
            )
    chosen: dict[int, list[int]] = {}
    for layer, index in sorted(set(features)):
        chosen.setdefault(layer, []).append(index)
    places = {layer: own.layers.index(layer) for layer in chosen}
    products = [{l: torch.zeros(len(chosen[l]), other.features[places[l]]) for l in chosen} for other in others]
    norms = {layer: torch.zeros(len(chosen[layer])) for layer in chosen}
    other_norms = [{layer: torch.zeros(other.features[places[layer]]) for layer in chosen} for other in others]
    for tokens_T in text:
        with lm.capture((own.settings.read,), own.layers) as found:
            lm.run(tokens_T[None].to(lm.device))
        for layer, indices in chosen.items():
            x_TD = getattr(found, own.settings.read)[layer][0, 1:]  # the first position is left to the model
            a_TN = own.encode_layer(x_TD.to(own.dtype), places[layer])[:, indices].float()
            norms[layer] += a_TN.square().sum(0).cpu()
            for other, product, norm in zip(others, products, other_norms):
                b_TF = other.encode_layer(x_TD.to(other.dtype), places[layer]).float()
                product[layer] += (a_TN.T @ b_TF).cpu()
                norm[layer] += b_TF.square().sum(0).cpu()
    matches = []
    for other, product, norm in zip(others, products, other_norms):
        found_pairs: dict[Key, Match] = {}
        for layer, indices in chosen.items():
            scale = (norms[layer][:, None] * norm[layer]).sqrt().clamp_min(1e-30)
            activation = product[layer] / scale
            decoder = _directions(own, places[layer])[indices] @ _directions(other, places[layer]).T
            likeness = (activation + decoder) / 2
            for row, column in enumerate(assign(likeness.numpy())):
                if likeness[row, column] >= LEAST:
                    match = Match(column, float(decoder[row, column]), float(activation[row, column]))
                    found_pairs[layer, indices[row]] = match
        matches.append(found_pairs)
    return matches


def _directions(transcoder: Transcoder, place: int) -> Tensor:
    """[F, reach * D] decoders of a layer, each of length one."""
    return torch.nn.functional.normalize(transcoder.W_dec[place].detach().float().flatten(1), dim=1).cpu()


def assign(score: np.ndarray) -> list[int]:
    """For each row a column of its own, so that the sum of their scores is the largest; rows are no more than columns.

    The Hungarian method by shortest augmenting paths: each new row takes a free column at the end of the cheapest
    chain of rows that give way. `u` and `v` keep all reduced costs at zero or above.
    """
    rows, columns = score.shape
    if rows > columns:
        raise ValueError(f"{rows} rows cannot have a column each of {columns}")
    cost = -score.astype(np.float64)
    u, v = np.zeros(rows), np.zeros(columns + 1)
    row_of = np.full(columns + 1, -1)  # the last column is where a new row waits
    for row in range(rows):
        row_of[columns] = row
        at, best, came_from = columns, np.full(columns, np.inf), np.full(columns, -1)
        done = np.zeros(columns + 1, bool)
        while row_of[at] >= 0:
            done[at] = True
            reduced = cost[row_of[at]] - u[row_of[at]] - v[:columns]
            better = ~done[:columns] & (reduced < best)
            best[better], came_from[better] = reduced[better], at
            open_ = np.where(done[:columns], np.inf, best)
            nearest = int(open_.argmin())
            step = open_[nearest]
            u[row_of[done]] += step
            v[done] -= step
            best[~done[:columns]] -= step
            at = nearest
        while at != columns:
            row_of[at] = row_of[came_from[at]]
            at = came_from[at]
    found = np.empty(rows, int)
    for column in range(columns):
        if row_of[column] >= 0:
            found[row_of[column]] = column
    return found.tolist()
