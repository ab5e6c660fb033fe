"""A page that is one file: text, tables and drawings inline, no network, readable in light and dark."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .runs import write_text
from .terminal import figure

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --paper: #fdfdfc; --faint: #6b6b70; --line: #d8d8dc; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ea; --paper: #18181b; --faint: #9c9ca3; --line: #3a3a40; }
}
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 1000px; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p.faint, figcaption { color: var(--faint); font-size: .9rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .8rem .25rem 0; text-align: left; }
td.n, th.n { text-align: right; }
figure { margin: 1rem 0; overflow-x: auto; } figure svg, figure img { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
"""


class Page:
    """Gather parts, then write one HTML file."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts: list[str] = []

    def heading(self, text: str) -> None:
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str, faint: bool = False) -> None:
        self.parts.append(f"<p{' class=faint' if faint else ''}>{html.escape(text)}</p>")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        rows = [list(row) for row in rows]
        number = [all(isinstance(row[i], int | float) or row[i] is None for row in rows) for i in range(len(columns))]
        cells = lambda tag, row: "".join(
            f"<{tag}{' class=n' if n else ''}>{html.escape(figure(value))}</{tag}>" for value, n in zip(row, number)
        )
        body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
        self.parts.append(
            f"<div class=scroll><table><thead><tr>{cells('th', columns)}</tr></thead><tbody>{body}</tbody></table></div>"
        )

    def drawing(self, svg: str, caption: str = "") -> None:
        """An SVG that our own code drew."""
        start = svg.find("<svg")
        note = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
        self.parts.append(f"<figure>{svg[start:]}{note}</figure>")

    def write(self, path: Path) -> Path:
        write_text(
            path,
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head>\n"
            f"<body><h1>{html.escape(self.title)}</h1>\n" + "\n".join(self.parts) + "\n</body></html>\n",
        )
        return path
