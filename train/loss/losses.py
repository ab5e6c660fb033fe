"""The terms of the loss, pure functions named as in the formulas. Each is summed over features and averaged
over tokens, so that no coefficient depends on the batch size.

Entries (`a`, `h`, and their feature's `n`, `theta`) may be dense [B, F] against [F], or the flat list of the entries
that matter [N] against [N]: each function is elementwise until its sum, and takes the number of tokens.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..transcoder import heaviside


class _MeanSquare(torch.autograd.Function):
    """[L]: the weighted mean square of a - b [B, L, D]. One tensor of that size is kept and one made of it, where
    autograd would keep and make five: at many layers they cost as much as the products."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, weight_BL: Tensor | None) -> Tensor:
        error = a - b
        ctx.save_for_backward(error, weight_BL)
        square_BL = torch.linalg.vector_norm(error, dim=2).square()
        return (square_BL if weight_BL is None else square_BL * weight_BL).mean(0) / error.shape[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_L: Tensor) -> tuple[Tensor, None, None]:
        error, weight_BL = ctx.saved_tensors
        factor = 2 * grad_L / (error.shape[0] * error.shape[2])
        factor = factor if weight_BL is None else factor * weight_BL
        return error * factor[..., None], None, None


def reconstruction(y_hat: Tensor, y: Tensor, weight_BL: Tensor | None = None) -> Tensor:
    """[L]: |y^_l - y_l|^2 / D, mean over tokens; y [B, L, D] normalised so that E|y_l|^2 = D, a constant."""
    return _MeanSquare.apply(y_hat, y, weight_BL)  # type: ignore[return-value]


def row_losses(y_hat: Tensor, y: Tensor) -> Tensor:
    """[B, L]: |y^_l - y_l|^2 / D of each row."""
    return torch.linalg.vector_norm(y_hat.detach() - y, dim=2).square() / y.shape[2]


class RowBounds(NamedTuple):
    """Beyond what a row does not count in full: [L] each."""

    cap: Tensor
    """The most that a row's loss counts."""
    outsize: Tensor
    """A row with a larger mean square of y stands apart from all others."""
    large: Tensor
    """As if of this mean square it counts then: that of a large row among the others."""


def alike(size: Tensor, bounds: RowBounds) -> Tensor:
    """What makes an outsize row weigh as a large row of the usual kind; 1 for the others."""
    return torch.where(size > bounds.outsize, bounds.large / size, 1.0)


def row_weights(row_loss: Tensor, size: Tensor, bounds: RowBounds) -> Tensor:
    """[B, L]: so that the few rows that no average should see, and that were not told as sinks, do not rule the step.
    An outsize row counts by its error relative to its size, and a row whose loss is then still above the cap counts as
    one at the cap, and pulls as one. 1 for the others, which changes no bit of them."""
    weight = alike(size, bounds)
    return weight * (bounds.cap / (row_loss * weight)).clamp(max=1.0)


def tanh_penalty(a: Tensor, n: Tensor, c: float, tokens: int) -> Tensor:
    """sum_i tanh(c n_i a_i): counts features softly, n_i the norm of the whole decoder row, with gradient."""
    return torch.tanh(c * n * a).sum() / tokens


def l1_penalty(a: Tensor, n: Tensor, tokens: int) -> Tensor:
    """sum_i n_i a_i."""
    return (n * a).sum() / tokens


def l0_penalty(h: Tensor, theta: Tensor, bandwidth: float, ste_reaches_h: bool, tokens: int) -> Tensor:
    """sum_i 1[h_i > theta_i], with the step's straight-through estimator."""
    return heaviside(h, theta, bandwidth, ste_reaches_h).sum() / tokens


def quadratic_target(l0: Tensor, target: Tensor, around: Tensor | None = None) -> Tensor:
    """[L]: (L0_l / target_l - 1)^2. Where `l0` [L] is a part of the batch, `around` is the whole batch's L0: the value
    and the gradient's factor are taken there, so that the parts' mean equals the whole."""
    whole = l0.detach() if around is None else around
    offset = whole / target - 1
    return offset.square() + 2 * offset / target * (l0 - l0.detach())


def preactivation_penalty(h: Tensor, theta: Tensor, n: Tensor, tokens: int, over: Tensor | None = None) -> Tensor:
    """sum_i relu(theta_i - h_i) n_i, over the features in the mask `over` [F] or over all: it pulls the silent up."""
    shortfall = (theta - h).relu() * n
    return (shortfall if over is None else shortfall * over).sum() / tokens


def auxiliary(y_aux: Tensor, y_hat: Tensor, y: Tensor) -> Tensor:
    """[L]: |y_aux - (y - y^)|^2 / D: what dead features alone (no b_dec) make of the error, taken as a constant."""
    return _MeanSquare.apply(y_aux, (y - y_hat).detach(), None)  # type: ignore[return-value]
