"""What a command ran with, kept in the run's `commands.jsonl`, a line a command, and in what it trains."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ... import __version__

PACKAGES = ("torch", "transformers", "datasets", "zarr")
HOME = Path(__file__).resolve().parents[2]


def provenance(words: Sequence[str]) -> dict[str, Any]:
    """Versions, command, machine, time."""
    found = {"crosslace": __version__, "python": platform.python_version(), **{p: _version(p) for p in PACKAGES}}
    return {
        "command": shlex.join(["crosslace", *words]),
        "started": _now(),
        "versions": found,
        "commit": _commit(),
        "host": platform.node(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "devices": _devices(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


@contextmanager
def recorded(run: str | None, words: Sequence[str]) -> Iterator[None]:
    """Note a command in the folder that `run` names, once it has ended, however it ended; nothing without a run."""
    noted, how = provenance(words), "done"
    try:
        yield
    except BaseException as error:
        how = f"{type(error).__name__}: {error}".splitlines()[0]
        raise
    finally:
        if run and (Path(run) / "config.yaml").is_file() and os.access(run, os.W_OK):
            line = json.dumps(noted | {"devices": _devices(), "ended": _now(), "how": how}, ensure_ascii=False)
            with (Path(run) / "commands.jsonl").open("a", encoding="utf-8") as log:
                log.write(line + "\n")


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
