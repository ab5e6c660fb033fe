"""Runs that differ in nothing but their seed, as one: mean and 95% interval."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ...circuit.intervals import mean_of
from ..pages import FIGURES, Measured
from ..workspace import runs


class OverSeeds(NamedTuple):
    """Several seeds of one configuration."""

    names: list[str]
    """The runs."""
    figures: dict[str, tuple[float, float] | None]
    """Mean and half of the interval's width; None where not all runs have the figure."""


def over_seeds(measured: Sequence[Measured]) -> list[OverSeeds]:
    """Groups of two seeds and more."""
    groups: dict[str, list[Measured]] = {}
    for m in measured:
        settings = runs.flat(runs.saved_settings(Path(m.name)))
        free = ("wandb.", "tensorboard.")
        settings = {name: v for name, v in settings.items() if not name.startswith(free) and name[-4:] != "seed"}
        if settings:
            groups.setdefault(json.dumps(settings, sort_keys=True, default=str) + m.data, []).append(m)
    return [
        OverSeeds([m.name for m in group], {name: interval([m.figures[name] for m in group]) for name in FIGURES})
        for group in groups.values()
        if len(group) > 1
    ]


def interval(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Mean and half-width of its 95% interval; None where a run lacks the figure."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    mean = mean_of(known)
    return None if mean.half is None else (mean.value, mean.half)
