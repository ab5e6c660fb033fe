"""One scalar per layer and site, so that E|x|^2 = D: from the store's statistics over all its rows."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...data.errors import UserError


class SiteStatistics(Protocol):
    """What a store knows about its rows."""

    @property
    def mean(self) -> dict[str, Tensor]: ...
    @property
    def mean_square(self) -> dict[str, Tensor]: ...


class Normalisation(NamedTuple):
    """Kept in the checkpoint, folded into the weights on export, never estimated again."""

    in_scale: Tensor
    """[L]: x is multiplied by it."""
    out_scale: Tensor
    """[L]: y is multiplied by it."""
    y_mean: Tensor
    """[L, D]: the mean of the normalised target, where b_dec starts."""

    def x(self, raw: Tensor) -> Tensor:
        """[B, L, D] raw, any dtype -> normalised float32."""
        return raw.to(self.in_scale.dtype) * self.in_scale[:, None]

    def y(self, raw: Tensor) -> Tensor:
        return raw.to(self.out_scale.dtype) * self.out_scale[:, None]

    def to(self, device: torch.device | str) -> "Normalisation":
        return Normalisation(*(tensor.to(device) for tensor in self))


def scale_for(mean_square: Tensor, d_model: int) -> Tensor:
    """[L]: sqrt(D / E|x|^2)."""
    return (d_model / mean_square.double()).sqrt().float()


def normalisation_of(
    statistics: SiteStatistics, read: str, rows: list[int], d_model: int, read_square: Tensor | None = None
) -> Normalisation:
    """From the statistics of `read` and `mlp_out`; `rows` picks the covered layers. `read_square` [L] is the
    mean square of a site that is formed, not stored."""
    squares = {"mlp_out": statistics.mean_square["mlp_out"][rows]}
    squares[read] = statistics.mean_square[read][rows] if read_square is None else read_square
    for site, square in squares.items():
        if not bool(torch.isfinite(square).all() and (square > 0).all()):
            raise UserError(f"the store's {site} holds layers that are all zero or not finite; cache it again")
    in_scale, out_scale = scale_for(squares[read], d_model), scale_for(squares["mlp_out"], d_model)
    return Normalisation(in_scale, out_scale, statistics.mean["mlp_out"][rows].float() * out_scale[:, None])
