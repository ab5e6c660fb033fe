"""The k-th largest of values that lie on several ranks, found digit by digit: ranks exchange counts, never values.

Floating-point numbers are ordered as their bits are, read as whole numbers. How many values have which first digit
tells the first digit of the k-th largest; how many of those have which second digit tells the second; and so on. A few
sums over ranks do it, whose size depends neither on k nor on how many values there are.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_WHOLE = {torch.float32: torch.int32, torch.float64: torch.int64}


def kth_largest(values_RN: Tensor, k: int, add: Callable[[Tensor], Tensor], bits: int) -> Tensor:
    """[R, 1]: the k-th largest of each row over all ranks, the smallest where there are fewer, inf where there is none.

    -inf stands for no value. `add` sums a tensor over the ranks; a digit has `bits` of them.
    """
    number, size = _WHOLE[values_RN.dtype], 8 * values_RN.dtype.itemsize
    magnitude, top = (1 << (size - 1)) - 1, 1 << (bits - 1)
    keys = _ordered(values_RN.contiguous().view(number).long(), magnitude)
    alive = values_RN > -torch.inf
    wanted = found = total = torch.zeros_like(keys[:, :1])
    for shift in range(size - bits, -1, -bits):
        first = shift == size - bits
        digits = (keys >> shift) & ((1 << bits) - 1)
        digits = digits ^ top if first else digits  # the sign: set in the smaller numbers
        counts = torch.zeros(len(keys), 1 << bits, dtype=torch.int32, device=keys.device)
        counts = add(counts.scatter_add_(1, digits, alive.int()))
        if first:
            total = counts.sum(1, keepdim=True)
            wanted = total.clamp_max(k)
        larger = counts.flip(1).cumsum(1).flip(1) - counts
        digit = ((larger + counts) >= wanted).sum(1, keepdim=True) - 1
        wanted = wanted - larger.gather(1, digit)
        alive &= digits == digit
        found = found | ((digit ^ top if first else digit) << shift)
    found = found - ((found >> (size - 1)) & 1) * (1 << size) if size < 64 else found
    kth = _ordered(found, magnitude).to(number).view(values_RN.dtype)
    return kth.masked_fill(total == 0, torch.inf)


def _ordered(bits: Tensor, magnitude: int) -> Tensor:
    """Bits of floating-point numbers as whole numbers in the same order, and back."""
    return bits ^ ((bits >> 63) & magnitude)
