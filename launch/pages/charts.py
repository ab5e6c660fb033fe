"""Charts, tables and pages as one self-contained file: inline SVG that follows the reader's light or dark colours.

Everything that comes from data is escaped here, so callers pass plain text. The same series can be drawn as a PNG for
a paper with `save_png`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 520, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 46
COLOURS = 8

STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #667085; --line: #d9dee7; --paper: #ffffff;
  --panel: #f6f7fa; --c0: #2563eb; --c1: #d9480f; --c2: #2b8a3e; --c3: #9c36b5; --c4: #0b7285; --c5: #c2255c;
  --c6: #846358; --c7: #495057; --good: #2b8a3e; --bad: #c92a2a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9f0; --soft: #98a2b3; --line: #343b49; --paper: #14171e;
  --panel: #1c212b; --c0: #74a7ff; --c1: #ff9f5a; --c2: #69db7c; --c3: #da9cf0; --c4: #66d9e8; --c5: #faa2c1;
  --c6: #c9ab9c; --c7: #adb5bd; --good: #69db7c; --bad: #ff8787; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 28px 20px 60px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 36px 0 8px; }
p.lead { color: var(--soft); margin: 0 0 18px; max-width: 75ch; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 18px; }
figure { margin: 0; background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 10px; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: 13px; padding: 4px 6px 2px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 5px 12px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
th[data-sort] { cursor: pointer; } th[aria-sort=ascending]::after { content: " \\2191"; }
th[aria-sort=descending]::after { content: " \\2193"; }
.notice { border-left: 4px solid var(--c1); background: var(--panel); padding: 8px 14px;
  margin: 8px 0; border-radius: 4px; }
.notice.good { border-color: var(--good); } code { font-size: 13px; }
details { margin: 8px 0; } summary { cursor: pointer; }
svg text { fill: var(--ink); font-size: 12px; } svg .soft { fill: var(--soft); } svg .axis { stroke: var(--line); }
"""

SORT_SCRIPT = """
for (const table of document.querySelectorAll('table.sortable')) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.dataset.sort = ''; head.tabIndex = 0;
    const sort = () => {
      const up = head.getAttribute('aria-sort') !== 'ascending';
      heads.forEach(h => h.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
      const key = row => { const c = row.cells[column]; const v = c.dataset.value ?? c.textContent;
        return v === '' || isNaN(v) ? v : Number(v); };
      [...table.tBodies[0].rows].sort((a, b) => { const x = key(a), y = key(b);
        return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1); }).forEach(r => table.tBodies[0].append(r));
    };
    head.addEventListener('click', sort);
    head.addEventListener('keydown', e => { if (e.key === 'Enter' || e.key === ' ') { e.preventDefault(); sort(); } });
  });
}
"""


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

    def finite(self) -> list[tuple[float, float, str]]:
        labels = list(self.labels) or [""] * len(self.points)
        return [(x, y, label) for (x, y), label in zip(self.points, labels) if math.isfinite(x) and math.isfinite(y)]


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

    def visible(self) -> list[tuple[int, Series, list[tuple[float, float, str]]]]:
        """Series that have points to draw, with their colour numbers; logarithmic axes leave out what is not > 0."""
        kept = []
        for number, series in enumerate(self.series):
            points = [p for p in series.finite() if (not self.log_x or p[0] > 0) and (not self.log_y or p[1] > 0)]
            if points:
                kept.append((number % COLOURS, series, points))
        return kept

    def svg(self) -> str:
        """The chart as one `<figure>`."""
        visible = self.visible()
        if not visible:
            return f"<figure><figcaption><b>{escape(self.title)}</b>: nothing to draw</figcaption></figure>"
        xs = [x for _, _, points in visible for x, _, _ in points]
        ys = [y for _, _, points in visible for _, y, _ in points]
        x_axis = _Axis(xs, self.log_x, LEFT, WIDTH - RIGHT, pad=0.5 if self.bars else None)
        y_values = [*ys, *(self.y_range or ())] + ([0.0] if self.bars and not self.log_y else [])
        y_axis = _Axis(y_values, self.log_y, HEIGHT - BOTTOM, TOP)
        parts = [*self._frame(x_axis, y_axis)]
        for place, (colour, series, points) in enumerate(visible):
            parts += self._marks(colour, series, points, x_axis, y_axis, place, len(visible))
        parts += _legend([(colour, series.name) for colour, series, _ in visible]) if len(self.series) > 1 else []
        caption = f"<figcaption>{escape(self.caption)}</figcaption>" if self.caption else ""
        label = escape(f"{self.title}: {self.y} against {self.x}", quote=True)
        return (
            f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
            f"{caption}</figure>"
        )

    def _frame(self, x_axis: "_Axis", y_axis: "_Axis") -> list[str]:
        parts = [f'<text x="{LEFT}" y="16" font-weight="600">{escape(self.title)}</text>']
        for value, name in y_axis.ticks():
            y = y_axis(value)
            parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="soft" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{name}</text>')
        for value, name in self.ticks.items() if self.ticks else x_axis.ticks():
            x = x_axis(value)
            parts.append(
                f'<text class="soft" x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{escape(name)}</text>'
            )
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(self.x)}</text>')
        height = (TOP + HEIGHT - BOTTOM) / 2
        parts.append(
            f'<text transform="translate(14 {height}) rotate(-90)" text-anchor="middle">{escape(self.y)}</text>'
        )
        return parts

    def _marks(self, colour, series, points, x_axis, y_axis, place, count) -> list[str]:
        fill = f"var(--c{colour})"
        if self.bars:
            slot = max(1.0, 0.8 * x_axis.unit / count)
            floor = HEIGHT - BOTTOM
            return [
                f'<rect x="{x_axis(x) - slot * count / 2 + place * slot:.1f}" y="{min(y_axis(y), floor):.1f}"'
                f' width="{slot:.1f}" height="{abs(floor - y_axis(y)):.1f}" fill="{fill}">'
                f"<title>{escape(label or f'{series.name}: {y:.4g}')}</title></rect>"
                for x, y, label in points
            ]
        parts = []
        if series.joined and len(points) > 1:
            path = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y, _ in points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{fill}" stroke-width="1.8"/>')
        if series.dots or len(points) == 1:
            parts += [
                f'<circle cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="4" fill="{fill}">'
                f"<title>{escape(label or f'{series.name}: {x:.4g}, {y:.4g}')}</title></circle>"
                for x, y, label in points
            ]
        return parts

    def save_png(self, path: Path) -> None:
        """The same chart for a paper, drawn by matplotlib."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.2, 3.4), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        visible = self.visible()
        for place, (_, series, points) in enumerate(visible):
            x, y = [p[0] for p in points], [p[1] for p in points]
            if self.bars:
                wide = 0.8 / len(visible)
                axes.bar([v + (place - (len(visible) - 1) / 2) * wide for v in x], y, wide, label=series.name)
            else:
                axes.plot(x, y, ("o" if series.dots else "") + ("-" if series.joined else ""), label=series.name, ms=4)
        axes.set(title=self.title, xlabel=self.x, ylabel=self.y)
        if self.log_x:
            axes.set_xscale("log")
        if self.log_y:
            axes.set_yscale("log")
        if self.ticks:
            axes.set_xticks(list(self.ticks), list(self.ticks.values()))
        if len(self.series) > 1 and visible:
            axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
        figure.savefig(path)


class _Axis:
    """Data to pixels, linear or logarithmic, with room at both ends."""

    def __init__(self, values: Sequence[float], log: bool, start: float, stop: float, pad: float | None = None):
        self.log, self.start, self.stop = log, start, stop
        placed = [math.log10(v) for v in values] if log else list(values)
        low, high = min(placed), max(placed)
        room = pad if pad is not None else 0.05 * (high - low) or (0.3 if log else 0.1 * abs(high) or 1.0)
        lifted = low >= 0 and not log and pad is None  # do not cross zero for the sake of room
        self.low, self.high = (max(0.0, low - room) if lifted else low - room), high + room

    @property
    def unit(self) -> float:
        """Pixels that a step of one takes."""
        return abs(self.stop - self.start) / (self.high - self.low)

    def __call__(self, value: float) -> float:
        placed = math.log10(value) if self.log else value
        return self.start + (placed - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Round places to name, about five."""
        if self.log:
            low, high = math.floor(self.low), math.ceil(self.high)
            factors = (1,) if high - low > 3 else (1, 2, 5)
            places = [f * 10.0**p for p in range(low, high + 1) for f in factors]
            inside = [v for v in places if self.low <= math.log10(v) <= self.high]
            if len(inside) > 1:
                return [(v, f"{v:g}") for v in inside]
        bottom, top = (10**self.low, 10**self.high) if self.log else (self.low, self.high)  # a short stretch is linear
        rough = (top - bottom) / 5
        size = 10 ** math.floor(math.log10(rough))
        step = next(size * f for f in (1, 2, 5, 10) if size * f >= rough)
        first = math.ceil(bottom / step - 1e-9)
        return [(i * step, f"{i * step:.6g}") for i in range(first, math.floor(top / step + 1e-9) + 1)]


def _legend(names: Sequence[tuple[int, str]]) -> list[str]:
    parts, x = [], LEFT + 2.0
    for colour, name in names:
        parts.append(f'<rect x="{x:.0f}" y="23" width="9" height="9" rx="2" fill="var(--c{colour})"/>')
        parts.append(f'<text class="soft" x="{x + 13:.0f}" y="32">{escape(name)}</text>')
        x += 26 + 6.6 * len(name)
    return parts


def table(heads: Sequence[str], rows: Sequence[Sequence[object]], sortable: bool = False, digits: int = 4) -> str:
    """Rows as an HTML table; numbers are rounded for show and keep their value for sorting; None shows as a dash."""
    head = "".join(f"<th>{escape(str(name))}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(_cell(value, digits) for value in row)}</tr>" for row in rows)
    kind = ' class="sortable"' if sortable else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: object, digits: int) -> str:
    if value is None:
        return "<td>–</td>"
    if isinstance(value, float):
        return f'<td data-value="{value!r}">{value:.{digits}g}</td>'
    return f"<td>{escape(str(value))}</td>"


def notice(text: str, good: bool = False) -> str:
    """One sentence that must not be overlooked."""
    return f'<p class="notice{" good" if good else ""}">{escape(text)}</p>'


def grid(figures: Sequence[str]) -> str:
    """Figures side by side where there is room."""
    return f'<div class="grid">{"".join(figures)}</div>'


def page(title: str, lead: str, body: str) -> str:
    """One HTML file that needs nothing else: no network, no script from elsewhere."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>{body}'
        f"<script>{SORT_SCRIPT}</script></body></html>"
    )
