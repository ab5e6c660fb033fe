"""Activation functions: which features fire, and what gradient the kinks get.

Every function is pure and takes pre-activations `h_BF`; active values are always positive, so "active" is `a > 0`.
The straight-through estimators replace the Dirac delta of a step at theta by a rectangle of width eps (the bandwidth):
delta(h - theta) ~ rect((h - theta) / eps) / eps, rect(u) = 1 where |u| < 1/2.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..parallel import SINGLE, Collectives


class SparseActs(NamedTuple):
    """Activations of one layer as (value, index) pairs; an empty slot has value 0 and index 0."""

    values: Tensor
    """[B, K], float."""
    indices: Tensor
    """[B, K], int64: which feature of the layer."""

    def dense(self, features: int) -> Tensor:
        """The same activations as [B, F]."""
        acts_BF = self.values.new_zeros(self.values.shape[0], features)
        return acts_BF.scatter_add(1, self.indices, self.values)


def to_sparse(acts_BF: Tensor) -> SparseActs:
    """Keep the non-zero entries, padded to the busiest row and one slot at least (reads one number back)."""
    most = max(1, int((acts_BF > 0).sum(1).max())) if acts_BF.shape[0] else 1
    values_BK, indices_BK = acts_BF.topk(most, dim=1)
    return SparseActs(values_BK, indices_BK.where(values_BK > 0, 0))


def rect(u: Tensor) -> Tensor:
    """1 where |u| < 1/2: the kernel of the estimators, as a mask."""
    return u.abs() < 0.5


class _JumpReLU(torch.autograd.Function):
    """h * 1[h > theta]; d/dtheta = -(theta / eps) rect((h - theta) / eps), its negative reaches h on request."""

    @staticmethod
    def forward(ctx: Any, h_BF: Tensor, theta_F: Tensor, bandwidth: float, ste_reaches_h: bool) -> Tensor:
        ctx.save_for_backward(h_BF, theta_F)
        ctx.bandwidth, ctx.ste_reaches_h = bandwidth, ste_reaches_h
        return h_BF * (h_BF > theta_F)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        h_BF, theta_F = ctx.saved_tensors
        grad_BF = grads[0]
        window_BF = rect((h_BF - theta_F) / ctx.bandwidth)
        through_step_BF = grad_BF * window_BF * (theta_F / ctx.bandwidth)
        grad_h_BF = grad_BF * (h_BF > theta_F)
        if ctx.ste_reaches_h:
            grad_h_BF = grad_h_BF + through_step_BF
        return grad_h_BF, -through_step_BF.sum_to_size(theta_F.shape), None, None


class _Heaviside(torch.autograd.Function):
    """1[h > theta]; d/dtheta = -(1 / eps) rect((h - theta) / eps), and its negative also reaches h on request."""

    @staticmethod
    def forward(ctx: Any, h_BF: Tensor, theta_F: Tensor, bandwidth: float, ste_reaches_h: bool) -> Tensor:
        ctx.save_for_backward(h_BF, theta_F)
        ctx.bandwidth, ctx.ste_reaches_h = bandwidth, ste_reaches_h
        return (h_BF > theta_F).to(h_BF.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        h_BF, theta_F = ctx.saved_tensors
        through_step_BF = grads[0] * rect((h_BF - theta_F) / ctx.bandwidth) / ctx.bandwidth
        return (through_step_BF if ctx.ste_reaches_h else None), -through_step_BF.sum_to_size(theta_F.shape), None, None


def jumprelu(h_BF: Tensor, theta_F: Tensor, bandwidth: float, ste_reaches_h: bool = False) -> Tensor:
    """`h * 1[h > theta]` with the straight-through estimator; `ste_reaches_h` lets its gradient reach h as well."""
    result = _JumpReLU.apply(h_BF, theta_F, bandwidth, ste_reaches_h)
    assert isinstance(result, Tensor)
    return result


def heaviside(h_BF: Tensor, theta_F: Tensor, bandwidth: float, ste_reaches_h: bool = False) -> Tensor:
    """`1[h > theta]` with the straight-through estimator: what the L0 penalties sum."""
    result = _Heaviside.apply(h_BF, theta_F, bandwidth, ste_reaches_h)
    assert isinstance(result, Tensor)
    return result


def keep_reaching(h: Tensor, threshold: Tensor) -> Tensor:
    """Keep the positive entries that reach the threshold, gradient through the kept ones alone."""
    return h * ((h >= threshold) & (h > 0))


def topk_threshold(h_BF: Tensor, k: int, comm: Collectives = SINGLE) -> Tensor:
    """[B, 1]: each token's k-th largest pre-activation, over all shards of its features."""
    return comm.row_threshold(h_BF.detach(), k)


def batchtopk_threshold(h: list[Tensor], count: int, comm: Collectives = SINGLE) -> Tensor:
    """[]: the count-th largest of all entries, over all shards and data ranks; 0 where fewer are positive."""
    parts = [candidates(h_BF, count) for h_BF in h]
    return comm.top_threshold(torch.cat(parts), count).clamp_min(0)


def candidates(h_BF: Tensor, count: int) -> Tensor:
    """The largest `count` entries (or all there are): enough to find any threshold over a larger set exactly."""
    flat = h_BF.detach().flatten()
    return flat.topk(min(count, flat.numel()), sorted=False).values
