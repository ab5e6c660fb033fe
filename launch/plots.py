"""Drawings for reports: small, plain, and legible on a light and on a dark page."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#808086"  # reads on white and on near-black
COLOURS = ("#3b82c4", "#d9822b", "#4d9e62", "#b4556f", "#7a68b3", "#8a7a4c")


def figure(width: float = 6.4, height: float = 3.2, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure with transparent ground."""
    drawn = Figure(figsize=(width, height), layout="constrained")
    drawn.patch.set_alpha(0.0)
    axes = [drawn.add_subplot(1, columns, i + 1) for i in range(columns)]
    for ax in axes:
        ax.patch.set_alpha(0.0)
        ax.tick_params(colors=INK, labelsize=8)
        for name, spine in ax.spines.items():
            spine.set_visible(name in ("left", "bottom"))
            spine.set_color(INK)
    return drawn, axes


def label(ax: Axes, x: str, y: str, title: str = "") -> None:
    """Axis names in the neutral ink."""
    ax.set_xlabel(x, color=INK, fontsize=9)
    ax.set_ylabel(y, color=INK, fontsize=9)
    if title:
        ax.set_title(title, color=INK, fontsize=10, loc="left")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=8, labelcolor=INK)


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str, title: str = "", log: bool = False
) -> Figure:
    """One line a name."""
    drawn, (ax,) = figure()
    for i, (name, (xs, ys)) in enumerate(series.items()):
        ax.plot(xs, ys, label=name, color=COLOURS[i % len(COLOURS)], linewidth=1.4)
    if log:
        ax.set_yscale("log")
    label(ax, x, y, title)
    return drawn


def bars(groups: Mapping[str, Sequence[float]], names: Sequence[str], y: str, title: str = "") -> Figure:
    """Groups of bars side by side."""
    drawn, (ax,) = figure()
    width = 0.8 / max(len(groups), 1)
    for i, (group, values) in enumerate(groups.items()):
        at = [n + (i - (len(groups) - 1) / 2) * width for n in range(len(values))]
        ax.bar(at, list(values), width=width * 0.92, label=group, color=COLOURS[i % len(COLOURS)])
    ax.set_xticks(range(len(names)), list(names))
    label(ax, "", y, title)
    return drawn


def points(series: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, title: str = "") -> Figure:
    """Points joined in the order of x, one colour a name."""
    drawn, (ax,) = figure()
    for i, (name, pairs) in enumerate(series.items()):
        ordered = sorted(pairs)
        xs, ys = [p[0] for p in ordered], [p[1] for p in ordered]
        ax.plot(xs, ys, "o-", label=name, color=COLOURS[i % len(COLOURS)], linewidth=1, markersize=4)
    label(ax, x, y, title)
    return drawn


def svg(drawn: Figure) -> str:
    """The drawing as text, the same for the same figures."""
    with matplotlib.rc_context({"svg.hashsalt": "crosslace", "svg.fonttype": "none"}):
        text = io.StringIO()
        drawn.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()


def png(drawn: Figure, path: Path, dpi: int = 200) -> Path:
    """The drawing for a paper or a README."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=dpi)
    return path
