"""Products that touch active entries only, on three backends: C++ on the CPU, Triton on CUDA, plain PyTorch anywhere.

`Entries` are listed by token and by feature, so that both directions of every product are sums over consecutive list
items, each output row owned by one worker: no atomics, and the same bits every time.
"""

import importlib.util
import os
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu as native
from .entries import Entries

BACKENDS = ("native", "triton", "torch")

# Gathered rows held at once by the plain PyTorch value gradient, in numbers.
_CHUNK = 1 << 22


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def backend(tensor: Tensor) -> str:
    """What works on tensors like this one: native, triton or torch; `CROSSLACE_KERNELS` takes another."""
    asked = os.environ.get("CROSSLACE_KERNELS")
    if asked in BACKENDS:
        return asked
    if tensor.is_cuda and _has_triton():
        return "triton"
    return "native" if native.usable(tensor) else "torch"


def make_entries(rows: Tensor, features: Tensor, n_rows: int, n_features: int, absent: Tensor | None = None) -> Entries:
    """Entries from pairs listed by row, some of them perhaps `absent` (bool [N]). No host synchronisation."""
    row_order, listed, keys, n_keys = None, rows, features, n_features
    if absent is not None:
        # Left where they are, empty places would make the list of one row and of one feature very long.
        row_order = absent.to(torch.uint8).argsort(stable=True).to(rows.dtype)
        listed = rows.masked_fill(absent, n_rows)[row_order]
        keys, n_keys = features.masked_fill(absent, n_features), n_features + 1
    row_pointer = _begins(listed, n_rows)
    feature_pointer, order, ordered_rows = sort_by(keys, rows, n_keys)
    return Entries(rows, features, row_pointer, order, ordered_rows, feature_pointer[: n_features + 1], row_order)


def sort_by(keys: Tensor, others: Tensor, n_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs [N] in the order of their keys, equal ones as they were: where each key begins [n_keys + 1], the order [N],
    and the others in that order [N]."""
    if backend(keys) == "native":
        order, ordered = torch.empty_like(keys), torch.empty_like(keys)
        pointer = torch.zeros(n_keys + 1, dtype=torch.int64)
        native.call("by_feature", keys, others, len(keys), n_keys, pointer, order, ordered)
        return pointer, order, ordered
    ordered_keys, order = keys.sort(stable=True)
    return _begins(ordered_keys, n_keys), order.to(keys.dtype), others[order]


def _begins(rising: Tensor, n: int) -> Tensor:
    """[n + 1]: where in a rising list each of the numbers 0 .. n begins."""
    numbers = torch.arange(n + 1, dtype=rising.dtype, device=rising.device)
    return torch.searchsorted(rising, numbers, out_int32=rising.dtype == torch.int32)


def gather_sum(rows: Tensor, index: Tensor, pointer: Tensor, weights: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """out[s] (+)= sum over list s of weights[j] * rows[index[j]]. rows [*, C] and out [S, C] may be column slices."""
    kind = backend(out)
    if kind == "native" and rows.dtype == out.dtype:
        weights = weights.contiguous()
        native.call("gather_sum", rows, rows.stride(0), index, pointer, weights, *out.shape, out, out.stride(0), add)
    elif kind == "triton":
        from . import triton_kernels as kernels  # optional: Triton comes with PyTorch's CUDA builds

        kernels.gather_sum(rows, index, pointer, weights, out, add)
    else:
        weights, table = weights.to(out.dtype), rows.to(out.dtype).contiguous()
        total = F.embedding_bag(index, table, pointer, mode="sum", per_sample_weights=weights, include_last_offset=True)
        out.add_(total) if add else out.copy_(total)
    return out


def gather_dot(left: Tensor, right: Tensor, left_index: Tensor, right_index: Tensor) -> Tensor:
    """[N]: left[left_index[j]] . right[right_index[j]], a chunk of gathered rows at a time."""
    chunk = max(1, _CHUNK // max(1, left.shape[1]))
    parts = [torch.linalg.vecdot(left[i], right[j]) for i, j in zip(left_index.split(chunk), right_index.split(chunk))]
    return torch.cat(parts) if parts else left.new_empty(0)


def row_norms(rows: Tensor) -> Tensor:
    """[F]: the 2-norm of every row, in float32 or better."""
    if backend(rows) == "native":
        out = torch.empty_like(rows[:, 0])
        native.call("row_norms", rows, *rows.shape, out)
        return out
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))


def entries_above(h_BF: Tensor, threshold: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, features and values of all h > threshold (a number, [F], or [B, 1]), by token.

    How many there are is read back from the device: on the CPU that costs nothing.
    """
    if backend(h_BF) != "native":
        tokens, features = (h_BF > threshold).nonzero(as_tuple=True)
        return tokens, features, h_BF[tokens, features]
    limits: tuple[Tensor | float | None, ...] = (None, None, float(threshold) if is_number(threshold) else 0.0)
    if isinstance(threshold, Tensor) and threshold.ndim:
        shaped = threshold.to(h_BF.dtype).contiguous()
        limits = (shaped, None, 0.0) if threshold.ndim == 1 else (None, shaped, 0.0)
    pointer = torch.zeros(h_BF.shape[0] + 1, dtype=torch.int64)
    native.call("count_above", h_BF, *limits, *h_BF.shape, pointer[1:])
    pointer = pointer.cumsum(0)
    n = int(pointer[-1])
    tokens, features = torch.empty(2, n, dtype=torch.int64)
    values = h_BF.new_empty(n)
    native.call("fill_above", h_BF, *limits, *h_BF.shape, pointer, tokens, features, values)
    return tokens, features, values


def is_number(threshold: Tensor | float) -> bool:
    """Whether one threshold holds for everything."""
    return not isinstance(threshold, Tensor) or threshold.ndim == 0
