"""Each feature rank's active entries, handed to all of them: what `parallel.exchange=actives` moves."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..parallel import Collectives
from ..transcoder import all_gather_features
from .entries import Entries
from .products import make_entries, sort_by


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
    counts = comm.all_gather_features(torch.tensor([len(a) for a in values])).tolist()
    longest = max(map(sum, counts))

    def everyones(own: list[Tensor]) -> list[list[Tensor]]:
        """Per rank and layer; sent with equal lengths."""
        flat = torch.cat(own)
        gathered = all_gather_features(F.pad(flat, (0, longest - len(flat))), comm)
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
