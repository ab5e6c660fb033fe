"""Draw the house from its imports: writes docs/images/house.svg and the table in docs/architecture.md.

    python docs/draw_house.py

A column a room, a box a floor with its sentence and files; whatever stands lower is imported by what stands higher.
Lines inside a column join floors of one room, pale ones go to floors of an earlier room.
"""

import ast
import sys
import textwrap
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from test_house import NAMES, ROOMS, UPWARDS, floor_of, imports, room_of, tree_of  # noqa: E402

WIDTH, GAP, LINE, TOP = 300, 110, 14, 70
COLOURS = dict(zip(ROOMS, ("#2b8a3e", "#2563eb", "#9c36b5", "#d9480f")))


def floors_of(room: str) -> list[str]:
    """A room's floors, and the files that lie in the room itself."""
    return sorted({floor_of(name) for name in NAMES if name.startswith(f"{room}/") and not name.endswith("__")})


def edges() -> set[tuple[str, str]]:
    """Floor to floor; the one import that runs upwards is left out."""
    drawn = {floor for room in ROOMS for floor in floors_of(room)}
    found = {
        (floor_of(one.source), floor_of(one.target))
        for one in imports()
        if (one.source, floor_of(one.target)) not in UPWARDS
    }
    return {(a, b) for a, b in found if a != b and a in drawn and b in drawn}


def height_of(floors: list[str], joined: set[tuple[str, str]]) -> list[str]:
    """The floors from the highest to the lowest: none stands below one that it imports."""
    placed: list[str] = []
    waiting = sorted(floors)
    while waiting:
        free = [f for f in waiting if all(b in placed or b not in floors for a, b in joined if a == f)]
        placed += free or waiting[:1]
        waiting = [f for f in waiting if f not in placed]
    return placed[::-1]


def text_of(floor: str) -> list[str]:
    """A floor's sentence and its files, in lines."""
    sentence = ast.get_docstring(tree_of(NAMES[floor])) or ""
    below = [name.removeprefix(f"{floor}/") for name in NAMES if name.startswith(f"{floor}/")]
    told = [] if not below else textwrap.wrap(", ".join(sorted(below)), 46)
    return textwrap.wrap(sentence.splitlines()[0], 43), told


def draw() -> str:
    joined, places, parts, deepest = edges(), {}, [], 0.0
    for column, room in enumerate(ROOMS):
        x, y = 20 + column * (WIDTH + GAP), float(TOP)
        parts.append(f'<text x="{x}" y="44" class="room" fill="{COLOURS[room]}">{room}/</text>')
        for floor in height_of(floors_of(room), joined):
            sentence, files = text_of(floor)
            high = 26 + LINE * (len(sentence) + len(files)) + 8
            places[floor] = (x, y, high)
            parts.append(f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{high}" rx="6" stroke="{COLOURS[room]}"/>')
            lines = [("name", floor.split("/")[1]), *(("said", s) for s in sentence), *(("file", f) for f in files)]
            for number, (kind, line) in enumerate(lines):
                parts.append(f'<text x="{x + 10}" y="{y + 19 + LINE * number}" class="{kind}">{escape(line)}</text>')
            y += high + 16
        deepest = max(deepest, y)
    paths = [path_of(places, a, b) for a, b in sorted(joined)]
    size = f"0 0 {20 + len(ROOMS) * (WIDTH + GAP)} {deepest:.0f}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}"><style>{STYLE}</style>\n' + "\n".join(
        ['<rect class="paper" width="100%" height="100%"/>', *paths, *parts, "</svg>\n"]
    )


def path_of(places: dict[str, tuple[float, float, float]], a: str, b: str) -> str:
    """From the floor that imports to the one that is imported."""
    (x1, y1, h1), (x2, y2, h2) = places[a], places[b]
    y1, y2 = y1 + h1 / 2, y2 + h2 / 2
    if room_of(a) == room_of(b):
        bow = 18 + abs(y2 - y1) / 14
        x = x1 + WIDTH
        curve = f"M{x} {y1:.0f}C{x + bow:.0f} {y1:.0f} {x + bow:.0f} {y2:.0f} {x} {y2:.0f}"
        return f'<path d="{curve}" stroke="{COLOURS[room_of(a)]}"/>'
    return f'<path d="M{x1} {y1:.0f}L{x2 + WIDTH} {y2:.0f}" class="far"/>'


STYLE = """
text { font: 12px system-ui, "DejaVu Sans", sans-serif; fill: #1d2330 }
.room { font-size: 22px; font-weight: 700 } .name { font-weight: 700 } .file { fill: #667085; font-size: 11px }
.paper { fill: #fff } rect { fill: #f6f7fa } path { fill: none; stroke-width: 1.2; opacity: .7 }
.far { stroke: #c8cfda; stroke-width: 1; opacity: .5 }
"""


def table() -> str:
    """Every floor with its sentence, as a table of docs/architecture.md."""
    rows = []
    for room in ROOMS:
        rows.append(f"| **`{room}/`** | **{ast.get_docstring(tree_of(NAMES[room]))}** |")
        for floor in height_of(floors_of(room), edges())[::-1]:
            sentence = (ast.get_docstring(tree_of(NAMES[floor])) or "").splitlines()[0]
            path = f"{floor}/" if NAMES[floor].name == "__init__.py" else f"{floor}.py"
            rows.append(f"| `{path}` | {sentence} |")
    return "\n".join(["| where | what |", "|---|---|", *rows])


if __name__ == "__main__":
    (ROOT / "docs" / "images" / "house.svg").write_text(draw(), encoding="utf-8")
    page = ROOT / "docs" / "architecture.md"
    before, start, rest = page.read_text(encoding="utf-8").partition("<!-- floors -->\n")
    page.write_text(f"{before}{start}{table()}\n{rest[rest.index('<!-- end of floors -->') :]}", encoding="utf-8")
