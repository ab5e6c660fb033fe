"""`crosslace report`: one page about one evaluated run, or about many side by side."""

from pathlib import Path

from ..pages import FIGURES, evaluated_below, write_report
from ..terminal import Closing, table
from ..workspace import Job, runs


def run(job: Job) -> Closing:
    """Write the page, the pictures and the table of figures."""
    top = job.top
    folders = [Path(name) for name in top.runs]
    if top.run:
        folders += evaluated_below(Path(top.run))
    folders = list(dict.fromkeys(folders))
    home = Path(top.run) if top.run else folders[0].parent
    page = Path(top.out) if top.out else home / "report.html"
    runs.writable(page.parent)
    measured = write_report(folders, page)
    wrote = [(str(page), "the page"), (str(page.parent / "plots"), "the same pictures as PNG")]
    if len(measured) > 1:
        wrote.append((str(page.with_suffix(".csv")), "the table"))
    rows = [(m.name, m.kind, *(m.figures[name] for name in FIGURES)) for m in measured]
    return Closing("reported", tables=[table("runs", ("run", "kind", *FIGURES), rows)], wrote=wrote)
