"""Triton kernels of the sparse step, for CUDA. Import this module only where Triton is installed.

Both directions work on compressed lists, each output block owned by one program: sums run in one order, without
atomics, and give the same bits every time. Columns (reach * D of them, one decoder row) are split into chunks over the
second axis of the grid; sums are kept in float32 (float64 for float64), whatever the operands are stored in.

    gather_sum        y_r = sum a_j W_dec_f(j)     decode;   d W_enc_f = sum d h_j x_t(j)     encoder's gradient
    decode_backward   d a_j and d W_dec_f together: a program holds one chunk of W_dec_f, walks f's entries once, and
                      leaves a partial dot product per entry and chunk; the chunks are added up afterwards
"""

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

# Columns a program holds: enough for wide loads, few enough that three blocks stay in registers.
_MOST_COLUMNS = 2048


@triton.jit
def _gather_sum(
    rows, row_stride, index, pointer, weights, out, out_stride, columns,
    ADD: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros([BLOCK], SUM)
    j = tl.load(pointer + s)
    end = tl.load(pointer + s + 1)
    while j < end:
        weight = tl.load(weights + j).to(SUM)
        row = rows + tl.load(index + j) * row_stride
        total += weight * tl.load(row + column, mask=inside, other=0.0).to(SUM)
        j += 1
    place = out + s * out_stride + column
    if ADD:
        total += tl.load(place, mask=inside, other=0.0).to(SUM)
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _decode_backward(
    grad, grad_stride, weight, row_of, order, pointer, values, scale, grad_weight, partial, entries, columns,
    SCALED: tl.constexpr, ADD: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    f = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1).to(tl.int64)
    column = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    w = tl.load(weight + f * columns + column, mask=inside, other=0.0).to(SUM)
    total = tl.zeros([BLOCK], SUM)
    if SCALED:
        total += tl.load(scale + f).to(SUM) * w
    j = tl.load(pointer + f)
    end = tl.load(pointer + f + 1)
    while j < end:
        entry = tl.load(order + j)
        g = tl.load(grad + tl.load(row_of + j) * grad_stride + column, mask=inside, other=0.0).to(SUM)
        total += tl.load(values + entry).to(SUM) * g
        tl.store(partial + chunk * entries + entry, tl.sum(g * w, axis=0))
        j += 1
    place = grad_weight + f * columns + column
    if ADD:
        total += tl.load(place, mask=inside, other=0.0).to(SUM)
    tl.store(place, total.to(grad_weight.dtype.element_ty), mask=inside)


def _sum_type(out: Tensor) -> tuple[torch.dtype, tl.dtype]:
    return (torch.float64, tl.float64) if out.dtype == torch.float64 else (torch.float32, tl.float32)


def _blocks(columns: int) -> tuple[int, int, int]:
    """Columns a program holds, how many programs a row takes, and warps for each."""
    block = min(_MOST_COLUMNS, 1 << (columns - 1).bit_length())
    return block, -(-columns // block), 8 if block >= 1024 else 4


def gather_sum(rows: Tensor, index: Tensor, pointer: Tensor, weights: Tensor, out: Tensor, add: bool = False) -> None:
    """out[s] (+)= sum over list s of weights[j] * rows[index[j]]."""
    n_lists, columns = out.shape
    block, chunks, warps = _blocks(columns)
    _gather_sum[(n_lists, chunks)](
        rows, rows.stride(0), index, pointer, weights, out, out.stride(0), columns,
        ADD=add, SUM=_sum_type(out)[1], BLOCK=block, num_warps=warps,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip


def decode_backward(
    grad: Tensor, weight: Tensor, row_of: Tensor, order: Tensor, pointer: Tensor, values: Tensor,
    scale: Tensor | None, out: Tensor, add: bool = False,
) -> Tensor:  # fmt: skip
    """d values [N]; d weight, with scale[f] * weight[f], into `out` or added there."""
    n_features, columns = weight.shape
    block, chunks, warps = _blocks(columns)
    kept, kept_in_triton = _sum_type(out)
    partial = torch.empty(chunks, values.numel(), dtype=kept, device=values.device)
    _decode_backward[(n_features, chunks)](
        grad, grad.stride(0), weight, row_of, order, pointer, values, weight if scale is None else scale, out,
        partial, values.numel(), columns, SCALED=scale is not None, ADD=add,
        SUM=kept_in_triton, BLOCK=block, num_warps=warps,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return partial.sum(0)
