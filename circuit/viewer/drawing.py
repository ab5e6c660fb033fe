"""A circuit as a picture: boxes by layer and position, joined by curves, in one self-contained SVG.

This half knows nothing of graphs: it places boxes and draws them. `picture.py` says which boxes there are.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

LIGHT = {
    "paper": "#fcfbf8", "ink": "#20242f", "soft": "#7b8190", "guide": "#ebe7de", "edge": "#9aa7c7",
    "positive": "#4166d5", "negative": "#d2622f",
    "feature": "#eaf0ff", "feature-line": "#6f8fe8", "logit": "#e2f5ea", "logit-line": "#3fa26d",
    "embedding": "#f8f0dd", "embedding-line": "#cdb27a",
}  # fmt: skip
DARK = {
    "paper": "#15181f", "ink": "#e8eaf0", "soft": "#969dad", "guide": "#252a35", "edge": "#5b6784",
    "positive": "#86a5ff", "negative": "#f0935f",
    "feature": "#1e2942", "feature-line": "#6788e0", "logit": "#173328", "logit-line": "#4fbb83",
    "embedding": "#332b1a", "embedding-line": "#a58c55",
}  # fmt: skip
FONT = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

ROW_HEIGHT, BOX_HEIGHT, CHIP_HEIGHT = 104, 46, 30
GAP, STACK_GAP, MARGIN, RULER = 20, 22, 28, 74
NOTE_HEIGHT = 16


@dataclass(eq=False)
class Box:
    """One node of the picture, or several drawn as a stack."""

    key: str
    title: str
    note: str
    kind: str
    """feature or logit: the tokens of the prompt have boxes of their own."""
    row: int
    """0 is the lowest layer."""
    position: int
    members: int = 1
    x: float = 0.0
    y: float = 0.0
    width: float = field(default=0.0)


@dataclass(frozen=True)
class Line:
    """An edge between two boxes; a source `token:3` is the prompt's fourth token."""

    source: str
    target: str
    strength: float
    """-1 to 1, relative to the picture's strongest."""
    on_path: bool = False


def token_key(position: int) -> str:
    return f"token:{position}"


def draw(
    boxes: Sequence[Box],
    lines: Sequence[Line],
    tokens: Sequence[str],
    rows: Sequence[str],
    title: str,
    theme: str,
    notes: Sequence[str] = (),
    kept: Mapping[int, str] | None = None,
) -> str:
    """Place everything and write the SVG: `rows` names the layers from the lowest up; `theme`: auto, light or dark;
    `notes` stand in small type at the foot; `kept` are the positions that are left to the model, and why."""
    chips = [
        Box(token_key(position), _shown(token), "", "embedding", -1, position) for position, token in enumerate(tokens)
    ]
    everything = {box.key: box for box in [*chips, *boxes]}
    lines = [line for line in lines if line.source in everything and line.target in everything]
    head = 54 if title else 16
    *middles, height = _place(boxes, chips, lines, len(rows), head)
    width = max([box.x + box.width for box in everything.values()], default=300.0) + MARGIN + 14
    texts = [text_width(title, 17), *(text_width(note, 11) for note in notes)]
    width = max(width, *(text + 2 * MARGIN for text in texts))

    used = {line.source for line in lines}
    parts = [_guides(rows, middles, chips, width)]
    parts += _curves(lines, everything)
    parts += [_chip(chip, chip.key in used, (kept or {}).get(chip.position)) for chip in chips]
    parts += [_box(box) for box in boxes]
    if title:
        parts.append(f'<text class="ink" x="{MARGIN}" y="36" font-size="17" font-weight="600">{_text(title)}</text>')
    for note in notes:
        parts.append(f'<text class="soft" x="{MARGIN}" y="{height - 8:.1f}" font-size="11">{_text(note)}</text>')
        height += NOTE_HEIGHT
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img" aria-label="{_text(title or "attribution graph")}" '
        f'font-family="{FONT}">\n{_style(theme)}\n'
        f'<rect class="paper" width="100%" height="100%" rx="14"/>\n{body}\n</svg>'
    )


# --- placing ------------------------------------------------------------------------------------------------


def _place(boxes: Sequence[Box], chips: list[Box], lines: Sequence[Line], n_rows: int, head: float) -> list[float]:
    """Set every box's place; the middle of each row, then the height of the whole."""
    cells: dict[tuple[int, int], list[Box]] = {}
    for box in boxes:
        box.width = max(text_width(box.title, 13.5, bold=True), text_width(box.note, 11)) + 30
        cells.setdefault((box.row, box.position), []).append(box)
    fed = _fed_from(boxes, lines)
    stacks = {key: _stacked(sorted(cell, key=fed.__getitem__), key[0] == n_rows - 1) for key, cell in cells.items()}
    middles, y = [0.0] * n_rows, head
    for row in reversed(range(n_rows)):
        deepest = max([len(stack) for (other, _), stack in stacks.items() if other == row], default=1)
        height = ROW_HEIGHT + (deepest - 1) * (BOX_HEIGHT + STACK_GAP)
        middles[row] = y + height / 2
        y += height
    x, floor = float(RULER + MARGIN), y + 8
    for chip in chips:
        chip.width, chip.y = max(text_width(chip.title, 13) + 20, 30), floor
        here = [(row, stack) for (row, position), stack in stacks.items() if position == chip.position]
        column = max([chip.width, *(_span(line) for _, stack in here for line in stack)])
        chip.x = x + (column - chip.width) / 2
        for row, stack in here:
            _place_stack(stack, x + column / 2, middles[row])
        x += column + (GAP if here else 8)
    return [*middles, floor + CHIP_HEIGHT + MARGIN]


def _stacked(cell: list[Box], is_top: bool) -> list[list[Box]]:
    """The boxes of a cell in lines of few, so that a crowded position does not push the others apart."""
    per_line = len(cell) if is_top else 1 if len(cell) <= 3 else 2
    return [cell[start : start + per_line] for start in range(0, len(cell), per_line)]


def _span(line: list[Box]) -> float:
    return sum(box.width for box in line) + GAP * (len(line) - 1)


def _place_stack(stack: list[list[Box]], x: float, y: float) -> None:
    step = BOX_HEIGHT + STACK_GAP
    for number, line in enumerate(stack):
        at = x - _span(line) / 2
        for box in line:
            box.x, box.y, at = at, y - BOX_HEIGHT / 2 + (number - (len(stack) - 1) / 2) * step, at + box.width + GAP


def _fed_from(boxes: Sequence[Box], lines: Sequence[Line]) -> dict[Box, float]:
    """From about which position each box is fed: boxes of a cell stand in this order, so that fewer curves cross."""
    position = {box.key: float(box.position) for box in boxes}
    position |= {line.source: float(line.source[6:]) for line in lines if line.source.startswith("token:")}
    return {
        box: _mean([position[line.source] for line in lines if line.target == box.key], box.position) for box in boxes
    }


def _middle(box: Box) -> float:
    return box.x + box.width / 2


def _mean(values: list[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


# --- drawing ------------------------------------------------------------------------------------------------


def _guides(rows: Sequence[str], middles: Sequence[float], chips: list[Box], width: float) -> str:
    parts = []
    for name, y in zip(rows, middles, strict=True):
        parts.append(f'<line class="guide" x1="{RULER}" x2="{width - MARGIN:.0f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="soft" x="{MARGIN}" y="{y + 4:.1f}" font-size="11">{_text(name)}</text>')
    if chips:
        y = chips[0].y + CHIP_HEIGHT / 2
        parts.append(f'<text class="soft" x="{MARGIN}" y="{y + 4:.1f}" font-size="11">prompt</text>')
    return "\n".join(parts)


def _curves(lines: Sequence[Line], everything: dict[str, Box]) -> list[str]:
    """Curves leave at a box's top and enter at its bottom, spread so that they do not lie on each other."""
    starts = _ports(lines, everything, "source")
    ends = _ports(lines, everything, "target")
    parts = []
    for line in sorted(lines, key=lambda line: (line.on_path, abs(line.strength))):
        source, target = everything[line.source], everything[line.target]
        x1, x2 = starts[line], ends[line]
        path = _path(source, target, x1, x2, everything.values())
        size = abs(line.strength)
        sign = "negative" if line.strength < 0 else "positive"
        kind = sign if line.on_path or line.strength < 0 else "edge"
        opacity = 0.95 if line.on_path else 0.3 + 0.45 * size
        parts.append(
            f'<path class="{kind}" d="{path}" fill="none" stroke-width="{1 + 4.5 * size:.2f}" '
            f'stroke-opacity="{opacity:.2f}" stroke-linecap="round"{_dashes(line)}/>'
        )
    return parts


def _path(source: Box, target: Box, x1: float, x2: float, boxes: Iterable[Box]) -> str:
    y1, y2 = source.y, target.y + BOX_HEIGHT
    if source.row >= target.row:  # grouped boxes may stand level: the curve dips under both
        y1 = source.y + BOX_HEIGHT
        return f"M{x1:.1f} {y1:.1f}C{x1:.1f} {y1 + 26:.1f} {x2:.1f} {y2 + 26:.1f} {x2:.1f} {y2:.1f}"
    between = [box for box in boxes if source.row < box.row < target.row and _covers(box, x1, x2)]
    if not between:
        bend = max(24.0, (y1 - y2) * 0.5)
        return f"M{x1:.1f} {y1:.1f}C{x1:.1f} {y1 - bend:.1f} {x2:.1f} {y2 + bend:.1f} {x2:.1f} {y2:.1f}"
    # Around the boxes in the way, on the nearer side: up beside them, then on to the target.
    left, right = min(box.x for box in between) - 14, max(box.x + box.width for box in between) + 14 + 8
    side = left if abs(x1 - left) + abs(x2 - left) < abs(x1 - right) + abs(x2 - right) else right
    low, high = max(box.y for box in between) + BOX_HEIGHT, min(box.y for box in between)
    return (
        f"M{x1:.1f} {y1:.1f}C{x1:.1f} {y1 - 22:.1f} {side:.1f} {low + 26:.1f} {side:.1f} {low - 4:.1f}"
        f"L{side:.1f} {high + 4:.1f}C{side:.1f} {high - 26:.1f} {x2:.1f} {y2 + 22:.1f} {x2:.1f} {y2:.1f}"
    )


def _covers(box: Box, x1: float, x2: float) -> bool:
    """Whether a straight line from x1 to x2 would pass behind the box, roughly."""
    return box.x - 6 < (x1 + x2) / 2 < box.x + box.width + 6


def _dashes(line: Line) -> str:
    return ' stroke-dasharray="5 6"' if line.strength < 0 else ""


def _ports(lines: Sequence[Line], everything: dict[str, Box], end: str) -> dict[Line, float]:
    other = "target" if end == "source" else "source"
    places: dict[Line, float] = {}
    for key in {getattr(line, end) for line in lines}:
        box = everything[key]
        here = [line for line in lines if getattr(line, end) == key]
        here.sort(key=lambda line: _middle(everything[getattr(line, other)]))
        room = box.width * 0.6
        for place, line in enumerate(here):
            places[line] = _middle(box) + room * ((place + 0.5) / len(here) - 0.5)
    return places


def _chip(chip: Box, used: bool, kept: str | None) -> str:
    """A token; grey and dashed where it holds no features because it is left to the model."""
    fade = "" if used or kept else ' opacity="0.55"'
    look = 'class="kept" stroke-dasharray="4 3"' if kept else 'class="embedding"'
    why = f"<title>left to the model, without features: {_text(kept)}</title>" if kept else ""
    return (
        f'<g{fade}>{why}<rect {look} x="{chip.x:.1f}" y="{chip.y:.1f}" width="{chip.width:.1f}" '
        f'height="{CHIP_HEIGHT}" rx="8"/><text class="{"soft" if kept else "ink"}" x="{_middle(chip):.1f}" '
        f'y="{chip.y + 20:.1f}" font-size="13" text-anchor="middle">{_text(chip.title)}</text></g>'
    )


def _box(box: Box) -> str:
    """A group is drawn as a small stack of cards."""
    cards = [
        f'<rect class="{box.kind}" x="{box.x + 4 * back:.1f}" y="{box.y - 4 * back:.1f}" width="{box.width:.1f}" '
        f'height="{BOX_HEIGHT}" rx="11"/>'
        for back in reversed(range(min(box.members, 3)))
    ]
    middle = _middle(box)
    rise = 20 if box.note else 28
    text = [
        f'<text class="ink" x="{middle:.1f}" y="{box.y + rise:.1f}" font-size="13.5" font-weight="600" '
        f'text-anchor="middle">{_text(box.title)}</text>'
    ]
    if box.note:
        text.append(
            f'<text class="soft" x="{middle:.1f}" y="{box.y + 36:.1f}" font-size="11" text-anchor="middle">'
            f"{_text(box.note)}</text>"
        )
    return f"<g>{''.join(cards + text)}</g>"


def _style(theme: str) -> str:
    def rules(colours: dict[str, str]) -> str:
        lines = [
            f".paper{{fill:{colours['paper']}}}.ink{{fill:{colours['ink']}}}.soft{{fill:{colours['soft']}}}",
            f".guide{{stroke:{colours['guide']};stroke-width:1}}",
        ]
        lines += [f".{kind}{{stroke:{colours[kind]}}}" for kind in ("edge", "positive", "negative")]
        lines += [
            f".{kind}{{fill:{colours[kind]};stroke:{colours[kind + '-line']};stroke-width:1.3}}"
            for kind in ("feature", "logit", "embedding")
        ]
        lines.append(f".kept{{fill:none;stroke:{colours['soft']}}}")
        return "".join(lines)

    if theme == "auto":
        return f"<style>{rules(LIGHT)}@media (prefers-color-scheme: dark){{{rules(DARK)}}}</style>"
    return f"<style>{rules(DARK if theme == 'dark' else LIGHT)}</style>"


# --- text ---------------------------------------------------------------------------------------------------


def text_width(text: str, size: float, bold: bool = False) -> float:
    """About how wide a sans-serif text is: no font is at hand to ask."""
    narrow, wide = set("iIjl.,:;'|!()[]tfr /"), set("mwMW@%—<>=+")
    units = sum(
        0.34 if c in narrow else 0.88 if c in wide else 0.69 if c.isupper() else 1.0 if ord(c) > 0x2E80 else 0.56
        for c in text
    )
    return units * size * (1.05 if bold else 1.0)


def _shown(token: str) -> str:
    """A token as people read it: the blank in front of a word is not shown, other white space is."""
    bare = token[1:] if token.startswith(" ") and token.strip() else token
    return bare.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "∅"


def _text(text: str) -> str:
    """Text for markup: escaped, and without the control characters that XML has no form for."""
    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text), quote=True)
