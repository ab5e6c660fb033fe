"""The page about many runs side by side: frontiers, and a table that sorts."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .charts import LABELS, Chart, Series
from .html import grid, notice, page, table
from .measured import Measured

COMPARED = ("nmse", "ce_recovered", "kl", "replacement_score")
"""What is drawn against L0."""


def comparison_page(
    measured: Sequence[Measured],
    figures: Sequence[str],
    beaten: Mapping[str, Sequence[str]],
    seeds: Sequence[Sequence[Any]] = (),
) -> tuple[str, dict[str, Chart]]:
    """Many runs: frontiers, a table that sorts, and which edges of graphs hold over seeds."""
    data = list(dict.fromkeys(run.data for run in measured))
    charts = {f"l0_{name}": _frontier(measured, data, name) for name in COMPARED}
    body = []
    if len(data) > 1:
        body.append(
            notice(
                "These runs were measured on different data or by different definitions, marked A, B, ...: "
                "compare only runs of one letter."
            )
        )
        body += [f"<p>{_letter(i)}: <code>{escape(text)}</code></p>" for i, text in enumerate(data)]
    body.append(grid([chart.svg() for chart in charts.values()]))
    body.append(
        "<h2>All runs</h2><p class=lead>Click a column to sort. A run is dominated where another one, at no "
        "more active features, is as good in NMSE, KL, cross-entropy recovered and replacement score, and "
        "better in one.</p>"
    )
    rows = [
        [
            run.name,
            run.kind,
            *([_letter(data.index(run.data))] if len(data) > 1 else []),
            *(run.figures[name] for name in figures),
            ", ".join(beaten[run.name]) or None,
        ]
        for run in measured
    ]
    heads = ["run", "kind", *(["data"] if len(data) > 1 else []), *figures, "dominated by"]
    body.append(table(heads, rows, sortable=True))
    if seeds:
        heads = ["graph", "trainings", "edges", "in all", "found in another, in the mean", "strongest paths", "in all"]
        body.append("<h2>Graphs over seeds</h2>" + table(heads, seeds))
    lead = f"{len(measured)} runs; {sum(not by for by in beaten.values())} of them not dominated."
    return page("Crosslace: runs compared", lead, "".join(body)), charts


def _letter(number: int) -> str:
    return chr(ord("A") + number % 26)


def _frontier(measured: Sequence[Measured], data: Sequence[str], name: str) -> Chart:
    groups: dict[str, list[tuple[float, float, str]]] = {}
    for run in measured:
        x, y = run.figures["l0"], run.figures[name]
        if x is not None and y is not None:
            letter = f" ({_letter(data.index(run.data))})" if len(data) > 1 else ""
            groups.setdefault(run.kind + letter, []).append((x, y, run.name))
    series = []
    for kind, points in groups.items():
        points.sort()
        labels = [f"{label}: L0 {x:.3g}, {name} {y:.4g}" for x, y, label in points]
        series.append(Series(kind, [(x, y) for x, y, _ in points], labels))
    return Chart(LABELS[name], LABELS["l0"], LABELS[name], series, log_y=name in ("nmse", "kl"))
