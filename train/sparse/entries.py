"""Lists of active entries, and the gradients that such lists describe: data alone.

An *entry* is a (token, feature) pair at which a layer is looked at. N entries, R rows of output, F features of the
layer, C columns of a matrix with one row a feature; all lists are int64 on a CPU, int32 on an accelerator.
"""

from typing import Any, NamedTuple

from torch import Tensor


class Entries(NamedTuple):
    """Active entries of one layer, listed by token, and the way round by feature."""

    rows: Tensor
    """[N], rising: the row each entry writes to; its token, or B + its token in the auxiliary reconstruction."""
    features: Tensor
    """[N]"""
    row_pointer: Tensor
    """[R + 1]: row r owns entries row_pointer[r] .. row_pointer[r + 1]."""
    order: Tensor
    """[N]: the entries by feature."""
    ordered_rows: Tensor
    """[N]: rows[order]"""
    feature_pointer: Tensor
    """[F + 1]: feature f owns items feature_pointer[f] .. feature_pointer[f + 1] of `order`."""
    row_order: Tensor | None = None
    """[N]: the entries by row, where they are not listed so: empty places come last, and no list holds them."""

    def by_row(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features, pointer and values of the lists by row, as `gather_sum` takes them."""
        if self.row_order is None:
            return self.features, self.row_pointer, values
        return self.features[self.row_order], self.row_pointer, values[self.row_order]


class RowGradient(NamedTuple):
    """gradient[f] = sum over f's list of values[j] * source[index[j]] + scale[f] * weight[f] + left[f] * right."""

    source: Tensor
    """[R, C]: perhaps columns of something wider."""
    index: Tensor
    """[N]: all lists, one after the other."""
    pointer: Tensor
    """[F + 1]: feature f owns items pointer[f] .. pointer[f + 1]."""
    values: Tensor
    """[N]"""
    weight: Tensor
    """[F, C]: the matrix itself."""
    scale: Tensor | None = None
    """[F]: the gradient of the rows' norms over the norms."""
    left: Tensor | None = None
    """[F]: with `right`, what all tokens of a feature have in common."""
    right: Tensor | None = None
    """[C]"""

    def arguments(self) -> tuple[Any, ...]:
        """As the C++ kernels take it."""
        return (
            self.source, self.source.stride(0), self.index, self.pointer, self.values, self.scale, self.left,
            self.right, self.weight, self.weight.shape[1],
        )  # fmt: skip
