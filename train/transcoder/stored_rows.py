"""A weight with one row a feature that stays in its file: rows are read when they are asked for.

A cross-layer transcoder's decoders are most of it, and a prompt uses few of their rows. Left in the file they take
neither memory nor an accelerator's, and what is read is exactly what is used: mapping the file would bring in the
rows around each one as well.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ...data.errors import UserError
from ...data.store import read_fully
from .activations import SparseActs

# By their names in a safetensors file.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class StoredRows(nn.Module):
    """Stands where a parameter [F, ...] would, as far as reading goes: `rows[index]` gives a tensor, on the device and
    in the dtype that the module was moved to."""

    like: Tensor

    def __init__(self, path: Path, name: str):
        super().__init__()
        self.file = path.open("rb", buffering=0)  # stays this file, though another takes its name
        header = int.from_bytes(self.file.read(8), "little")
        entry = json.loads(self.file.read(header))[name]
        self.path, self.shape = path, tuple(entry["shape"])
        self.stored, self.start = DTYPES[entry["dtype"]], 8 + header + entry["data_offsets"][0]
        self.register_buffer("like", torch.empty(0, dtype=self.stored), persistent=False)

    def __getitem__(self, key: Any) -> Tensor:
        """Like a tensor's: the first index, whatever its kind, says which rows are read."""
        rows, *others = key if isinstance(key, tuple) else (key,)
        wanted = torch.arange(self.shape[0])[rows.cpu() if isinstance(rows, Tensor) else rows]
        ids, place = wanted.unique(return_inverse=True)
        found = self._read(ids)[place].to(self.like)
        return found[(slice(None),) * wanted.dim() + tuple(others)]

    def _read(self, ids: Tensor) -> Tensor:
        """Rows `ids`, which rise; neighbours in one go."""
        if len(ids) == 0:
            return torch.empty(0, *self.shape[1:], dtype=self.stored)
        width = math.prod(self.shape[1:]) * self.stored.itemsize
        memory = np.empty(len(ids) * width, dtype=np.uint8)
        begin = 0
        try:
            for end in [*((ids.diff() != 1).nonzero().squeeze(1) + 1).tolist(), len(ids)]:
                place = self.start + int(ids[begin]) * width
                read_fully(self.file.fileno(), str(self.path), place, [memory[begin * width : end * width]])
                begin = end
        except EOFError as error:
            raise UserError(f"{self.path} is shorter than it was when it was opened; write it again") from error
        return torch.from_numpy(memory).view(self.stored).view(-1, *self.shape[1:])

    def used_by(self, acts: Tensor | SparseActs) -> tuple[Tensor, Tensor | SparseActs]:
        """The rows of features that fire, and activations [B, F] over them alone."""
        if isinstance(acts, SparseActs):
            used, place = acts.indices.unique(return_inverse=True)
            return self[used], acts._replace(indices=place)
        used = (acts != 0).flatten(0, -2).any(0).nonzero().squeeze(1)
        return self[used], acts[..., used]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix.removesuffix(".")] = self[:]


def read_weights(path: Path, device: torch.device | str, leave: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped from it on a CPU; without those whose names begin with `leave`."""
    with safe_open(str(path), framework="pt", device=str(device)) as file:
        names = list(file.keys())
        return {name: file.get_tensor(name) for name in names if leave is None or not name.startswith(leave)}
