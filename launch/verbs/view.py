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
    with suppress(KeyboardInterrupt):  # that is how one leaves
        serve(folder, job.section("view"), announce)
    return None


def announce(address: str) -> None:
    """Say where the page is."""
    print(f"{address} shows it; Ctrl-C ends", flush=True)
