"""`crosslace view`: the local page."""

from pathlib import Path

from ..data.errors import UserError
from .job import Job
from .terminal import Closing


def run(job: Job) -> Closing | None:
    """Serve until Ctrl-C."""
    from ..circuit.viewer.server import serve

    folder = Path(job.top.run)
    if not folder.is_dir():
        raise UserError(f"there is no run at {folder}; run takes a run, or a folder of runs")
    try:
        serve(folder, job.section("view"))
    except KeyboardInterrupt:
        print("stopped")
