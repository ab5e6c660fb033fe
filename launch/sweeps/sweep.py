"""`crosslace sweep`: every combination of the settings that are given several values, trained, measured, compared.

Each combination is an ordinary run below the sweep's folder. All are checked before the first begins: that its settings
fit, and that its folder is free or holds a run of just these settings. One that is complete is left alone, one that was
cut off goes on, one that was measured otherwise is measured again, and one that fails does not stop the others.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ...data.errors import UserError
from ..pages import FIGURES, write_report
from ..settings import compose_config, grid
from ..terminal import Closing, table
from ..verbs import train
from ..workspace import Job, runs
from .agent import print_for_agent
from .running import Combination, Failures, check_launcher, elsewhere, here, in_processes, queued, visible_devices

PLAN = "sweep.json"


def run(job: Job) -> Closing | None:
    """Run what is missing, then compare; or print the sweep for `wandb agent`."""
    if job.top.print:
        return print_for_agent(job)
    launcher = job.section("launcher").name
    check_launcher(launcher)
    if job.top.stack and launcher != "basic":
        raise UserError(f"stack=true trains in one process, and launcher={launcher} starts several; leave one out")
    folder = Path(job.top.run)
    runs.writable(folder)
    planned = [Combination(folder / one.name, one.words) for one in grid(job.words)]
    if job.top.jobs:
        planned = planned[: job.top.jobs]
    parts = {one.folder: part_of(job, one) for one in planned}
    check_folders(planned, parts)
    measure_again(planned, folder, job.config.values["eval"])
    runs.write_json(
        folder / PLAN,
        {"eval": job.config.values["eval"], "runs": [{"run": one.folder.name, "words": one.words} for one in planned]},
    )
    with wandb_group(folder.name):
        failed = run_all(job, [one for one in planned if not one.complete], parts)
    done, left = [one for one in planned if one.complete], [one for one in planned if queued(one.folder)]
    if not done and not left:
        raise UserError(f"no run of the sweep came to its end: {'; '.join(failed.values())}")
    notes = [f"{path.name} failed: {sentence}" for path, sentence in failed.items()]
    notes += [f"{one.folder.name} is queued by an earlier call" for one in left]
    if not done:
        return Closing("no run is complete yet", notes=notes, next=[f"crosslace report run={folder}"])
    measured = write_report([one.folder for one in done], folder / "report.html")
    rows = [(Path(m.name).name, *(m.figures[name] for name in FIGURES)) for m in measured]
    return Closing(
        f"{len(done)} of {len(planned)} runs are complete",
        tables=[table("sweep", ("run", *FIGURES), rows)],
        notes=notes,
        wrote=[(str(folder / "report.html"), "the comparison"), (str(folder / "plots"), "its pictures")],
        next=[f"crosslace report run={folder}", f"crosslace view run={folder}"],
        code=1 if failed else 0,
    )


def run_all(job: Job, waiting: Sequence[Combination], parts: dict[Path, Job]) -> Failures:
    """Where `launcher` says."""
    launcher = job.section("launcher")
    if launcher.name == "basic":
        return here(job, waiting, parts)
    if launcher.name == "processes":
        devices = visible_devices()
        return in_processes(job, waiting, launcher.jobs or max(1, len(devices)), devices)
    return elsewhere(job, waiting)


@contextmanager
def wandb_group(name: str) -> Iterator[None]:
    """W&B shows the runs as one group: `wandb.init` reads it here, and in every process that is begun meanwhile."""
    before = os.environ.get("WANDB_RUN_GROUP")
    os.environ["WANDB_RUN_GROUP"] = before or name
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_RUN_GROUP"]


def part_of(job: Job, one: Combination) -> Job:
    """A combination's own training job, checked."""
    config = compose_config("train", [*one.words, f"run={one.folder}"])
    config.check()
    config.values["eval"] = job.config.values["eval"]
    return replace(
        job,
        verb="train",
        config=config,
        words=[*one.words, f"run={one.folder}"],
        later=[word for word in job.words if word.startswith("eval.")] + job.later,
        progress=job.progress.named(one.folder.name),
    )


def check_folders(planned: Sequence[Combination], parts: dict[Path, Job]) -> None:
    """Two combinations in one folder, or a folder with a run of other settings, end the sweep before it begins."""
    names = [one.folder.name for one in planned]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two combinations would write one folder, {twice[0]}; their values differ in signs alone")
    for one in planned:
        saved = runs.saved_settings(one.folder)
        differing = runs.differences(saved, train.run_settings(parts[one.folder])) if saved else []
        if differing:
            shown = "; ".join(differing[:3]) + ("; ..." if len(differing) > 3 else "")
            raise UserError(
                f"{one.folder} holds a run with other settings ({shown}): name another folder for this sweep, "
                "or remove that run"
            )


def measure_again(planned: Sequence[Combination], folder: Path, settings: dict) -> None:
    """Where the last call measured with other settings, its figures are put aside."""
    if not (folder / PLAN).is_file():
        return
    before = runs.read_json(folder / PLAN)
    if isinstance(before, dict) and before.get("eval") != settings:
        for one in planned:
            if one.complete:
                (one.folder / "eval.json").rename(one.folder / "eval.before.json")
