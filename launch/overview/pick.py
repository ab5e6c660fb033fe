"""From a sweep to a choice: `min nmse where l0<=16 and dead<0.05`."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ...data.errors import SettingsError, UserError
from ..pages import FIGURES, Measured

COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
    "=": lambda a, b: a == b,
}
CONDITION = re.compile(r"^(\w+)\s*(<=|>=|<|>|=)\s*(\S+)$")


class Condition(NamedTuple):
    """A figure's bound."""

    name: str
    sign: str
    bound: float

    def miss(self, figures: dict[str, float | None]) -> float:
        """0 where it holds, else how far off, relative to the bound; infinite where the figure is not known."""
        value = figures.get(self.name)
        if value is None:
            return float("inf")
        if COMPARE[self.sign](value, self.bound):
            return 0.0
        return abs(value - self.bound) / max(abs(self.bound), 1e-9) or 1e-9


class Pick(NamedTuple):
    """What is wanted."""

    best: Callable[[Sequence[float]], float]
    name: str
    conditions: list[Condition]


def parse_pick(text: str) -> Pick:
    """Read a choice; what cannot be read is said with an example."""
    goal, _, rest = text.strip().partition(" where ")
    words = goal.split()
    if len(words) != 2 or words[0] not in ("min", "max"):
        raise SettingsError(f'pick={text!r} cannot be read; it is such as "min nmse where l0<=16 and dead<0.05"')
    return Pick({"min": min, "max": max}[words[0]], _known(words[1]), parse_conditions(rest))


def parse_conditions(text: str) -> list[Condition]:
    """`l0<=16 and dead<0.05`."""
    conditions = []
    for part in filter(None, (part.strip() for part in text.split(" and "))):
        found = CONDITION.match(part)
        try:
            if found is None:
                raise ValueError
            conditions.append(Condition(_known(found[1]), found[2], float(found[3])))
        except ValueError as error:
            raise SettingsError(f"{part!r} is no condition; one is such as l0<=16") from error
    return conditions


def _known(name: str) -> str:
    if name not in FIGURES:
        raise SettingsError(f"{name!r} is not a figure of a run; there are {', '.join(FIGURES)}")
    return name


def choose(measured: Sequence[Measured], pick: Pick) -> Measured:
    """The run that is wanted; where none meets the conditions, the sentence says which come nearest."""
    missed = {m.name: sum(c.miss(m.figures) for c in pick.conditions) for m in measured}
    meeting = [m for m in measured if missed[m.name] == 0 and m.figures.get(pick.name) is not None]
    if meeting:
        value = pick.best([m.figures[pick.name] or 0.0 for m in meeting])
        return next(m for m in meeting if (m.figures[pick.name] or 0.0) == value)
    nearest = sorted(measured, key=lambda m: missed[m.name])[:3]
    shown = "; ".join(f"{m.name} ({_figures(m, pick)})" for m in nearest)
    raise UserError(f"no run meets the choice; nearest are {shown}")


def _figures(m: Measured, pick: Pick) -> str:
    names = dict.fromkeys([*(c.name for c in pick.conditions), pick.name])
    return ", ".join(f"{name} {m.figures[name]:.4g}" for name in names if m.figures.get(name) is not None)
