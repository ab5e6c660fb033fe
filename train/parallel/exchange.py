"""The second exchange between feature ranks: active values and indices, with decoders cut along their width.

    encoders    rank f holds features f F/m ... (f + 1) F/m of each layer, and finds their active entries
    decoders    rank f holds columns f D/m ... (f + 1) D/m of every feature's decoder, of b_dec and of the skip

Forward, each rank hands its active entries to all; each decodes all of them into its slice of y^, [B, L, D/m], and the
losses of the slices are added up. Backward, d a of an entry is the sum of what every slice says of it, and goes back to
the rank that the entry came from. The norm of a whole decoder row is put together from the slices' norms.

Two collectives do it all, each the other's transpose: `gather_parts` and `sum_parts`. Where decoders are cut by feature
instead (`comm.slices == 1`: y^ is summed over ranks), each function here returns what it was given.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sparse.entries import Entries, make_entries, sort_by
from ..transcoder.transcoder import Transcoder
from .collectives import SINGLE, Collectives

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


def gather_parts(x: Tensor, comm: Collectives) -> Tensor:
    """[...] -> [m, ...]: `Collectives.gather_parts`, with gradient."""
    gathered = _Collective.apply(x, comm.gather_parts, comm.sum_parts)
    assert isinstance(gathered, Tensor)
    return gathered


def sum_parts(x: Tensor, comm: Collectives) -> Tensor:
    """[m, ...] -> [...]: `Collectives.sum_parts`, with gradient."""
    summed = _Collective.apply(x, comm.sum_parts, comm.gather_parts)
    assert isinstance(summed, Tensor)
    return summed


# Slices of y^ and of its losses.


def add_written(y: Tensor, comm: Collectives) -> Tensor:
    """What all features write, [..., L, D], from what each rank's wrote; or this rank's slice, whole as it is."""
    return y if comm.slices > 1 else comm.sum(y)


def own_slice(y: Tensor, comm: Collectives) -> Tensor:
    """[..., D] -> the columns that this rank's decoders write."""
    width = y.shape[-1] // comm.slices
    return y if comm.slices == 1 else y.narrow(-1, comm.feature_rank * width, width)


def over_slices(term: Tensor, comm: Collectives) -> Tensor:
    """A mean over D, from the means over each rank's slice; the gradient goes to this rank's own."""
    return term if comm.slices == 1 else comm.sum(term) / comm.slices


def all_slices(y: Tensor, comm: Collectives) -> Tensor:
    """[..., D/m] -> [..., D], without gradient: what is looked at, not trained on."""
    return y if comm.slices == 1 else comm.gather_features(y, dim=-1)


# Norms of whole decoder rows.


def decoder_norms(transcoder: Transcoder, comm: Collectives = SINGLE) -> list[Tensor]:
    """Per layer [F/m]: the norms of this rank's features, with gradient."""
    return whole_norms([transcoder.decoder_norms(l) for l in range(transcoder.n_layers)], comm)


def whole_norms(norms: Sequence[Tensor], comm: Collectives) -> list[Tensor]:
    """[F] norms of a slice of every row, a layer each -> [F/m] norms of this rank's features' whole rows."""
    if comm.slices == 1:
        return list(norms)
    squares = torch.cat([norm.square().unflatten(0, (comm.slices, -1)) for norm in norms], dim=1)
    total = sum_parts(squares, comm)
    # A row of zeros has no direction to grow in: the clamp gives it the gradient zero.
    whole = total.clamp_min(torch.finfo(total.dtype).tiny).sqrt()
    return list(whole.split([len(norm) // comm.slices for norm in norms]))


# Activations.


def share_dense(acts: Iterable[Tensor], comm: Collectives) -> Iterator[Tensor]:
    """[B, F/m] a layer -> [B, F], with gradient: correct, and much to move."""
    for acts_BF in acts:
        yield acts_BF if comm.slices == 1 else gather_parts(acts_BF, comm).transpose(0, 1).flatten(1)


def share_entries(
    lists: list[Entries], values: list[Tensor], empty: list[Tensor | None], comm: Collectives
) -> tuple[list[Entries], list[Tensor]]:
    """Every rank's entries of all layers, with gradient to their values: one exchange of places, one of values.

    `empty` [N] a layer says which places of a list hold nothing; those are not sent.
    """
    if comm.slices == 1:
        return lists, values
    sizes = [entries.feature_pointer.numel() - 1 for entries in lists]
    n_rows, ranks = lists[0].row_pointer.numel() - 1, comm.slices
    pairs = [(entries.rows, entries.features) for entries in lists]
    for l, mask in enumerate(empty):
        if mask is not None:
            pairs[l] = (pairs[l][0][~mask], pairs[l][1][~mask])
            values[l] = values[l][~mask]

    # A place as one number, of four bytes where that is enough.
    number = torch.int32 if n_rows * max(sizes) < 2**31 else torch.int64
    places = [(rows * size + features).to(number) for (rows, features), size in zip(pairs, sizes, strict=True)]
    counts = comm.gather_parts(torch.tensor([len(a) for a in values])).tolist()
    longest = max(map(sum, counts))

    def everyones(own: list[Tensor]) -> list[list[Tensor]]:
        """Per rank and layer; sent with equal lengths."""
        flat = torch.cat(own)
        gathered = gather_parts(F.pad(flat, (0, longest - len(flat))), comm)
        return [list(part.split([*n, longest - sum(n)])) for part, n in zip(gathered.unbind(), counts, strict=True)]

    all_places, all_values = everyones(places), everyones(values)
    shared, written = [], []
    for l, size in enumerate(sizes):
        listed = torch.cat([all_places[rank][l] for rank in range(ranks)]).long()
        firsts = torch.tensor([rank * size for rank in range(ranks)], device=listed.device)
        first = firsts.repeat_interleave(torch.tensor([n[l] for n in counts], device=listed.device))
        rows, features = listed // size, listed % size + first
        _, order, features = sort_by(rows, features, n_rows)
        shared.append(make_entries(rows[order], features, n_rows, size * ranks))
        written.append(torch.cat([all_values[rank][l] for rank in range(ranks)]).index_select(0, order))
    return shared, written
