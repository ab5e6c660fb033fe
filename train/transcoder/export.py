"""One ordinary transcoder folder from the parts that feature ranks hold, without any rank holding the whole.

A tensor that is cut along its first dimension lies in the file as one stretch after another, and each rank writes its
own. Of one that is cut along another, rows are put together a few at a time, and the ranks take turns in writing them.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..parallel import Collectives
from ..settings import TranscoderSettings
from .partition import cut_dim
from .stored_rows import DTYPES
from .transcoder import DESCRIPTION_FILE, WEIGHTS_FILE, Transcoder

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_WRITTEN_AT_ONCE = 64 * 2**20


def save_whole(
    part: Transcoder, folder: Path, meta: dict[str, Any], settings: TranscoderSettings, comm: Collectives
) -> Path:
    """Write the transcoder of which `part` is this rank's; `settings` are the whole one's."""
    if comm.feature_ranks == 1:
        if comm.is_main:
            part.save(folder, meta)
        comm.barrier()
        return folder
    sizes = replace(part.settings, features=settings.features, features_per_layer=settings.features_per_layer)
    whole = Transcoder(
        sizes, part.d_model, part.layers, seed=None, device="meta", dtype=part.dtype, meta=part.meta | meta
    )
    header, places, total = layout(dict(whole.state_dict()))
    aside = folder / f".{WEIGHTS_FILE}.writing"
    if comm.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(header)
        os.truncate(aside, total)
    comm.barrier()
    if comm.data_rank == 0:
        with aside.open("r+b") as file:
            for name, tensor in part.state_dict().items():
                for offset, stretch in _stretches(tensor.detach(), cut_dim(name, comm), comm):
                    file.seek(places[name] + offset)
                    file.write(stretch.contiguous().cpu().view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
    comm.barrier()
    if comm.is_main:
        aside.replace(folder / WEIGHTS_FILE)
        whole.describe(folder / DESCRIPTION_FILE)
    comm.barrier()
    return folder


def _stretches(own: Tensor, dim: int | None, comm: Collectives) -> Iterator[tuple[int, Tensor]]:
    """What this rank writes of a tensor, each with its place in the whole, in bytes."""
    if dim is None:
        if comm.is_main:
            yield 0, own
    elif dim == 0:
        yield comm.feature_rank * own.nbytes, own
    else:
        row = own[0].nbytes * comm.feature_ranks
        for turn, rows in enumerate(own.split(rows_at_once := max(1, _WRITTEN_AT_ONCE // row))):
            together = comm.cat_features(rows, dim)
            if turn % comm.feature_ranks == comm.feature_rank:
                yield turn * rows_at_once * row, together


def layout(tensors: dict[str, Tensor]) -> tuple[bytes, dict[str, int], int]:
    """A safetensors file's header, where each tensor begins in it, and its size."""
    entries, offset = {}, 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return (
        header,
        {name: len(header) + entry["data_offsets"][0] for name, entry in entries.items()},
        len(header) + offset,
    )
