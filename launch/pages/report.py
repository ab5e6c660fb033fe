"""Write a report: the page, its pictures, and for several runs their table of figures."""

import csv
import io
from pathlib import Path

from ..workspace import runs
from .compare_page import comparison_page
from .measured import FIGURES, Measured, read_log, read_measured
from .run_page import run_page


def write_report(folders: list[Path], page: Path) -> list[Measured]:
    """The page about these runs (one: all of its figures; several: their comparison), PNGs and, for several, a CSV."""
    measured = [read_measured(folder) for folder in folders]
    if len(measured) == 1:
        text, charts = run_page(measured[0].name, measured[0].result, read_log(folders[0]))
    else:
        beaten = {run.name: [other.name for other in measured if other.beats(run)] for run in measured}
        text, charts = comparison_page(measured, FIGURES, beaten)
        runs.write_text(page.with_suffix(".csv"), as_csv(measured, beaten))
    runs.write_text(page, text)
    plots = page.parent / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    for name, chart in charts.items():
        chart.save_png(plots / f"{name}.png")
    return measured


def as_csv(measured: list[Measured], beaten: dict[str, list[str]]) -> str:
    """One line a run."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["run", "kind", *FIGURES, "dominated_by", "data"])
    for run in measured:
        writer.writerow(
            [run.name, run.kind, *(run.figures[name] for name in FIGURES), " ".join(beaten[run.name]), run.data]
        )
    return text.getvalue()
