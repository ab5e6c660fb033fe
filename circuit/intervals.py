"""A mean and its 95% interval, by Student's t: seeds, prompts and features are often few."""

import math
from collections.abc import Sequence
from typing import NamedTuple

STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Student's t at 97.5%, for 1 to 9 degrees of freedom."""


class Mean(NamedTuple):
    """A mean of independent values."""

    value: float
    half: float | None
    """Half of the interval's width; None for a single value."""

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.half is None else (self.value - self.half, self.value + self.half)


def mean_of(values: Sequence[float]) -> Mean:
    """Of independent values; not a number for none."""
    n = len(values)
    mean = sum(values) / n if n else math.nan
    if n < 2:
        return Mean(mean, None)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    # beyond the table, an expansion that is right to a hundredth
    t = STUDENT[n - 2] if n - 2 < len(STUDENT) else 1.96 + 2.42 / (n - 1)
    return Mean(mean, t * deviation / math.sqrt(n))
