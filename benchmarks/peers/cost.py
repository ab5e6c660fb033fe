"""What a training cost, written by its own process beside what it trained."""

import json
import resource
import sys
from pathlib import Path


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
