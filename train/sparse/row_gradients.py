"""Gradients of matrices with one row a feature (W_enc, W_dec), which need not be formed to be used.

A feature's row has a short list of entries, and its gradient is a sum over that list. So the whole gradient, as large
as the matrix, is given by the lists and by the rows that they point to, as large as the batch: `RowGradient`. An update
takes two walks over it, each of which forms a row (on a CPU a block in the first-level cache, on a GPU a block in
registers, with plain PyTorch a chunk of rows), uses it and drops it:

    row_gradient_norms   for the global norm, by which every gradient is clipped
    adam_rows            Adam or AdamW on the row

Where the gradient is needed whole (it is summed over micro-batches or data ranks, or Muon takes it), `form` writes it.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import cpu as native
from .entries import Entries, RowGradient
from .products import backend, gather_dot, gather_sum

# Numbers in a chunk of rows, with plain PyTorch.
_CHUNK = 1 << 21


def _native(rows: RowGradient) -> bool:
    return backend(rows.weight) == "native" and rows.source.dtype == rows.values.dtype == rows.weight.dtype


def chunks(rows: RowGradient) -> Iterator[tuple[slice, Tensor]]:
    """The gradient some rows at a time, in one buffer: what the kernels are held against."""
    size = max(1, _CHUNK // max(1, rows.weight.shape[1]))
    buffer = torch.empty_like(rows.weight[:size])
    for first in range(0, len(rows.weight), size):
        these = slice(first, min(first + size, len(rows.weight)))
        begin, end = int(rows.pointer[these.start]), int(rows.pointer[these.stop])
        part = rows._replace(
            index=rows.index[begin:end], values=rows.values[begin:end], weight=rows.weight[these],
            pointer=rows.pointer[these.start : these.stop + 1] - begin,
            scale=None if rows.scale is None else rows.scale[these],
            left=None if rows.left is None else rows.left[these],
        )  # fmt: skip
        yield these, form(part, buffer[: these.stop - these.start])


def form(rows: RowGradient, out: Tensor, add: bool = False) -> Tensor:
    """The whole gradient [F, C], written to `out` or added there."""
    gather_sum(rows.source, rows.index, rows.pointer, rows.values, out, add)
    if rows.scale is not None:
        out.addcmul_(rows.weight, rows.scale[:, None])
    if rows.left is not None and rows.right is not None:
        out.addr_(rows.left, rows.right)
    return out


def row_gradient_norms(rows: RowGradient) -> Tensor:
    """[F]: the 2-norm of each row's gradient."""
    if _native(rows):
        norms = torch.empty_like(rows.weight[:, 0])
        native.call("gradient_norms", *rows.arguments(), len(norms), norms)
        return norms
    if backend(rows.weight) == "triton":
        from . import triton_kernels as kernels  # optional: Triton comes with PyTorch's CUDA builds

        return kernels.row_gradient_norms(rows)
    return torch.cat([torch.linalg.vector_norm(part, dim=1) for _, part in chunks(rows)])


def decode_backward(
    rows: RowGradient, entries: Entries, out: Tensor | None, add: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Both gradients of `y[r] = sum of values * weight[f]`, in one pass over the weights.

    The values' [N], by token: source[r] . weight[f]. The weights' into `out` (or added there); without one it is not
    kept, and its rows' norms [F] are returned beside.
    """
    kind = backend(rows.weight)
    if _native(rows):
        grad_values = torch.empty_like(rows.values)
        norms = torch.empty_like(rows.weight[:, 0]) if out is None else None
        shape = len(rows.weight), grad_values, out, add, norms
        native.call("decode_backward", *rows.arguments(), entries.order, *shape)
        return grad_values, norms
    if kind == "triton":
        from . import triton_kernels as kernels

        return kernels.decode_backward(rows, entries.order, out, add)
    norms = row_gradient_norms(rows) if out is None else None
    if out is not None:
        form(rows, out, add)
    return gather_dot(rows.source, rows.weight, entries.rows, entries.features), norms


def adam_numbers(group: dict[str, Any], steps: Tensor, divisor: Tensor, bad: Tensor) -> Tensor:
    """[9, P], on the device, in float64: what Adam's formula takes for a step after `steps` [P] others.

    1 - lr * decay, 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), eps, 1 / divisor, bad.
    """
    beta1, beta2 = group["betas"]
    t = steps.double() + 1
    size, root = group["lr"] / (1 - beta1**t), (1 - beta2**t).rsqrt()
    known = [1 - group["lr"] * group["weight_decay"], 1 - beta1, beta2, 1 - beta2, group["eps"]]
    keep, rate1, decay2, rate2, eps = (torch.full_like(t, number) for number in known)
    factor = 1 / divisor.float().double()  # as torch's fused Adam, which takes the divisor in float32
    return torch.stack([keep, rate1, decay2, rate2, size, root, eps, factor.expand_as(t), bad.double().expand_as(t)])


def adam_rows(rows: RowGradient, first: Tensor, second: Tensor, numbers: Tensor) -> None:
    """Adam or AdamW on `rows.weight` and its moments [F, C] in place; nothing happens where `bad` is 1."""
    if _native(rows):
        shape = len(rows.weight), rows.weight, first, second
        native.call("adam_rows", *rows.arguments(), *shape, numbers.to(rows.weight.dtype).contiguous())
    elif backend(rows.weight) == "triton":
        from . import triton_kernels as kernels

        kernels.adam_rows(rows, first, second, numbers.to(rows.weight.dtype).contiguous())
    else:
        keep, rate1, beta2, rate2, size, root, eps, factor, bad = numbers.to(rows.weight.dtype).unbind()
        for place, part in chunks(rows):
            gradient = part * factor
            m, v, w = first[place], second[place], rows.weight[place]
            new_m = m + rate1 * (gradient - m)
            new_v = beta2 * v + rate2 * gradient.square()
            new_w = keep * w - size * new_m / (root * new_v.sqrt() + eps)
            for old, new in ((m, new_m), (v, new_v), (w, new_w)):
                old.copy_(torch.where(bad > 0, old, new))


class RowGradients:
    """The gradients that a backward pass leaves unformed, for the parameters that it is asked to."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._asked = {id(parameter): parameter for parameter in parameters}
        self._held: dict[int, tuple[RowGradient, Tensor]] = {}

    def take(self, parameter: Tensor) -> bool:
        """Whether this parameter's gradient is to be left here."""
        return id(parameter) in self._asked and id(parameter) not in self._held and parameter.grad is None

    def put(self, parameter: Tensor, rows: RowGradient, norms: Tensor) -> None:
        self._held[id(parameter)] = (rows, norms)

    def settled(self) -> list[tuple[Tensor, Tensor]]:
        """After backward: each matrix and the norms of its gradient's rows [F], whose norm is that of the gradient.

        What has got a gradient by another way too is formed after all, and added there.
        """
        for key in list(self._held):
            gradient = self._asked[key].grad
            if gradient is not None:
                form(self._held.pop(key)[0], gradient.flatten(1), add=True)
        return [(self._asked[key], norms) for key, (_, norms) in self._held.items()]

    def items(self) -> Iterator[tuple[Tensor, RowGradient]]:
        return ((self._asked[key], rows) for key, (rows, _) in self._held.items())
