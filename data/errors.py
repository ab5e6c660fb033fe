"""What a user did wrong, said in one sentence; and how long work reports that it advances.

Every room may use these. A `UserError` reaches the terminal as its sentence alone; any other exception is a
defect of ours and keeps its traceback.
"""

import errno
import math
from collections.abc import Iterable
from typing import Protocol


class UserError(Exception):
    """Bad input or circumstances: the message is one clear sentence that names the cause and what to do."""


class SettingsError(UserError):
    """A setting that is misspelt, of the wrong type, out of range, or contradicts another."""


def out_of_room(error: OSError) -> bool:
    """The disk is full, or this user's part of it, or a file may not grow any further."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_choice(setting: str, value: object, choices: Iterable[object]) -> None:
    """Refuse a value outside its list, naming the setting and what it takes."""
    choices = list(choices)
    if value not in choices:
        raise SettingsError(f"{setting}={value} is not known; it takes one of {', '.join(map(str, choices))}")


def check_range(setting: str, value: float, low: float | None = None, high: float | None = None) -> None:
    """Refuse a number outside [low, high] or none at all, naming the setting and its range."""
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingsError(f"{setting}={value} is not a finite number")
    if low is not None and value < low:
        raise SettingsError(f"{setting}={value} is too small; it takes {low} or more")
    if high is not None and value > high:
        raise SettingsError(f"{setting}={value} is too large; it takes {high} or less")


class Progress(Protocol):
    """Long work calls this now and then; only `launch/` knows how to draw it."""

    def __call__(self, label: str, done: float, total: float | None = None, note: str = "") -> None: ...


def silent(label: str, done: float, total: float | None = None, note: str = "") -> None:
    """The progress of work that nobody watches."""
