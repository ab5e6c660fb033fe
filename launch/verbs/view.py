"""`crosslace view`: the local page."""

from contextlib import suppress
from pathlib import Path

from ...data.errors import UserError
from ..terminal import Closing
from ..workspace import Job


def run(job: Job) -> Closing | None:
    """Serve until Ctrl-C."""
    from ...circuit.viewer import serve

    folder = Path(job.top.run)
    if not folder.is_dir():
        raise UserError(f"there is no run at {folder}; run takes a run, or a folder of runs")
    if job.top.html:
        return written(folder, job.top.graph, Path(job.top.html))
    with suppress(KeyboardInterrupt):  # that is how one leaves
        serve(folder, job.section("view"), announce)
    return None


def written(folder: Path, graph: str, path: Path) -> Closing:
    """Write one graph's page as one file."""
    from ...circuit.viewer import Runs, save_page

    found = [run for run in Runs(folder).all().values() if graph in run.graphs()]
    if len(found) != 1:
        where = f"no run at {folder} has"
        if found:
            where = f"{len(found)} runs at {folder} ({', '.join(run.name for run in found)}) have"
        raise UserError(f"{where} a graph {graph}; name the run that holds it with run=")
    save_page(found[0], graph, path)
    return Closing("written", wrote=[(str(path), "the graph's page, which opens from disk")])


def announce(address: str) -> None:
    """Say where the page is."""
    print(f"{address} shows it; Ctrl-C ends", flush=True)
