"""`crosslace runs`: which runs there are, how each stands, and in what two of them differ."""

from pathlib import Path

from ...data.errors import UserError
from ..pages import FIGURES, read_measured
from ..terminal import Closing, table
from ..workspace import Job, runs
from .pick import parse_conditions


def run(job: Job) -> Closing:
    """List the runs below a folder, those that meet the conditions; or compare the settings of two."""
    top = job.top
    if top.compare:
        return compared(*map(Path, top.compare))
    folder = Path(top.run)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; runs lie in runs/ unless you named another place")
    conditions = parse_conditions(top.where)
    wanted = dict(part.strip().split("=", 1) for part in top.having.split(" and ") if part.strip())
    rows = []
    for path in runs.below(folder):
        figures = known_figures(path)
        settings = runs.flat(runs.saved_settings(path))
        if any(condition.miss(figures) for condition in conditions):
            continue
        if any(str(settings.get(name)) != value for name, value in wanted.items()):
            continue
        state, why = runs.state_of(path)
        rows.append((str(path), state, why, *(figures.get(name) for name in ("l0", "nmse", "kl", "dead"))))
    if not rows:
        return Closing(f"no run below {folder} is like that")
    return Closing(
        f"{len(rows)} runs",
        tables=[table("runs", ("run", "state", "", "l0", "nmse", "kl", "dead"), rows)],
        next=[f"crosslace report run={folder}"],
    )


def known_figures(path: Path) -> dict[str, float | None]:
    """A run's figures, where it was evaluated and its file can be read."""
    if not (path / "eval.json").is_file():
        return dict.fromkeys(FIGURES)
    try:
        return read_measured(path).figures
    except UserError:
        return dict.fromkeys(FIGURES)


def compared(first: Path, second: Path) -> Closing:
    """The settings in which two runs differ."""
    for path in (first, second):
        if not (path / "config.yaml").is_file():
            raise UserError(f"{path} is not a run: it has no config.yaml")
    one, other = (runs.flat(runs.saved_settings(path)) for path in (first, second))
    names = sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
    rows = [(name, str(one.get(name, "")), str(other.get(name, ""))) for name in names]
    if not rows:
        return Closing(f"{first} and {second} have the same settings")
    return Closing(f"{len(rows)} settings differ", tables=[table("settings", ("", str(first), str(second)), rows)])
