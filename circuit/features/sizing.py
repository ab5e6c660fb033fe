"""What dashboards of a dictionary take, worked out before any are made."""

from collections.abc import Sequence
from typing import NamedTuple

from .examples import BINS
from .gather import FeatureSettings

TOKEN_BYTES, TOKEN_SECONDS = 3, 3.3e-6
"""What a token of an example takes on disk, deflated, and of one processor: measured on the bundled world."""
NEIGHBOUR_BYTES = 20
PAIR_SECONDS = 1.3e-7
"""What comparing two features takes of a CPU thread: 3,072 features a layer, L0 32, 20,000 tokens, a busy machine."""


class DashboardsTake(NamedTuple):
    """All figures are one process's; together they take as much disk as `disk` times their number."""

    memory: float
    """Of the device, for the examples of the layers that are described at once."""
    disk: float
    operations: float
    """Arithmetic on the device: the model and the encoders over the text, and features weighed against each other."""
    writing: float
    """Seconds of one processor, for the records."""
    comparing: float
    """Seconds, were it one CPU thread that weighs features against each other, as every process does."""


def dashboards_take(
    sizes: Sequence[int], d_model: int, settings: FeatureSettings | None = None, processes: int = 1
) -> DashboardsTake:
    """For covered layers of so many features; the model is reckoned at 12 d^2 parameters a layer."""
    settings = settings or FeatureSettings()
    examples, window = settings.top + settings.quantiles * settings.per_quantile, settings.before + settings.after + 1
    mine = -(-len(sizes) // processes)
    at_once = min(mine, settings.layers_at_once or mine)
    largest, share = max(sizes), sum(sizes) * mine / len(sizes)
    a_feature = examples * (4 * window + 4 + 8 + 8) + 8 * BINS + 24
    passes = -(-mine // at_once)
    forward = passes * settings.tokens * 24 * len(sizes) * d_model**2
    encoding = settings.tokens * 2 * d_model * share
    pairs = (sum(sizes) ** 2 - sum(size**2 for size in sizes)) / 2 if settings.neighbours else 0
    return DashboardsTake(
        at_once * largest * a_feature,
        share * (TOKEN_BYTES * examples * window + NEIGHBOUR_BYTES * 2 * settings.neighbours),
        forward + encoding + 2 * d_model * pairs,
        share * examples * window * TOKEN_SECONDS,
        pairs * PAIR_SECONDS,
    )
