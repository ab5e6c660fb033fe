"""A language model's own MLP neurons as features, where training may begin.

A neuron's output n(z) is split into its positive and its negative part, n = n+ - n-, since an activation is never
negative. Each part gives one feature, the ReLU of its tangent: n linearised at the part's own typical input, which is
the mean of the rows weighted by the part. Of a ReLU neuron this is the neuron itself; a gated one, act(g) u, gives the
direction act'(g0) u0 w_gate + act(g0) w_up. Norms between site and MLP are folded in, each denominator replaced by the
one number that serves the rows best.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.errors import UserError
from ...data.models import Affine, LayerParts, MlpWeights, Norm
from ...data.store import ActivationStore
from ..transcoder import Reading

if TYPE_CHECKING:  # it brings transformers, which a training does not need
    from ...data.models import LanguageModel

# Rows of the store on which neurons are measured.
ROWS = 8192


class Neurons(NamedTuple):
    """One layer's MLP as features on raw activations."""

    W_in: Tensor
    """[N, D]: what each reads at the transcoder's site."""
    b_in: Tensor
    """[N]"""
    W_out: Tensor
    """[N, D]: what each adds to mlp_out."""
    b_out: Tensor
    """[D]"""
    strength: Tensor
    """[N]: the mean square of what each wrote on the rows."""


def has_neurons(lm: "LanguageModel", store: ActivationStore, layers: Sequence[int] | None) -> bool:
    """Whether the MLP of each covered layer is one list of neurons, and no mixture of experts."""
    return all(lm.layers[layer].mlp_weights is not None for layer in layers or store.layers)


def model_neurons(
    lm: "LanguageModel", store: ActivationStore, layers: Sequence[int] | None, read: str
) -> Iterator[Neurons]:
    """The neurons of each covered layer, one layer at a time; refuses at once what has none."""
    store.check_model(lm.fingerprint, lm.name)
    if not has_neurons(lm, store, layers):
        raise UserError(f"init=mlp needs MLPs of one list of neurons, and those of {lm.family} are mixtures of experts")
    layers = list(layers or store.layers)
    batch, reading = store.batch(0, 0, min(ROWS, len(store)), layers), Reading(store, read, layers)
    x = reading.of(batch)
    return (neurons_of(lm.layers[layer], read, x[:, l]) for l, layer in enumerate(layers))


@torch.no_grad()
def neurons_of(parts: LayerParts, read: str, x_BD: Tensor) -> Neurons:
    """One layer's, from raw rows of the site that is read."""
    if parts.mlp_weights is None:
        raise UserError("a mixture of experts has no single list of neurons")
    wide = torch.promote_types(parts.W_O.dtype, torch.float32)
    mlp = _filled(parts.mlp_weights, wide)
    x_BD = x_BD.to(parts.W_O.device, wide)
    norm = parts.mlp_norm if read == "resid" else None
    z_BD = x_BD if norm is None else norm.frozen(x_BD, norm.denominator(x_BD))

    # Both parts of each neuron: how strong, and what its maps give on its typical input.
    maps = [affine for affine in (mlp.gate, mlp.up) if affine is not None]
    seen = [F.linear(z_BD, *affine) for affine in maps]
    n_BN = mlp.neurons(*seen)
    W_in, b_in, square = [], [], []
    for sign in (1.0, -1.0):
        part_BN = (sign * n_BN).relu()
        total_N = part_BN.sum(0).clamp_min(torch.finfo(wide).tiny)
        typical = [(part_BN * seen_BN).sum(0) / total_N for seen_BN in seen]
        W, b = _tangent(mlp, maps, typical)
        W_in.append(sign * W)
        b_in.append(sign * b)
        square.append(part_BN.square().mean(0))
    W_in, b_in = torch.cat(W_in), torch.cat(b_in)
    if norm is not None:
        W_in, b_in = _before(norm, x_BD, W_in, b_in)

    W_out, b_out = mlp.down.weight.T, mlp.down.bias
    assert b_out is not None
    if parts.post_mlp_norm is not None:
        W_out, b_out = _after(parts.post_mlp_norm, F.linear(n_BN, *mlp.down), W_out, b_out)
    W_out = torch.cat([W_out, -W_out])
    return Neurons(W_in, b_in, W_out, b_out, torch.cat(square) * W_out.square().sum(1))


def _filled(mlp: MlpWeights, dtype: torch.dtype) -> MlpWeights:
    """The same weights in `dtype`, with a bias of zero where there is none."""

    def fill(affine: Affine) -> Affine:
        weight = affine.weight.to(dtype)
        return Affine(weight, weight.new_zeros(len(weight)) if affine.bias is None else affine.bias.to(dtype))

    return MlpWeights(None if mlp.gate is None else fill(mlp.gate), fill(mlp.up), fill(mlp.down), mlp.act)


def _tangent(mlp: MlpWeights, maps: list[Affine], typical: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The affine map of z that touches each neuron at v = `typical` of its maps: n(v) + sum of n'(v) (w z + b - v)."""
    with torch.enable_grad():
        at = [value.requires_grad_() for value in typical]
        n = mlp.neurons(*at)
        slopes = torch.autograd.grad(n.sum(), at)
    W, b = torch.zeros_like(maps[0].weight), n.detach()
    for slope, value, affine in zip(slopes, typical, maps, strict=True):
        W = W + slope[:, None] * affine.weight
        assert affine.bias is not None
        b = b + slope * (affine.bias - value.detach())
    return W, b


def _scale(norm: Norm, x_BD: Tensor) -> Tensor:
    """The one number in place of 1 / denominator that serves all rows best, by least squares."""
    power_B1 = norm.centred(x_BD).square().sum(-1, keepdim=True)
    return (power_B1 / norm.denominator(x_BD)).sum() / power_B1.sum()


def _before(norm: Norm, x_BD: Tensor, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """W norm(x) + b as an affine map of x."""
    shift = 0.0 if norm.bias is None else W @ norm.bias.to(W)
    return norm.centred(W * norm.weight.to(W)) * _scale(norm, x_BD), b + shift


def _after(norm: Norm, y_BD: Tensor, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """What each row of W adds to norm(y), and what b does."""
    scale_D = _scale(norm, y_BD) * norm.weight.to(W)
    shift = 0.0 if norm.bias is None else norm.bias.to(W)
    return norm.centred(W) * scale_D, norm.centred(b) * scale_D + shift
