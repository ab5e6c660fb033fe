"""How a verb ends: tables, sentences, what was written, and what to type next."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

_PLAIN_WIDTH = 160


def output() -> Console:
    """Standard output: a terminal as it is, anything else as plain wide text."""
    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(highlight=False, no_color=True, force_terminal=False, width=_PLAIN_WIDTH)


@dataclass
class Closing:
    """How a verb ends: what it found, what it wrote, and what to type next."""

    title: str
    wrote: list[tuple[str, str]] = field(default_factory=list)
    """Path, and what it holds."""
    next: list[str] = field(default_factory=list)
    """Commands."""
    notes: list[str] = field(default_factory=list)
    """Plain sentences."""
    tables: list[Table] = field(default_factory=list)
    code: int = 0
    """The exit code: not 0 where a part of the work failed."""

    def show(self) -> None:
        """Print it."""
        console = output()
        for table in self.tables:
            console.print(Text(str(table.title), style="bold"))  # as a title it would be wrapped to the table's width
            table.title = None
            console.print(table)
        lines = [Text(note) for note in self.notes]
        if self.wrote:
            width = max(len(path) for path, _ in self.wrote)
            lines += [Text("wrote")] + [Text(f"  {path:<{width}}  {what}") for path, what in self.wrote]
        if self.next:
            lines += [Text("next")] + [Text(f"  {command}", style="bold") for command in self.next]
        if console.is_terminal:
            console.print(Panel(Text("\n").join(lines), title=self.title, title_align="left", expand=False))
        else:
            for line in [Text(self.title), *lines]:
                print(line.plain)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A table of words and figures; figures are set to the right."""
    rows = [list(row) for row in rows]
    shown = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, name in enumerate(columns):
        number = all(isinstance(row[i], int | float) for row in rows)
        shown.add_column(name, justify="right" if number else "left")
    for row in rows:
        shown.add_row(*map(figure, row))
    return shown


def figure(value: Any) -> str:
    """A cell: four significant digits, no more."""
    if isinstance(value, bool) or not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
