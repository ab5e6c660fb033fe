"""A training's process: what it is asked for, the rows that it reads, and what it cost."""

import json
import resource
import sys
import time
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


class Clock:
    """Seconds and CPU seconds since it was made, less those in which it was held."""

    def __init__(self) -> None:
        self.begun = time.perf_counter(), time.process_time()
        self.left_out = 0.0, 0.0

    def read(self) -> tuple[float, float]:
        now = time.perf_counter(), time.process_time()
        return now[0] - self.begun[0] - self.left_out[0], now[1] - self.begun[1] - self.left_out[1]

    def __enter__(self) -> None:
        self.before = self.read()

    def __exit__(self, *_: object) -> None:
        after = self.read()
        self.left_out = tuple(out + a - b for out, a, b in zip(self.left_out, after, self.before))


def finish(out: str, cost: tuple[float, float]) -> None:
    """done.json: seconds and CPU seconds of the training itself, peak memory of the whole process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss also counts what the parent held before this program began
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        peak = int(line.split()[1]) * 1024
    figures = {"seconds": cost[0], "cpu_seconds": cost[1], "peak": peak}
    if torch.cuda.is_available():
        figures["peak_device"] = torch.cuda.max_memory_allocated()
    (Path(out) / "done.json").write_text(json.dumps(figures))
