"""Weights between features that hold on every prompt: for each feature, which others it is driven by and drives.

The virtual weight of source j on target i is what j writes, read by i, through the residual stream alone:
`V_ij = sum of W_dec_{j->l} over the layers l below i's own, dot W_enc_i` (attention and norms left aside; where the
encoder reads after the MLP's norm, its weight is folded in). Most virtual weights are interference between features
that never fire together, so they are weighted by co-activation (TWERA): `E[a_j a_i] / E[a_j] * V_ij`.

    activations of some tokens [N, F] a layer, sparse  --a pair of layers at a time-->  the strongest of each feature
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...data.errors import Progress, UserError, silent
from ...data.models import LanguageModel
from ...train.transcoder import Transcoder

AT_ONCE = 2**26  # numbers of one dense block
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")  # as which torch multiplies sparse matrices


class Together:
    """What every feature did on a sample of tokens, sparse: a matrix of tokens by features for each covered layer."""

    def __init__(self, layers: int, most: int):
        self.most, self.tokens = most, 0
        self._parts: list[list[Tensor]] = [[] for _ in range(layers)]
        self._joined: list[Tensor] | None = None

    def update(self, l: int, acts_BF: Tensor) -> None:
        """More tokens of covered layer l; all layers are given the same tokens, the last layer last."""
        acts_BF = acts_BF[: self.most - self.tokens]
        self._parts[l].append(acts_BF.float().to_sparse())
        if l == len(self._parts) - 1:
            self.tokens += len(acts_BF)

    @property
    def full(self) -> bool:
        return self.tokens >= self.most

    @property
    def acts(self) -> list[Tensor]:
        """[N, F] a layer, sparse."""
        if self._joined is None:
            self._joined = [torch.cat(parts).coalesce() for parts in self._parts]
        return self._joined

    def of(self, features: Sequence[tuple[int, int]]) -> Tensor:
        """[N, n] activations of some features, each a covered layer and its number there."""
        found = torch.zeros(self.tokens, len(features), device=self.acts[0].device)
        for l in {l for l, _ in features}:
            columns = [column for column, one in enumerate(features) if one[0] == l]
            index = torch.tensor([features[column][1] for column in columns], device=found.device)
            found[:, columns] = self.acts[l].index_select(1, index).to_dense()
        return found


class Neighbour(NamedTuple):
    """A feature beside another, and how they go together."""

    layer: int
    feature: int
    twera: float
    """The virtual weight times the target's mean activation where the source fires, weighted by the source's."""
    virtual: float


class Neighbours(NamedTuple):
    """The strongest neighbours of one layer's features, [F, n] each: number over all features, TWERA, virtual."""

    number: Tensor
    twera: Tensor
    virtual: Tensor

    def merged(self, numbers: Tensor, twera: Tensor, virtual: Tensor) -> "Neighbours":
        """The strongest of these and of others, twera and virtual [F, m], numbers [m]."""
        n = self.twera.shape[1]
        best = twera.abs().topk(min(n, twera.shape[1]), 1).indices
        others = (numbers[best], twera.gather(1, best), virtual.gather(1, best))
        joined = [torch.cat(pair, 1) for pair in zip(self, others)]
        keep = joined[1].abs().topk(n, 1).indices
        return Neighbours(*(each.gather(1, keep) for each in joined))


def virtual_weights(transcoder: Transcoder, j: int, i: int, lm: LanguageModel | None = None) -> Tensor:
    """V [F_j, F_i] of the features of covered layer j on those of the later covered layer i. A transcoder that reads
    after the MLP's norm needs `lm` for that norm's weight."""
    written_FD = transcoder.W_dec[j][:, : i - j].sum(1)
    read_FD = transcoder.W_enc[i]
    if transcoder.settings.read != "resid":
        if lm is None:
            raise UserError("this transcoder reads after the MLP's norm; its virtual weights need the model too")
        norm = lm.layers[transcoder.layers[i]].mlp_norm
        read_FD = read_FD if norm is None else norm.centred(read_FD * norm.weight.to(read_FD.dtype))
    return written_FD.to(read_FD.dtype) @ read_FD.T


@torch.no_grad()
def find_neighbours(
    transcoder: Transcoder, together: Together, top: int, lm: LanguageModel | None = None, progress: Progress = silent
) -> "GlobalWeights":
    """For every feature the `top` features that drive it most and that it drives most, by the size of TWERA."""
    L, counts, device = transcoder.n_layers, transcoder.features, transcoder.device
    first = [sum(counts[:l]) for l in range(L + 1)]

    def none(l: int) -> Neighbours:
        empty = torch.zeros(counts[l], top, device=device)
        return Neighbours(torch.zeros_like(empty, dtype=torch.long), empty, empty.clone())

    inputs, outputs = [none(l) for l in range(L)], [none(l) for l in range(L)]
    for j in range(L - 1):
        source_FN = together.acts[j].t().coalesce()
        sum_F = together.acts[j].sum(0).to_dense().clamp_min(1e-30)
        sources = torch.arange(first[j], first[j + 1], device=device)
        for i in range(j + 1, L):
            V = virtual_weights(transcoder, j, i, lm).float()
            for numbers in torch.arange(counts[i], device=device).split(max(1, AT_ONCE // counts[j])):
                # the product of two sparse matrices: a token costs the pairs that fire on it, not a whole row
                fired_JB = torch.sparse.mm(source_FN, together.acts[i].index_select(1, numbers)).to_dense()
                twera, virtual = fired_JB / sum_F[:, None] * V[:, numbers], V[:, numbers]
                outputs[j] = outputs[j].merged(first[i] + numbers, twera, virtual)
                own = Neighbours(*(each[numbers] for each in inputs[i]))
                found = own.merged(sources, twera.T.contiguous(), virtual.T)
                for whole, part in zip(inputs[i], found):
                    whole[numbers] = part
        progress("weighing features against each other", j + 1, L - 1)
    return GlobalWeights(list(transcoder.layers), first, inputs, outputs)


class GlobalWeights(NamedTuple):
    """The strongest neighbours of every feature."""

    layers: list[int]
    first: list[int]
    inputs: list[Neighbours]
    outputs: list[Neighbours]

    def of(self, layer: int, feature: int) -> dict[str, list[Neighbour]]:
        """What drives a feature of a model layer (`inputs`) and what it drives (`outputs`), the strongest first."""
        l = self.layers.index(layer)
        return {
            side: self._told(kept[l], feature) for side, kept in (("inputs", self.inputs), ("outputs", self.outputs))
        }

    def _told(self, kept: Neighbours, feature: int) -> list[Neighbour]:
        found = []
        for number, twera, virtual in zip(*(each[feature].tolist() for each in kept)):
            if twera:
                l = next(l for l in reversed(range(len(self.layers))) if self.first[l] <= number)
                found.append(Neighbour(self.layers[l], number - self.first[l], twera, virtual))
        return found
