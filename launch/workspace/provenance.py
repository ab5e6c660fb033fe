"""What a command ran with, kept in the run's `commands.jsonl`, a line a command, and in what it trains."""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ... import __version__

PACKAGES = ("torch", "transformers", "datasets", "zarr")
HOME = Path(__file__).resolve().parents[2]
NOTED = "commands.jsonl"
SCHEDULING = (
    *("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST"),
    *("SLURM_RESTART_COUNT", "SLURM_JOB_START_TIME", "SLURM_JOB_END_TIME", "CUDA_VISIBLE_DEVICES"),
)
"""Variables of the environment that say where and when a cluster ran the command."""


def provenance(words: Sequence[str]) -> dict[str, Any]:
    """Versions, command, machine, time."""
    return {
        "command": shlex.join(["crosslace", *words]),
        "started": _now(),
        "versions": versions(),
        "commit": _commit(),
        "host": platform.node(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "devices": _devices(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        **({"scheduling": facts} if (facts := _scheduling()) else {}),
    }


def versions() -> dict[str, Any]:
    """Of what decides results."""
    return {"crosslace": __version__, "python": platform.python_version(), **{p: _version(p) for p in PACKAGES}}


@contextmanager
def recorded(run: str | None, words: Sequence[str], **facts: Any) -> Iterator[None]:
    """Note a command in the folder that `run` names, once it has ended, however it ended; nothing without a run."""
    noted, how = provenance(words) | facts, "done"
    if run and (queued := Path(run) / ".queued").is_file():
        noted["queued"] = queued.read_text().strip()
    try:
        yield
    except BaseException as error:
        how = f"{type(error).__name__}: {error}".splitlines()[0]
        raise
    finally:
        if run and (Path(run) / "config.yaml").is_file() and os.access(run, os.W_OK):
            line = json.dumps(noted | {"devices": _devices(), "ended": _now(), "how": how}, ensure_ascii=False)
            with (Path(run) / NOTED).open("a", encoding="utf-8") as log:
                log.write(line + "\n")


def append_error(folder: Path, words: Sequence[str], text: str) -> Path | None:
    """Add a traceback to a run's error.log; where it is, or None where it cannot be written."""
    rank = os.environ.get("RANK", "0")
    path = folder / ("error.log" if rank == "0" else f"error.rank{rank}.log")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} crosslace {' '.join(words)}\n{text}\n")
    except OSError:  # the disk may be what failed
        return None
    return path


def device_hours(run: Path) -> float | None:
    """How long the commands on a run have held devices; None where none was noted. Of runs that were trained side by
    side in one process, each has its share."""
    try:
        lines = [json.loads(line) for line in (run / NOTED).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return None
    when = datetime.fromisoformat
    held = [(when(x["ended"]) - when(x["started"])).total_seconds() * x["processes"] * x.get("share", 1) for x in lines]
    return sum(held) / 3600 if held else None


def _scheduling() -> dict[str, str]:
    """What a cluster's scheduler says of this job: number, place in the array, partition, nodes, restarts, times."""
    return {name.lower(): os.environ[name] for name in SCHEDULING if name in os.environ}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    """The GPUs' names; nothing is imported for it, so that a verb that needs no torch stays quick."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ["cpu"]
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _commit() -> str | None:
    """The commit of the code, with a mark where files were changed since; None for an installed package."""
    if not (HOME / ".git").exists():
        return None
    git = ["git", "-C", str(HOME)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=5)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False, timeout=5).returncode != 0
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + (" with changes" if changed else "")
