"""How the runs of a sweep run: one after another here, in processes of this machine, or through a Hydra launcher.

Each way ends in the same answer: which runs failed, and why. One failure, of memory too, stops nobody.
"""

import gc
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ...data.errors import UserError
from ..after import follow
from ..settings import Config
from ..verbs import evaluate, train
from ..workspace import Job, append_error, recorded, runs
from .stack import groups, train_together

LOG = "sweep.log"
QUEUED = ".queued"
STALE_HOURS = 72
"""A queued mark older than this is of a job that never came."""


@dataclass(frozen=True)
class Combination:
    """One run of a sweep."""

    folder: Path
    words: list[str]
    """Overrides, as for `crosslace train`."""

    @property
    def trained(self) -> bool:
        return (self.folder / "transcoder" / "transcoder.json").is_file()

    @property
    def complete(self) -> bool:
        """Was it trained and measured?"""
        return self.trained and (self.folder / "eval.json").is_file()


Failures = dict[Path, str]


def here(job: Job, waiting: Sequence[Combination], parts: dict[Path, Job]) -> Failures:
    """In this process: one after another, or those that can side by side."""
    failed: Failures = {}
    if job.top.stack:
        for group in groups(parts, [one.folder for one in waiting if not one.trained]):
            # no error outlives this line: its traceback holds the training that it ended
            failed |= {folder: _reason_of(error, folder, parts[folder]) for folder, error in
                       train_together(parts, group).items()}  # fmt: skip
            _give_memory_back()
    for number, one in enumerate(one for one in waiting if one.folder not in failed):
        job.progress("sweep", number, len(waiting), one.folder.name)
        try:
            _train_and_measure(parts[one.folder], one)
        except Exception as error:
            failed[one.folder] = _reason_of(error, one.folder, parts[one.folder])
        _give_memory_back()
    job.progress("sweep", len(waiting), len(waiting))
    return failed


def _reason_of(error: Exception, folder: Path, part: Job) -> str:
    """A sentence for the sweep's table; what is no mistake of the user's leaves its traceback in the run."""
    if isinstance(error, UserError):
        return str(error)
    append_error(folder, ["train", *part.words], "".join(traceback.format_exception(error)))
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def _train_and_measure(part: Job, one: Combination) -> None:
    if train.trained_steps(one.folder) < part.section("trainer").steps:
        with recorded(str(one.folder), ["train", *part.words]):
            result = train.fit(part, one.folder)
        if result is not None and result.status != "finished":
            raise KeyboardInterrupt
    config = Config("eval", part.config.values | {"overwrite": False}, part.config.given)
    config.base_on(runs.saved_settings(one.folder))
    with recorded(str(one.folder), ["eval", *(word for word in part.words if word.startswith("run="))]):
        evaluate.run(replace(part, verb="eval", config=config))
    if part.section("then").do:
        follow(part, one.folder, leave_out=("eval",))


def _give_memory_back() -> None:
    """Between two runs: the last one's weights and moments must not stand beside the next one's."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- processes of this machine -------------------------------------------------------------------------------


def in_processes(job: Job, waiting: Sequence[Combination], count: int, devices: Sequence[int]) -> Failures:
    """`count` runs at once, each a process; where there are GPUs, each on one of its own."""
    free: SimpleQueue[int | None] = SimpleQueue()
    for place in range(count):
        free.put(devices[place % len(devices)] if devices else None)
    done: list[Path] = []

    def one_run(one: Combination) -> str | None:
        device = free.get()
        try:
            return _commands(one, job, device_environment(device, count))
        finally:
            free.put(device)
            done.append(one.folder)
            job.progress("sweep", len(done), len(waiting), one.folder.name)

    job.progress("sweep", 0, len(waiting), f"{count} at once")
    with ThreadPoolExecutor(count) as pool:
        reasons = list(pool.map(one_run, waiting))
    return {one.folder: reason for one, reason in zip(waiting, reasons) if reason is not None}


def device_environment(device: int | None, count: int) -> dict[str, str]:
    """A process sees one GPU, or its share of the cores."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name for name in shown.split(",") if name]
    if device is not None:
        return {"CUDA_VISIBLE_DEVICES": names[device] if device < len(names) else str(device)}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // count))}


def commands_of(one: Combination, job: Job) -> list[list[str]]:
    """What a run is: two ordinary commands."""
    run, measuring = f"run={one.folder}", [word for word in job.words if word.startswith("eval.")]
    return [["train", *one.words, *job.later, run], ["eval", run, *measuring]]


def _commands(one: Combination, job: Job, environment: dict[str, str]) -> str | None:
    """Both commands, their output in the run's folder; the reason where one failed."""
    for verb in commands_of(one, job):
        done = subprocess.run(
            [sys.executable, "-m", "crosslace.launch", *verb],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        one.folder.mkdir(parents=True, exist_ok=True)
        with open(one.folder / LOG, "a", encoding="utf-8") as file:
            file.write(f"$ crosslace {' '.join(verb)}\n{done.stdout}{done.stderr}")
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("crosslace: ")]
            if not one.folder.joinpath("config.yaml").exists():
                (one.folder / LOG).unlink()  # refused before it began: its folder stays free
                if not any(one.folder.iterdir()):
                    one.folder.rmdir()
            return (
                said[-1].removeprefix("crosslace: ") if said else f"exit code {done.returncode}; see {one.folder / LOG}"
            )
    return None


def visible_devices() -> list[int]:
    """The GPUs that this process may give away."""
    import torch

    return list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []


# --- a Hydra launcher ----------------------------------------------------------------------------------------


def check_launcher(name: str) -> None:
    """Refuse a launcher whose package is not there."""
    package = {"joblib": "joblib", "submitit_local": "submitit", "submitit_slurm": "submitit"}.get(name)
    if package is not None and find_spec(f"hydra_plugins.hydra_{package}_launcher") is None:
        raise UserError(f"launcher {name} is not installed; pip install 'crosslace[sweep]' brings it")


def elsewhere(job: Job, waiting: Sequence[Combination]) -> Failures:
    """Through a Hydra launcher, a process a run. A run that another call has queued is left to it."""
    waiting = [one for one in waiting if not queued(one.folder)]
    if not waiting:
        return {}
    settings, folder = job.section("launcher"), Path(job.top.run).resolve()
    plan: list[dict[str, Any]] = []
    for one in waiting:
        training, measuring = commands_of(one, job)
        plan.append({"folder": str(one.folder), "words": training[1:], "eval": measuring[1:]})
        one.folder.mkdir(parents=True, exist_ok=True)
        (one.folder / QUEUED).write_text(f"{time.time():.0f}\n")
    runs.write_json(folder / "launched.json", plan)
    options = [f"hydra.launcher.{name}={value}" for name, value in settings.options.items()]
    command = [
        *(sys.executable, "-m", f"{__package__}.sweep_job", "--multirun"),
        f"hydra/launcher={settings.name}",
        *options,
        f"hydra.sweep.dir={folder / 'launcher'}",
        f"+plan={folder / 'launched.json'}",
        f"+number={','.join(str(i) for i in range(len(plan)))}",
    ]
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            said = _watched(job, process, waiting)
            code = process.returncode
    finally:
        for one in waiting:
            (one.folder / QUEUED).unlink(missing_ok=True)
            if not any(one.folder.iterdir()):
                one.folder.rmdir()
    failed = {one.folder: f"see {folder / 'launcher'}" for one in waiting if not one.complete}
    if failed and code and len(failed) == len(waiting):
        raise UserError(f"launcher {settings.name} could not run the sweep: {_reason(said)}")
    return failed


def _watched(job: Job, process: subprocess.Popen, waiting: Sequence[Combination]) -> str:
    """How many runs are complete, while the launcher works; what it said on stderr."""
    with ThreadPoolExecutor(2) as pool:
        assert process.stdout is not None and process.stderr is not None
        pool.submit(process.stdout.read)
        said = pool.submit(process.stderr.read)
        while process.poll() is None:
            job.progress("sweep", sum(one.complete for one in waiting), len(waiting))
            time.sleep(0.5)
        job.progress("sweep", len(waiting), len(waiting))
        return said.result()


def queued(folder: Path) -> bool:
    """Whether a call of this sweep has given the run to a launcher, and not long ago."""
    try:
        since = float((folder / QUEUED).read_text())
    except (OSError, ValueError):
        return False
    return time.time() - since < STALE_HOURS * 3600


def _reason(stderr: str) -> str:
    """The line that says what was wrong: the last of a traceback, the first of Hydra's own messages."""
    lines = [line for line in stderr.strip().splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line]
    return (lines[-1 if "Traceback" in stderr else 0] if lines else "it gave no message").strip()
