"""Runs that differ in nothing but their seed, as one: mean and 95% interval."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..pages import FIGURES, Measured
from ..workspace import runs

STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Student's t at 97.5%, for 1 to 9 degrees of freedom; beyond, 1.96 is near enough."""


class OverSeeds(NamedTuple):
    """Several seeds of one configuration."""

    name: str
    """The run of the first seed."""
    seeds: int
    figures: dict[str, tuple[float, float] | None]
    """Mean and half of the interval's width; None where not all runs have the figure."""


def over_seeds(measured: Sequence[Measured]) -> list[OverSeeds]:
    """Groups of two seeds and more."""
    groups: dict[str, list[Measured]] = {}
    for m in measured:
        settings = runs.flat(runs.saved_settings(Path(m.name)))
        settings = {name: v for name, v in settings.items() if not name.startswith("wandb.") and name[-4:] != "seed"}
        if settings:
            groups.setdefault(json.dumps(settings, sort_keys=True, default=str) + m.data, []).append(m)
    return [
        OverSeeds(group[0].name, len(group), {name: interval([m.figures[name] for m in group]) for name in FIGURES})
        for group in groups.values()
        if len(group) > 1
    ]


def interval(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Mean and half-width of its 95% interval, by Student's t: there are few seeds."""
    known = [value for value in values if value is not None]
    n = len(known)
    if n < 2 or n < len(values):
        return None
    mean = sum(known) / n
    deviation = math.sqrt(sum((value - mean) ** 2 for value in known) / (n - 1))
    t = STUDENT[n - 2] if n - 2 < len(STUDENT) else 1.96
    return mean, t * deviation / math.sqrt(n)
