"""`crosslace sweep`: every combination of the settings that are given several values, trained, measured, compared.

Each combination is an ordinary run below the sweep's folder. All are checked before the first begins; one that is
complete is left alone, one that was cut off goes on, and one that fails does not stop the others. The runs go one after
another here, or through a Hydra launcher (joblib, submitit here or on SLURM), each in a process of its
own.
"""

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from ...data.errors import UserError
from ..pages import FIGURES, write_report
from ..settings import Config, compose_config, grid
from ..terminal import Closing, table
from ..verbs import evaluate, train
from ..workspace import Job, runs

PLAN = "sweep.json"


@dataclass(frozen=True)
class Combination:
    """One run of a sweep."""

    folder: Path
    words: list[str]
    """Overrides, as for `crosslace train`."""

    @property
    def complete(self) -> bool:
        """Was it trained and measured?"""
        trained = (self.folder / "transcoder" / "transcoder.json").is_file()
        return trained and (self.folder / "eval.json").is_file()


def run(job: Job) -> Closing:
    """Run what is missing, then compare."""
    folder = Path(job.top.run)
    runs.writable(folder)
    planned = [Combination(folder / one.name, one.words) for one in grid(job.words)]
    if job.top.jobs:
        planned = planned[: job.top.jobs]
    parts = {one.folder: part_of(job, one) for one in planned}
    runs.write_json(folder / PLAN, [{"run": str(one.folder), "words": one.words} for one in planned])
    waiting = [one for one in planned if not one.complete]
    failed = here(job, waiting, parts) if job.section("launcher").name == "basic" else elsewhere(job, waiting)
    done = [one for one in planned if one.complete]
    if not done:
        raise UserError(f"no run of the sweep came to its end: {'; '.join(failed.values())}")
    measured = write_report([one.folder for one in done], folder / "report.html")
    rows = [(Path(m.name).name, *(m.figures[name] for name in FIGURES)) for m in measured]
    return Closing(
        f"{len(done)} of {len(planned)} runs are complete",
        tables=[table("sweep", ("run", *FIGURES), rows)],
        notes=[f"{path.name} failed: {sentence}" for path, sentence in failed.items()],
        wrote=[(str(folder / "report.html"), "the comparison"), (str(folder / "plots"), "its pictures")],
        next=[f"crosslace report run={folder}", f"crosslace view run={folder}"],
        code=1 if failed else 0,
    )


def part_of(job: Job, one: Combination) -> Job:
    """A combination's own training job, checked."""
    config = compose_config("train", [*one.words, f"run={one.folder}"])
    config.check()
    config.values["eval"] = job.config.values["eval"]
    return replace(job, verb="train", config=config, progress=job.progress.named(one.folder.name))


def here(job: Job, waiting: list[Combination], parts: dict[Path, Job]) -> dict[Path, str]:
    """One after another in this process; what failed, and why."""
    failed: dict[Path, str] = {}
    for number, one in enumerate(waiting):
        job.progress("sweep", number, len(waiting), one.folder.name)
        part = parts[one.folder]
        try:
            result = train.fit(part, one.folder)
            if result is not None and result.status != "finished":
                raise KeyboardInterrupt
            evaluate.run(replace(part, verb="eval", config=_as_eval(part.config, one.folder)))
        except UserError as error:
            failed[one.folder] = str(error)
    job.progress("sweep", len(waiting), len(waiting))
    return failed


def _as_eval(config: Config, folder: Path) -> Config:
    """The same settings for the verb that measures."""
    found = Config("eval", config.values, config.given)
    found.base_on(runs.saved_settings(folder))
    return found


def elsewhere(job: Job, waiting: list[Combination]) -> dict[Path, str]:
    """Through a Hydra launcher, a process a run; what failed, and why."""
    if not waiting:
        return {}
    settings, folder = job.section("launcher"), Path(job.top.run).resolve()
    evaluation = [word for word in job.words if word.startswith("eval.")]
    plan = [{"words": [*one.words, f"run={one.folder}"], "eval": [f"run={one.folder}", *evaluation]} for one in waiting]
    runs.write_json(folder / "launched.json", plan)
    options = [f"hydra.launcher.{name}={value}" for name, value in settings.options.items()]
    launched = subprocess.run(
        [
            *(sys.executable, "-m", f"{__package__}.sweep_job", "--multirun"),
            f"hydra/launcher={settings.name}",
            *options,
            f"hydra.sweep.dir={folder / 'launcher'}",
            f"+plan={folder / 'launched.json'}",
            f"+number={','.join(str(i) for i in range(len(plan)))}",
        ],
        check=False,
        capture_output=True,
        text=True,
    )
    failed = {one.folder: f"see {folder / 'launcher'}" for one in waiting if not one.complete}
    if failed and launched.returncode and len(failed) == len(waiting):
        raise UserError(f"launcher {settings.name} could not run the sweep: {_reason(launched.stderr)}")
    return failed


def _reason(stderr: str) -> str:
    """The line that says what was wrong: the last of a traceback, the first of Hydra's own messages."""
    lines = [line for line in stderr.strip().splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line]
    return (lines[-1 if "Traceback" in stderr else 0] if lines else "it gave no message").strip()
