"""Charts: one matplotlib figure each, as a picture for a page (SVG) and for a paper (PNG).

On a page the colours become the page's own, so that a chart follows light and dark, and every point says on hovering
what it is. Text is escaped by matplotlib and by the titles' writer here.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#2563eb", "#d9480f", "#2b8a3e", "#9c36b5", "#0b7285", "#c2255c", "#846358", "#495057")
INK, SOFT, LINE = "#1d2330", "#667085", "#d9dee7"
"""The colours of a page in the light, as its style sheet has them."""
PAGE_COLOURS = {INK: "--ink", SOFT: "--soft", LINE: "--line"} | {c: f"--c{i}" for i, c in enumerate(COLOURS)}

LABELS = {
    "l0": "active features per token and layer",
    "nmse": "NMSE",
    "nmse_median": "NMSE of the median row",
    "worst_share": "share of the error in the worst thousandth of the rows",
    "ce_recovered": "cross-entropy recovered",
    "kl": "KL (clean || replaced)",
    "top1": "top-1 agreement",
    "replacement_score": "replacement score",
}


@dataclass(frozen=True)
class Series:
    """One named line or cloud of points; points that are not finite are left out."""

    name: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = ()
    """What a hover shows for each point."""
    joined: bool = True
    """Whether a line joins the points."""
    dots: bool = True


@dataclass(frozen=True)
class Chart:
    """Series over shared axes."""

    title: str
    x: str
    y: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    bars: bool = False
    """Draw each point as a bar from the floor: for counts and per-layer figures."""
    y_range: tuple[float, float] | None = None
    caption: str = ""
    ticks: Mapping[float, str] = field(default_factory=dict)
    """Names for places on the x axis, instead of numbers."""

    def visible(self) -> list[tuple[str, Series, list[tuple[float, float, str]]]]:
        """Series that have points to draw, with their colours; logarithmic axes leave out what is not > 0."""
        kept = []
        for number, series in enumerate(self.series):
            points = [
                (x, y, label or f"{series.name}: {x:.4g}, {y:.4g}")
                for (x, y), label in zip(series.points, [*series.labels, *[""] * len(series.points)])
                if math.isfinite(x) and math.isfinite(y) and (x > 0 or not self.log_x) and (y > 0 or not self.log_y)
            ]
            if points:
                kept.append((COLOURS[number % len(COLOURS)], series, points))
        return kept

    def svg(self) -> str:
        """The chart as one `<figure>` of a page."""
        if not self.visible():
            return f"<figure><figcaption><b>{escape(self.title)}</b>: nothing to draw</figcaption></figure>"
        from matplotlib import rc_context

        out = io.StringIO()
        # Names inside the picture are hashed with the title, so that the pictures of one page do not share them.
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": self.title}):
            self.figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        caption = f"<figcaption>{escape(self.caption)}</figcaption>" if self.caption else ""
        return f"<figure>{self._as_part_of_a_page(out.getvalue())}{caption}</figure>"

    def save_png(self, path: Path) -> None:
        """The same chart for a paper."""
        self.figure.savefig(path, dpi=160)

    @cached_property
    def figure(self) -> "Figure":
        """The figure, drawn once for both. Its margins are fixed: to have them found takes as long as all the rest."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.2, 3.4))
        figure.subplots_adjust(left=0.15, right=0.97, bottom=0.16, top=0.9)
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        visible = self.visible()
        for place, (colour, series, points) in enumerate(visible):
            x, y, _ = zip(*points)
            if self.bars:
                wide = 0.8 / len(visible)
                shifted = [v + (place - (len(visible) - 1) / 2) * wide for v in x]
                for number, bar in enumerate(axes.bar(shifted, y, wide, label=series.name, color=colour)):
                    bar.set_gid(f"bar-{place}-{number}")
                continue
            if series.joined:
                axes.plot(x, y, "-", color=colour, linewidth=1.6, label=None if series.dots else series.name)
            if series.dots or not series.joined or len(points) == 1:
                axes.plot(x, y, "o", color=colour, markersize=5, label=series.name, gid=f"dots-{place}")
        self._axes(axes, len(visible))
        return figure

    def _axes(self, axes: "Axes", count: int) -> None:
        axes.set_title(self.title, color=INK, fontsize=11, loc="left", parse_math=False)
        axes.set_xlabel(self.x, color=INK, parse_math=False)
        axes.set_ylabel(self.y, color=INK, parse_math=False)
        if self.log_x:
            axes.set_xscale("log")
        if self.log_y:
            axes.set_yscale("log")
        if self.y_range:
            axes.set_ylim(*self.y_range)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_tick_params(which="both", colors=SOFT, labelsize=9)
            if axis.get_scale() == "log":
                _plain_numbers(axis)
        if self.ticks:
            axes.set_xticks(list(self.ticks), list(self.ticks.values()), size=9 if len(self.ticks) < 6 else 7)
        axes.grid(color=LINE, which="major")
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_color(LINE)
        if len(self.series) > 1 and count:
            axes.legend(fontsize=8, labelcolor=SOFT, frameon=False)

    def _as_part_of_a_page(self, text: str) -> str:
        """matplotlib's file as an inline picture: the page's colours, a description, a title for each point."""
        text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
        for place, (_, _, points) in enumerate(self.visible()):
            titles = [f"<title>{escape(label)}</title>" for _, _, label in points]
            if self.bars:
                for number, title in enumerate(titles):
                    text = text.replace(f'<g id="bar-{place}-{number}">', f"<g>{title}")
            else:
                group = re.search(rf'<g id="dots-{place}">.*?</g>\s*</g>', text, re.DOTALL)
                text = text.replace(group[0], _titled(group[0], titles)) if group else text
        for colour, name in PAGE_COLOURS.items():
            text = text.replace(colour, f"var({name})")
        text = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", text)  # only names that something in the picture uses
        about = escape(f"{self.title}: {self.y} against {self.x}", quote=True)
        return text.replace("<svg", f'<svg role="img" aria-label="{about}"', 1)


def _titled(marks: str, titles: Sequence[str]) -> str:
    """The dots of a series, one `use` a point in their order, each with its title."""
    told = iter(titles)
    return re.sub(r"(<use [^>]*?)/>", lambda found: f"{found[1]}>{next(told)}</use>", marks)


def _plain_numbers(axis) -> None:
    """0.01 instead of 10^-2, and numbers between the powers where there are few powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    short = low > 0 and high / low < 100
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if short else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:.3g}") if high / low < 3 else NullFormatter())
