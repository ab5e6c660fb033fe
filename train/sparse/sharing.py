"""Each feature rank's active entries, handed to all of them: what `parallel.exchange=actives` moves."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..parallel import Collectives
from ..transcoder import all_gather_features
from .active_set import read_freely
from .entries import Entries
from .products import make_entries, sort_by


def share_entries(
    lists: list[Entries], values: list[Tensor], empty: list[Tensor | None], comm: Collectives, alike: bool
) -> tuple[list[Entries], list[Tensor]]:
    """Every rank's entries of all layers, with gradient to their values: one exchange of places, one of values.

    `empty` [N] a layer says which places of a list hold nothing. Lists that are `alike`, equally long on all ranks,
    travel as they are, and the host waits for nothing; else they are first made as long as the longest.
    """
    if comm.slices == 1:
        return lists, values
    sizes = [entries.feature_pointer.numel() - 1 for entries in lists]
    n_rows, ranks = lists[0].row_pointer.numel() - 1, comm.slices
    lengths = [len(own) for own in values]
    if not alike:
        lengths = comm.max_all(torch.tensor(lengths)).tolist()

    # A place as one number, of four bytes where that is enough; -1 for none.
    number = torch.int32 if n_rows * max(sizes) < 2**31 else torch.int64
    places = []
    for entries, mask, size in zip(lists, empty, sizes, strict=True):
        own = (entries.rows.long() * size + entries.features).to(number)
        places.append(own if mask is None else own.masked_fill(mask, -1))

    def everyones(own: list[Tensor], nothing: float) -> list[Tensor]:
        """Per layer, [ranks * length]."""
        padded = [F.pad(x, (0, n - len(x)), value=nothing) for x, n in zip(own, lengths, strict=True)]
        return [part.flatten() for part in all_gather_features(torch.cat(padded), comm).split(lengths, dim=1)]

    shared, written = [], []
    for listed, acts, size in zip(everyones(places, -1), everyones(values, 0.0), sizes, strict=True):
        first = torch.arange(ranks, device=listed.device).repeat_interleave(len(listed) // ranks) * size
        absent = listed < 0
        if read_freely(listed):
            kept = ~absent
            listed, acts, first, absent = listed[kept], acts[kept], first[kept], None
        listed = listed.long()
        rows, features = listed // size, listed % size + first
        if absent is not None:
            rows = rows.masked_fill(absent, n_rows)  # last
        _, order, features = sort_by(rows, features, n_rows + 1)
        absent = None if absent is None else absent[order]
        shared.append(make_entries(rows[order].clamp_max(n_rows - 1), features, n_rows, size * ranks, absent))
        written.append(acts.index_select(0, order))
    return shared, written
