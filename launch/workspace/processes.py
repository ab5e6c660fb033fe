"""This process among those that torchrun or `accelerate launch` started: made first thing in a command, once.

Rank and number of processes come from Accelerate's state, on the process group of `train.parallel`; the device is this
process's own (`data.device`); precision is what an `accelerate` configuration asks for.
"""

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from ...data.errors import UserError

if TYPE_CHECKING:
    import torch

LONG = 6 * 3600
"""Seconds that processes wait for each other in verbs without `parallel.timeout`: one may have much more to do."""


MAY_DIFFER = (".device", "store.scratch")
"""Settings that belong to a process or its machine."""


class Process(NamedTuple):
    """Who this process is."""

    rank: int
    count: int
    device: "torch.device"
    precision: str
    """float32, bf16 or fp16: what `trainer.precision=auto` stands for."""


def this_process(device: str = "auto", setting: str = "model.device", timeout: int = LONG) -> Process:
    """Meet the others, take the device."""
    import torch
    from accelerate import PartialState

    from ...data.device import find_device
    from ...train.parallel import join

    own = find_device(device, setting)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    join(own, timeout)
    state = PartialState(cpu=own.type == "cpu")
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return Process(state.process_index, state.num_processes, own, asked if asked in ("bf16", "fp16") else "float32")


def agree(told: dict[str, Any]) -> None:
    """Refuse processes that were given different settings, or have different versions installed."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, told)
    first = everybody[0]
    for rank, other in enumerate(everybody):
        for name in sorted(first | other):
            if (here := other.get(name)) != (there := first.get(name)) and not name.endswith(MAY_DIFFER):
                raise UserError(
                    f"process {rank} has {name}={here} and process 0 {there}: start all with the same settings and the "
                    "same versions installed"
                )


def wait_until(done: Callable[[], bool], every: float = 1.0) -> None:
    """For the others' work, however long it takes; one that dies ends the job, and this process with it."""
    while not done():
        time.sleep(every)
