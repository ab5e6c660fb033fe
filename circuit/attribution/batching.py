"""How many targets go through the frozen model together."""

from pathlib import Path

import torch

from ...data.memory import host_memory

CPU_TARGETS = 128  # products are wide enough for a few cores; more would only take memory
CPU_BYTES = 2 * 2**30  # at most
SMALL_SHARE = 0.1  # of memory: what one of several large things may take
SHARE = 0.5  # of an accelerator's free memory: rows found later and the library's own buffers take the rest
HOST_SHARE = 0.25  # of the machine's memory for rows: the model and the transcoder need theirs
LEAST = 8


def free_memory(device: torch.device) -> int | None:
    """Bytes that an accelerator has left for this process, its allocator's unused ones included; None on a CPU."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def row_bytes(memory: float | None, device: torch.device) -> float:
    """Bytes that a graph's rows may take: `memory` GiB, or a share of what the device has."""
    if memory is not None:
        return memory * 2**30
    free = free_memory(device)
    return free * SHARE if free is not None else available_memory() * HOST_SHARE


def small_share(device: torch.device) -> float:
    """Bytes that one of several large things may take."""
    free = free_memory(device)
    return SMALL_SHARE * (available_memory() if free is None else free)


def available_memory() -> int:
    """Bytes that this process may still take of the machine's memory, within what a scheduler or container allows."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return min(host_memory(), next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvail")))
    except (OSError, StopIteration):
        return host_memory()


def bytes_per_target(length: int, width: int, heads_width: int, n_nodes: int, itemsize: int) -> int:
    """What one target takes: cotangents, values and a product's result at every position, and its edges thrice."""
    return itemsize * (length * (2 * width + 2 * heads_width) + 3 * n_nodes)


def fitting_batch(per_target: int, free: int | None, targets: int) -> int:
    """As many targets as fit, at most all: on an accelerator in half of what is free, in whole multiples of 32 where
    there are so many; on a CPU (`free` is None) 128, or as many as take a tenth of the memory, at most 2 GiB."""
    if free is None:
        fit = min(CPU_TARGETS, int(min(CPU_BYTES, SMALL_SHARE * available_memory())) // per_target)
    else:
        fit = int(SHARE * free) // per_target
    fit = min(fit, max(1, targets))
    if fit > 32 and fit < targets:
        fit -= fit % 32
    return max(min(LEAST, max(1, targets)), fit)
