"""`crosslace VERB -m`: the verb once for every combination of settings that are given several values, one by one."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ...data.errors import UserError
from ..settings import grid, tidy
from ..terminal import Closing
from ..workspace import Job, start

MAKE_A_RUN = ("demo", "train", "import", "sweep")
"""Verbs that make what `run` names: each combination gets a folder of its own in it."""


def run_each(verb: str, words: Sequence[str], run: Callable[[Job], Closing | None]) -> int:
    """Check all combinations, then run them; the highest exit code."""
    jobs = []
    for point in grid(tidy(verb, words, several=True), leave_out=()):
        job = start(verb, point.words)
        if verb in MAKE_A_RUN and not any(word.startswith("run=") and "," in word for word in words):
            job.config.values["run"] = str(Path(job.config.values["run"]) / point.name)
        jobs.append(replace(job, progress=job.progress.named(point.name)))
    codes = []
    for job in jobs:
        try:
            with job.progress:
                closing = run(job)
        except UserError as error:
            closing = Closing(f"failed: {error}", code=2)
        if closing is not None:
            closing.title = f"{job.progress.about.strip(' ()')}: {closing.title}"
            if job.is_main:
                closing.show()
            codes.append(closing.code)
    return max(codes, default=0)
