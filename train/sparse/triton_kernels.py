"""Triton kernels of the sparse step, for CUDA. Import this module only where Triton is installed.

Both directions work on compressed lists, each output block owned by one program: sums run in one order, without
atomics, and give the same bits every time. Columns (reach * D of them, one decoder row) are split into chunks over the
second axis of the grid; sums are kept in float32 (float64 for float64), whatever the operands are stored in.

    gather_sum        y_r = sum a_j W_dec_f(j)     decode
    decode_backward   d a_j and d W_dec_f together: a program holds one chunk of W_dec_f, walks f's entries once, and
                      leaves a partial dot product per entry and chunk; the chunks are added up afterwards
    row_gradient_norms  d W_f in registers, its squares kept
    adam_rows         d W_f in registers once more, and Adam on that chunk: no gradient is ever in memory

Offsets that can pass 2^31 (rows times columns, chunks times entries) are 64-bit; columns within a row are 32-bit.
"""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from .entries import RowGradient

# Columns a program holds: enough for wide loads, few enough that its blocks (a row, its gradient, two moments) stay in
# registers: 4 to 8 numbers of each for every thread.
_MOST_COLUMNS = 1024


@triton.jit
def _list_sum(rows, row_stride, index, values, begin, end, column, columns, total, SUM: tl.constexpr):
    """total + sum over items begin .. end of values[j] * rows[index[j]]; items of value 0 cost no row."""
    for j in range(begin, end):
        value = tl.load(values + j).to(SUM)
        needed = tl.where(value == 0, 0, columns)
        row = rows + tl.load(index + j).to(tl.int64) * row_stride
        total += value * tl.load(row + column, mask=column < needed, other=0.0).to(SUM)
    return total


@triton.jit
def _row_gradient(
    source, source_stride, index, pointer, values, scale, left, right, w, f, column, columns,
    SCALED: tl.constexpr, OUTER: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """The gradient of a chunk of row f; `w` is the row itself."""
    total = w * 0.0
    if SCALED:
        total += tl.load(scale + f).to(SUM) * w
    if OUTER:
        total += tl.load(left + f).to(SUM) * tl.load(right + column, mask=column < columns, other=0.0).to(SUM)
    begin, end = tl.load(pointer + f), tl.load(pointer + f + 1)
    return _list_sum(source, source_stride, index, values, begin, end, column, columns, total, SUM)


@triton.jit
def _gather_sum(
    rows, row_stride, index, pointer, weights, out, out_stride, columns,
    ADD: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    place = out + s * out_stride + column
    total = tl.zeros([BLOCK], SUM)
    if ADD:
        total += tl.load(place, mask=inside, other=0.0).to(SUM)
    begin, end = tl.load(pointer + s), tl.load(pointer + s + 1)
    total = _list_sum(rows, row_stride, index, weights, begin, end, column, columns, total, SUM)
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _decode_backward(
    source, source_stride, index, pointer, values, scale, left, right, weight, order, out, partial, norms,
    entries, features, columns,
    SCALED: tl.constexpr, KEPT: tl.constexpr, ADD: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    f = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    w = tl.load(weight + f * columns + column, mask=inside, other=0.0).to(SUM)
    total = tl.zeros([BLOCK], SUM)
    if SCALED:
        total += tl.load(scale + f).to(SUM) * w
    for j in range(tl.load(pointer + f), tl.load(pointer + f + 1)):
        g = tl.load(source + tl.load(index + j).to(tl.int64) * source_stride + column, mask=inside, other=0.0).to(SUM)
        total += tl.load(values + j).to(SUM) * g
        tl.store(partial + chunk * entries + tl.load(order + j), tl.sum(g * w, axis=0))
    if KEPT:
        place = out + f * columns + column
        if ADD:
            total += tl.load(place, mask=inside, other=0.0).to(SUM)
        tl.store(place, total.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(norms + chunk * features + f, tl.sum(total * total, axis=0))


@triton.jit
def _gradient_norms(
    source, source_stride, index, pointer, values, scale, left, right, weight, norms, features, columns,
    SCALED: tl.constexpr, OUTER: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    f = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    w = tl.zeros([BLOCK], SUM)
    if SCALED:
        w += tl.load(weight + f * columns + column, mask=inside, other=0.0).to(SUM)
    total = _row_gradient(
        source, source_stride, index, pointer, values, scale, left, right, w, f, column, columns, SCALED, OUTER, SUM
    )
    tl.store(norms + tl.program_id(1).to(tl.int64) * features + f, tl.sum(total * total, axis=0))


@triton.jit
def _adam_rows(
    source, source_stride, index, pointer, values, scale, left, right, weight, first, second, numbers, columns,
    SCALED: tl.constexpr, OUTER: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    f = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < tl.where(tl.load(numbers + 8) == 0, columns, 0)  # a bad step touches nothing
    place = f * columns + column
    w = tl.load(weight + place, mask=inside, other=0.0).to(SUM)
    m = tl.load(first + place, mask=inside, other=0.0).to(SUM)
    v = tl.load(second + place, mask=inside, other=0.0).to(SUM)
    gradient = _row_gradient(
        source, source_stride, index, pointer, values, scale, left, right, w, f, column, columns, SCALED, OUTER, SUM
    )
    gradient *= tl.load(numbers + 7)
    m += tl.load(numbers + 1) * (gradient - m)
    v = tl.load(numbers + 2) * v + tl.load(numbers + 3) * gradient * gradient
    w = tl.load(numbers) * w - tl.load(numbers + 4) * m / (tl.load(numbers + 5) * tl.sqrt(v) + tl.load(numbers + 6))
    tl.store(weight + place, w.to(weight.dtype.element_ty), mask=inside)
    tl.store(first + place, m.to(first.dtype.element_ty), mask=inside)
    tl.store(second + place, v.to(second.dtype.element_ty), mask=inside)


def _sum_type(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _blocks(columns: int) -> tuple[int, int, int]:
    """Columns a program holds, how many programs a row takes, and warps for each."""
    block = min(_MOST_COLUMNS, max(32, 1 << (columns - 1).bit_length()))
    return block, -(-columns // block), min(8, max(1, block // 128))


def _launch(kernel: Any, like: Tensor, *arguments: Tensor | int, **flags: bool) -> None:
    """One program for each row of `like` [F, C] and chunk of its columns."""
    n_rows, columns = like.shape
    block, chunks, warps = _blocks(columns)
    sums = tl.float64 if _sum_type(like) == torch.float64 else tl.float32
    kernel[(n_rows, chunks)](*arguments, columns, **flags, SUM=sums, BLOCK=block, num_warps=warps)


def _described(rows: RowGradient) -> tuple[Tensor | int, ...]:
    """A RowGradient as the kernels take it; terms that it lacks are never loaded."""
    scale, left, right = (rows.weight if term is None else term for term in (rows.scale, rows.left, rows.right))
    source = rows.source, rows.source.stride(0)
    return *source, rows.index, rows.pointer, rows.values, scale, left, right, rows.weight


def _terms(rows: RowGradient) -> dict[str, bool]:
    return {"SCALED": rows.scale is not None, "OUTER": rows.left is not None}


def gather_sum(rows: Tensor, index: Tensor, pointer: Tensor, weights: Tensor, out: Tensor, add: bool = False) -> None:
    """out[s] (+)= sum over list s of weights[j] * rows[index[j]]."""
    _launch(_gather_sum, out, rows, rows.stride(0), index, pointer, weights, out, out.stride(0), ADD=add)


def decode_backward(rows: RowGradient, order: Tensor, out: Tensor | None, add: bool) -> tuple[Tensor, Tensor | None]:
    """d values [N], by token, and d weight into `out` (or added there), or else the norms of its rows."""
    n_features, columns = rows.weight.shape
    chunks, dtype, entries = _blocks(columns)[1], _sum_type(rows.weight), rows.values.numel()
    partial = rows.values.new_zeros(chunks, entries, dtype=dtype)  # empty places stand in no list: theirs stay zero
    squares = rows.values.new_empty(chunks, n_features, dtype=dtype)
    _launch(
        _decode_backward, rows.weight, *_described(rows), order, rows.weight if out is None else out, partial, squares,
        entries, n_features, SCALED=rows.scale is not None, KEPT=out is not None, ADD=add,
    )  # fmt: skip
    return partial.sum(0), squares.sum(0).sqrt() if out is None else None


def row_gradient_norms(rows: RowGradient) -> Tensor:
    """[F]: the 2-norm of each row's gradient."""
    n_features, columns = rows.weight.shape
    squares = rows.values.new_empty(_blocks(columns)[1], n_features, dtype=_sum_type(rows.weight))
    _launch(_gradient_norms, rows.weight, *_described(rows), squares, n_features, **_terms(rows))
    return squares.sum(0).sqrt()


def adam_rows(rows: RowGradient, first: Tensor, second: Tensor, numbers: Tensor) -> None:
    """Adam on `rows.weight` and its moments, in place; `numbers` as `rows.adam_numbers` says."""
    _launch(_adam_rows, rows.weight, *_described(rows), first, second, numbers, **_terms(rows))
