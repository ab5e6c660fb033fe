"""Decoders that are cut along their width, for the second exchange between feature ranks: active values and indices.

    encoders    rank f holds features f F/m ... (f + 1) F/m of each layer, and finds their active entries
    decoders    rank f holds columns f D/m ... (f + 1) D/m of every feature's decoder, of b_dec and of the skip

Forward, each rank hands its active entries to all; each decodes all of them into its slice of y^, [B, L, D/m], and the
losses of the slices are added up. Backward, d a of an entry is the sum of what every slice says of it, and goes back to
the rank that the entry came from. The norm of a whole decoder row is put together from the slices' norms.

Two collectives do it all, each the other's transpose: `all_gather_features` and `reduce_scatter_features`. Where
decoders are cut by feature instead (`comm.slices == 1`: y^ is summed over ranks), each function here returns what it
was given. The exchange of listed entries stands in train/sparse/sharing.py.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..parallel import SINGLE, Collectives
from .transcoder import Transcoder

Exchange = Callable[[Tensor], Tensor]


class _Collective(torch.autograd.Function):
    """One collective forward, its transpose backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Exchange, back: Exchange) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grads[0]), None, None


def all_gather_features(x: Tensor, comm: Collectives) -> Tensor:
    """[...] -> [m, ...]: `Collectives.all_gather_features`, with gradient."""
    gathered = _Collective.apply(x, comm.all_gather_features, comm.reduce_scatter_features)
    assert isinstance(gathered, Tensor)
    return gathered


def reduce_scatter_features(x: Tensor, comm: Collectives) -> Tensor:
    """[m, ...] -> [...]: `Collectives.reduce_scatter_features`, with gradient."""
    summed = _Collective.apply(x, comm.reduce_scatter_features, comm.all_gather_features)
    assert isinstance(summed, Tensor)
    return summed


# Slices of y^ and of its losses.


def add_written(y: Tensor, comm: Collectives) -> Tensor:
    """What all features write, [..., L, D], from what each rank's wrote; or this rank's slice, whole as it is."""
    return y if comm.slices > 1 else comm.all_reduce_features(y)


def own_slice(y: Tensor, comm: Collectives) -> Tensor:
    """[..., D] -> the columns that this rank's decoders write."""
    width = y.shape[-1] // comm.slices
    return y if comm.slices == 1 else y.narrow(-1, comm.feature_rank * width, width)


def over_slices(term: Tensor, comm: Collectives) -> Tensor:
    """A mean over D, from the means over each rank's slice; the gradient goes to this rank's own."""
    return term if comm.slices == 1 else comm.all_reduce_features(term) / comm.slices


def all_slices(y: Tensor, comm: Collectives) -> Tensor:
    """[..., D/m] -> [..., D], without gradient: what is looked at, not trained on."""
    return y if comm.slices == 1 else comm.cat_features(y, dim=-1)


# Norms of whole decoder rows.


def decoder_norms(transcoder: Transcoder, comm: Collectives = SINGLE) -> list[Tensor]:
    """Per layer [F/m]: the norms of this rank's features, with gradient."""
    return whole_norms([transcoder.decoder_norms(l) for l in range(transcoder.n_layers)], comm)


def whole_norms(norms: Sequence[Tensor], comm: Collectives) -> list[Tensor]:
    """[F] norms of a slice of every row, a layer each -> [F/m] norms of this rank's features' whole rows."""
    if comm.slices == 1:
        return list(norms)
    squares = torch.cat([norm.square().unflatten(0, (comm.slices, -1)) for norm in norms], dim=1)
    total = reduce_scatter_features(squares, comm)
    # The norm has no slope at a row of zeros: the clamp gives such a row the gradient zero.
    whole = total.clamp_min(torch.finfo(total.dtype).tiny).sqrt()
    return list(whole.split([len(norm) // comm.slices for norm in norms]))


# Activations.


def share_dense(acts: Iterable[Tensor], comm: Collectives) -> Iterator[Tensor]:
    """[B, F/m] a layer -> [B, F], with gradient: correct, and much to move."""
    for acts_BF in acts:
        yield acts_BF if comm.slices == 1 else all_gather_features(acts_BF, comm).transpose(0, 1).flatten(1)
