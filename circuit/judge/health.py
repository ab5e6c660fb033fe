"""The state of a dictionary's features, in figures and in plain warnings."""

from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ...train.transcoder import Transcoder
from ..precision import wide, widest

DENSITY_EDGES = [10.0**power for power in range(-6, 1)]
"""Bins of the density histogram: never, then by powers of ten."""
DUPLICATE_COSINE = 0.95
BLOCK = 2048
"""Features whose decoders are compared at once: bounds the memory of the search for duplicates."""


@torch.no_grad()
def health(transcoder: Transcoder, densities: Sequence[Tensor]) -> dict[str, Any]:
    """Figures by covered layer, and warnings in words. `densities` [F] a layer, over the evaluation tokens."""
    layers = [
        {
            "layer": transcoder.layers[l],
            "l0": float(density_F.sum()),
            "density_histogram": density_histogram(density_F),
            "dead": float(wide(density_F == 0).mean()),
            "dense": float(wide(density_F > 0.1).mean()),
            "decoder_norm": transcoder.W_dec[l].float().norm(dim=-1).mean(0).tolist(),
            "duplicates": duplicates(transcoder.W_dec[l].flatten(1)),
            "threshold": _spread(transcoder.theta(l)),
        }
        for l, density_F in enumerate(densities)
    ]
    return {"layers": layers, "warnings": warnings(layers)}


def density_histogram(density_F: Tensor) -> list[int]:
    """How many features never fire, then how many fire on up to 1e-6, 1e-5, ... 1 of the tokens."""
    place = torch.bucketize(wide(density_F), wide(torch.tensor(DENSITY_EDGES, device=density_F.device))) + 1
    place[density_F == 0] = 0
    return torch.bincount(place, minlength=len(DENSITY_EDGES) + 1).tolist()


def duplicates(rows_FE: Tensor) -> float:
    """The share of features whose decoder has another one's direction (cosine above 0.95)."""
    unit_FE = torch.nn.functional.normalize(rows_FE.float(), dim=1)
    found = 0
    for start in range(0, len(unit_FE), BLOCK):
        cosine_BF = unit_FE[start : start + BLOCK] @ unit_FE.T
        cosine_BF[torch.arange(len(cosine_BF)), torch.arange(start, start + len(cosine_BF))] = -1
        found += int((cosine_BF > DUPLICATE_COSINE).any(1).sum())
    return found / max(1, len(unit_FE))


def _spread(theta_F: Tensor) -> list[float]:
    """5%, 50% and 95% quantiles."""
    probabilities = torch.tensor([0.05, 0.5, 0.95], dtype=widest(theta_F.device), device=theta_F.device)
    return wide(theta_F).quantile(probabilities).tolist()


def warnings(layers: Sequence[dict[str, Any]]) -> list[str]:
    """What a person should look at, in words."""
    found = []
    usual = median(layer["l0"] for layer in layers)
    for layer in layers:
        name = f"layer {layer['layer']}"
        if layer["l0"] == 0:
            found.append(f"{name} has no active feature at all")
        elif usual > 0 and layer["l0"] > 3 * usual:
            found.append(f"{name} uses {layer['l0'] / usual:.1f} times more features than the median layer")
        elif layer["l0"] < usual / 3:
            found.append(f"{name} uses {usual / layer['l0']:.1f} times fewer features than the median layer")
        if layer["dead"] > 0.1:
            found.append(f"{layer['dead']:.0%} of the features of {name} never fire on the evaluation text")
        if layer["dense"] > 0.02:
            found.append(f"{layer['dense']:.1%} of the features of {name} fire on more than a tenth of the tokens")
        if layer["duplicates"] > 0.05:
            found.append(f"{layer['duplicates']:.0%} of the features of {name} share another's decoder direction")
    return found
