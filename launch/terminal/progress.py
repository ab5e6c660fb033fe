"""Progress: bars with rate and time left on a terminal, plain lines in a log file.

work calls progress(what, done, total, note) -> one bar for each `what`, its rate over the last stretch -> a line drawn
"""

import sys
import time
from collections import deque
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

PLAIN_EVERY_S = 10.0


def duration(seconds: float) -> str:
    """A time span to read: 0:45, 12:03, 1:02:45."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def rate(per_second: float) -> str:
    """A speed to read, with a large unit's letter where it helps."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if per_second >= size:
            return f"{per_second / size:.1f}{letter}/s"
    return f"{per_second:.1f}/s"


class Pace:
    """How fast something advances, over the last half minute: a slow start or what was done before does not count."""

    STRETCH_S = 30.0

    def __init__(self) -> None:
        self.seen: deque[tuple[float, float]] = deque()

    def at(self, now: float, done: float) -> float:
        """Take note of a moment; units a second, 0 where nothing can be said yet."""
        if self.seen and done < self.seen[-1][1]:
            self.seen.clear()
        self.seen.append((now, done))
        while len(self.seen) > 2 and self.seen[1][0] <= now - self.STRETCH_S:
            self.seen.popleft()
        (start, first), (end, last) = self.seen[0], self.seen[-1]
        return (last - first) / (end - start) if end > start else 0.0


def left(done: float, total: float | None, speed: float) -> str:
    """The time left, where it can be told."""
    return f"{duration((total - done) / speed)} left" if total is not None and speed > 0 and done < total else ""


class Bars:
    """A progress (see `data.errors.Progress`) drawn with rich; labels become bars in the order they come."""

    def __init__(self) -> None:
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}  {task.fields[left]}"),
            TextColumn("{task.fields[note]}", style="dim"),
            console=Console(stderr=True),
            refresh_per_second=4,
        )
        self.tasks: dict[str, TaskID] = {}
        self.paces: dict[str, Pace] = {}

    def __call__(self, label: str, done: float, total: float | None = None, note: str = "") -> None:
        if label not in self.tasks:
            if not self.tasks:
                self.bars.start()
            self.tasks[label] = self.bars.add_task(label, total=total, note=note, rate="", left="")
            self.paces[label] = Pace()
        speed = self.paces[label].at(time.monotonic(), done)
        whole = int(total) if total is not None and float(total).is_integer() else total
        shown = int(done) if float(done).is_integer() else done
        told: dict[str, Any] = {"rate": rate(speed) if speed > 0 else "", "note": note}
        told["left"] = left(done, total, speed)
        self.bars.update(self.tasks[label], completed=shown, total=whole, **told)

    def close(self) -> None:
        self.bars.stop()


@dataclass
class _Line:
    started: float
    first: float
    told: float
    pace: Pace
    ended: bool = False


@dataclass
class Lines:
    """The same in plain lines, now and then, without control characters."""

    every: float = PLAIN_EVERY_S
    lines: dict[str, _Line] = field(default_factory=dict)

    def __call__(self, label: str, done: float, total: float | None = None, note: str = "") -> None:
        now = time.monotonic()
        line = self.lines.get(label)
        if line is None or (line.ended and (total is None or done < total)):
            line = self.lines[label] = _Line(now, done, now, Pace())
            if total is None or done < total:
                self._print(f"{label} ...")
        line.pace.at(now, done)
        ended = total is not None and done >= total
        if (ended and not line.ended) or (not ended and now - line.told >= self.every):
            line.told, line.ended = now, ended
            self._print(self._text(label, line, done, total, note, now))

    def _text(self, label: str, line: _Line, done: float, total: float | None, note: str, now: float) -> str:
        elapsed, speed = now - line.started, line.pace.at(now, done)
        if line.ended:  # the whole stretch
            speed = (done - line.first) / elapsed if elapsed > 0 else 0.0
        words = [f"{label}: {done:g}" if total is None else f"{label}: {done:g}/{total:g}"]
        if speed > 0:
            words.append(rate(speed))
        if line.ended:
            words.append(f"done in {duration(elapsed)}")
        elif remaining := left(done, total, speed):
            words.append(remaining)
        return "  ".join([*words, note] if note else words)

    def _print(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing is kept open."""


class Unseen(Lines):
    """Of several processes, one reports."""

    def _print(self, text: str) -> None:
        """Nobody is told."""


class Watched:
    """A progress for as long as the `with` block runs: bars where someone looks, lines where a file does."""

    def __init__(self, sink: Bars | Lines | None = None, about: str = "") -> None:
        self.sink = sink or (Bars() if sys.stderr.isatty() else Lines())
        self.about = f" ({about})" if about else ""

    def __call__(self, label: str, done: float, total: float | None = None, note: str = "") -> None:
        self.sink(label + self.about, done, total, note)

    def named(self, about: str) -> "Watched":
        """The same, whose labels say what they are about."""
        return Watched(self.sink, about)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.sink.close()
