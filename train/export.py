"""One ordinary transcoder folder from the parts that feature ranks hold, without any rank holding the whole.

A tensor that is cut along its features lies in the file as one stretch after another, so each rank writes its own.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .collectives import Collectives
from .partition import is_sharded
from .transcoder import DESCRIPTION_FILE, WEIGHTS_FILE, Transcoder, TranscoderSettings

_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16"}


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
                if is_sharded(name) or comm.is_main:
                    file.seek(places[name] + comm.feature_rank * tensor.nbytes * is_sharded(name))
                    file.write(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
    comm.barrier()
    if comm.is_main:
        aside.replace(folder / WEIGHTS_FILE)
        whole.describe(folder / DESCRIPTION_FILE)
    comm.barrier()
    return folder


def layout(tensors: dict[str, Tensor]) -> tuple[bytes, dict[str, int], int]:
    """A safetensors file's header, where each tensor begins in it, and its size."""
    entries, offset = {}, 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
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
