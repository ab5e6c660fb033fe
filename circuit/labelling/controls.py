"""What labels have to beat: a dictionary of random directions, the MLP's own neurons, the labels dealt at random.

Both dictionaries fire as often as the transcoder does, and are labelled and judged in just the same way.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ...data.models import LanguageModel
from ..features import Label
from .evidence import Dictionary, View
from .scoring import Key


class NeuronDictionary:
    """The MLPs' own neurons, the k strongest of each token kept: strength is activation times output weight's norm."""

    def __init__(self, lm: LanguageModel, like: Dictionary, k: Sequence[float]):
        self.lm, self.layers, self.k = lm, list(like.layers), list(k)
        self.dtype, self.settings = like.dtype, like.settings
        self.features = [len(self._weights(l).up.weight) for l in range(len(self.layers))]

    @staticmethod
    def possible(lm: LanguageModel, layers: Sequence[int]) -> bool:
        """Mixtures of experts have no single list of neurons."""
        return all(lm.layers[layer].mlp_weights is not None for layer in layers)

    def _weights(self, l: int) -> Any:
        return self.lm.layers[self.layers[l]].mlp_weights

    def encode_layer(self, x: Tensor, l: int) -> Tensor:
        mlp, norm = self._weights(l), self.lm.layers[self.layers[l]].mlp_norm
        x = x.to(mlp.up.weight.dtype)
        z = x if norm is None or self.settings.read == "mlp_in" else norm.frozen(x, norm.denominator(x))
        n = mlp.neurons(*(nnf.linear(z, *affine) for affine in (mlp.gate, mlp.up) if affine is not None))
        strength = (n * mlp.down.weight.norm(dim=0)).abs()
        least = strength.topk(min(max(1, round(self.k[l])), strength.shape[-1]), dim=-1).values[..., -1:]
        return n.abs() * (strength >= least)


class RandomDictionary:
    """Directions drawn at random, each firing above a threshold that gives it the density of a transcoder's feature."""

    def __init__(
        self,
        like: Dictionary,
        d_model: int,
        densities: Mapping[int, Tensor],
        sample: Mapping[int, Tensor],
        seed: int = 0,
    ):
        self.layers, self.features, self.dtype = list(like.layers), list(like.features), like.dtype
        self.settings = like.settings
        self.mean, self.W, self.theta = [], [], []
        for l, layer in enumerate(self.layers):
            draw = torch.Generator().manual_seed(seed + 7919 * layer)
            W_FD = nnf.normalize(torch.randn(self.features[l], d_model, generator=draw), dim=1).to(sample[layer])
            centred_ND = sample[layer] - sample[layer].mean(0)
            h_FN = (W_FD @ centred_ND.T).sort(dim=1, descending=True).values
            count_F = (densities[layer].to(h_FN.device) * h_FN.shape[1]).long().clamp(0, h_FN.shape[1] - 1)
            theta_F = h_FN.gather(1, count_F[:, None])[:, 0].clamp_min(0)
            theta_F[densities[layer].to(h_FN.device) == 0] = torch.inf  # as dead as the feature that it stands for
            self.mean.append(sample[layer].mean(0))
            self.W.append(W_FD)
            self.theta.append(theta_F)

    def encode_layer(self, x: Tensor, l: int) -> Tensor:
        h = (x.to(self.W[l].dtype) - self.mean[l]) @ self.W[l].T
        return torch.where(h > self.theta[l], h, torch.zeros_like(h))


def shuffled(labels: Mapping[Key, Label], seed: int = 0) -> dict[Key, Label]:
    """The same labels, each given to another feature of its layer."""
    dealt: dict[Key, Label] = {}
    for layer in sorted({key[0] for key in labels}):
        keys = sorted(key for key in labels if key[0] == layer)
        order = list(range(len(keys)))
        random.Random(f"{seed} {layer}").shuffle(order)
        # a cycle through a random order: nobody keeps its own, unless it is alone
        for here, there in zip(order, order[1:] + order[:1]):
            dealt[keys[here]] = labels[keys[there]]
    return dealt


def input_sample(view: View, texts: Sequence[Tensor], rows: int = 4096) -> dict[int, Tensor]:
    """{layer: [N, D]}: inputs of the covered layers at the positions that count, from the first texts."""
    read, found, seen = view.transcoder.settings.read, {layer: [] for layer in view.transcoder.layers}, 0
    for text in texts:
        tokens_ST = text.long()[None].to(view.lm.device)
        with torch.no_grad(), view.lm.capture({read, *view.sinks.limits}) as sites:
            view.lm.run(tokens_ST)
        counted_T = ~view.masked_positions(tokens_ST, sites=sites)[0]
        for layer, parts in found.items():
            parts.append(getattr(sites, read)[layer][0][counted_T].float())
        seen += int(counted_T.sum())
        if seen >= rows:
            break
    return {layer: torch.cat(parts)[:rows] for layer, parts in found.items()}
