"""How much memory this process may take: the machine's, or what a job scheduler or a container has set."""

import os
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def host_memory() -> int:
    """Bytes: the least of what the machine has, what its control groups allow and what SLURM granted."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_cgroup_limits(), *_slurm_limits()]
    return min(limits)


def _cgroup_limits() -> list[int]:
    """Of this process's group and all above it, in both versions of control groups."""
    found = []
    for line in _groups():
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, file = (_ROOT / "memory", "memory.limit_in_bytes") if controllers else (_ROOT, "memory.max")
        group = base / name.lstrip("/")
        for folder in [group, *group.parents]:
            try:
                found.append(int((folder / file).read_text()))
            except (OSError, ValueError):  # no such group in this namespace, or `max`
                continue
    return found


def _groups() -> list[str]:
    listing = Path("/proc/self/cgroup")
    return listing.read_text().splitlines() if listing.exists() else []


def _slurm_limits() -> list[int]:
    """SLURM says megabytes, for the node or for each of its processors; 0 is no limit."""
    node = int(os.environ.get("SLURM_MEM_PER_NODE") or 0)
    each, count = (int(os.environ.get(name) or 0) for name in ("SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"))
    return [megabytes << 20 for megabytes in (node, each * count) if megabytes]
