"""Write a report: the page, its pictures, and for several runs their table of figures."""

import csv
import io
from pathlib import Path
from typing import Any

from ..workspace import runs
from .compare_page import comparison_page
from .measured import FIGURES, Measured, read_log, read_measured
from .run_page import run_page


def write_report(folders: list[Path], page: Path) -> list[Measured]:
    """The page about these runs (one: all of its figures; several: their comparison), PNGs and, for several, a CSV."""
    measured = [read_measured(folder) for folder in folders]
    if len(measured) == 1:
        course = folders[0] / "course.json"
        over = runs.read_json(course) if course.is_file() else None
        text, charts = run_page(measured[0].name, measured[0].result, read_log(folders[0]), over)
    else:
        beaten = {run.name: [other.name for other in measured if other.beats(run)] for run in measured}
        text, charts = comparison_page(
            measured, FIGURES, beaten, [row for folder in folders for row in over_seeds(folder)]
        )
        runs.write_text(page.with_suffix(".csv"), as_csv(measured, beaten))
    runs.write_text(page, text)
    plots = page.parent / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    for name, chart in charts.items():
        chart.save_png(plots / f"{name}.png")
    return measured


def over_seeds(folder: Path) -> list[list[Any]]:
    """What `crosslace seeds` found of a run's graphs: graph, trainings, its edges and paths, and those in every one."""
    rows = []
    for path in sorted(folder.glob("graphs/*/seeds.json")):
        found = runs.read_json(path)
        total = found["trainings"]
        edges, paths = [edge[2] for edge in found["edges"]], [one["in"] for one in found["paths"]]
        share = sum(count - 1 for count in edges) / max(1, len(edges) * (total - 1))
        counts = (len(edges), edges.count(total), share, len(paths), paths.count(total))
        rows.append([str(path.parent), total, *counts])
    return rows


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
