"""`crosslace report`: one page about one evaluated run, or about many side by side.

eval.json of each run below a folder -> means over seeds (`seeds.py`), the choice (`pick.py`) -> a page (`launch/pages`)
"""

from pathlib import Path

from ..pages import FIGURES, evaluated_below, write_report
from ..terminal import Closing, table
from ..workspace import Job, runs
from .pick import choose, parse_pick
from .seeds import OverSeeds, over_seeds


def run(job: Job) -> Closing:
    """Write the page, the pictures and the table of figures."""
    top = job.top
    pick = parse_pick(top.pick) if top.pick else None
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
    shown = [table("runs", ("run", "kind", *FIGURES), rows)]
    if seeds := over_seeds(measured):
        columns = ("run of the first seed", "seeds", *FIGURES)
        shown.append(table("mean over seeds, with its 95% interval", columns, [_seed_row(one) for one in seeds]))
    if pick is None:
        return Closing("reported", tables=shown, wrote=wrote)
    chosen = choose(measured, pick)
    return Closing(
        f"{chosen.name} it is: {pick.name} {chosen.figures[pick.name]:.4g}",
        tables=shown,
        wrote=wrote,
        next=[f'crosslace trace run={chosen.name} prompt="..."', f"crosslace view run={chosen.name}"],
    )


def _seed_row(one: OverSeeds) -> tuple:
    spread = [None if pair is None else f"{pair[0]:.4g} ± {pair[1]:.2g}" for pair in one.figures.values()]
    return (one.names[0], len(one.names), *spread)
