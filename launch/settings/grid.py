"""The grid of a sweep: from words with several values to one list of words a run. Words only: no job, no folder."""

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser

from ...data.errors import SettingsError

OF_THE_SWEEP = ("run", "launcher", "eval", "jobs", "stack", "print", "objective")
"""Settings of the sweep itself, which its training runs are not given."""


class Point(NamedTuple):
    """One combination."""

    name: str
    """The settings that vary, without their groups, and their values: a folder's name."""
    words: list[str]
    """Overrides, as for `crosslace train`."""


def choices(words: Sequence[str], leave_out: Sequence[str] = OF_THE_SWEEP) -> tuple[list[str], dict[str, list[str]]]:
    """The words that stand in every combination, and the values of the settings that are given several; words that are
    left out stay with the caller."""
    fixed: list[str] = []
    varied: dict[str, list[str]] = {}
    for word, override in zip(words, OverridesParser.create().parse_overrides(list(words))):
        if override.key_or_group.split(".")[0] in leave_out:
            continue
        if override.is_sweep_override():
            varied[override.key_or_group] = list(override.sweep_string_iterator())
        else:
            fixed.append(word)
    if not varied:
        raise SettingsError("no setting has several values; give some a list, such as trainer.target_l0=8,16,32")
    return fixed, varied


def grid(words: Sequence[str], leave_out: Sequence[str] = OF_THE_SWEEP) -> list[Point]:
    """All combinations of the settings that are given several values."""
    fixed, varied = choices(words, leave_out)
    pairs = [[f"{key}={value}" for value in values] for key, values in varied.items()]
    return [Point(_name(chosen), [*fixed, *chosen]) for chosen in itertools.product(*pairs)]


def _name(chosen: Sequence[str]) -> str:
    parts = []
    for word in chosen:
        key, _, value = word.partition("=")
        parts.append(f"{key.rpartition('.')[2]}-{value}")
    return re.sub(r"[^A-Za-z0-9._-]+", "_", "_".join(parts)).strip("_")


def single_values(words: Sequence[str]) -> list[str]:
    """The same words with the first of several values each: enough to compose and check the sweep's own settings."""
    single = []
    for word, override in zip(words, OverridesParser.create().parse_overrides(list(words))):
        if override.is_sweep_override():
            single.append(f"{override.key_or_group}={next(iter(override.sweep_string_iterator()))}")
        else:
            single.append(word)
    return single
