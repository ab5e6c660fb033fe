"""A training's process: what it is asked for, the rows that it reads, and what it cost."""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch


def begin(path: str) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """The job, with threads and seed set; and its rows, inputs and outputs [L, N, D], still in their files."""
    job = json.loads(Path(path).read_text())
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    x, y = (np.load(f"{job['rows']}/{name}.npy", mmap_mode="r") for name in "xy")
    return job, x, y


def finish(out: str, seconds: float) -> None:
    """done.json: seconds of the training itself, CPU seconds and peak memory of the whole process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss also counts what the parent held before this program began
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        peak = int(line.split()[1]) * 1024
    figures = {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak": peak}
    (Path(out) / "done.json").write_text(json.dumps(figures))
