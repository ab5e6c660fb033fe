"""Runs under torchrun: whole training runs on meshes of these processes, one after another, as a list in JSON says."""

import json
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from crosslace.data.store.store import ActivationStore
from crosslace.train.parallel.mesh import ParallelSettings, processes
from crosslace.train.settings import TrainerSettings, TranscoderSettings
from crosslace.train.trainer import train


class StopAt:
    """A sink that asks the run to stop at a step, as a cluster would."""

    def __init__(self, step):
        self.step = step

    def resume(self, state):
        pass

    def log(self, step, values, histograms):
        if step == self.step:
            signal.raise_signal(signal.SIGTERM)

    def state(self):
        return {}

    def close(self, summary):
        pass


def run(store: str, folder: str, trainer: dict, transcoder: dict, stop: int | None = None, **options):
    """One run on the written store, with or without a request to stop at a step."""
    return train(
        TrainerSettings(**trainer),
        TranscoderSettings(**transcoder),
        ActivationStore.open(store),
        ActivationStore.open(store, split="held_out"),
        folder,
        device="cpu",
        trackers=[StopAt(stop)],
        **options,
    )


def main(plan: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for entry in json.loads(plan.read_text()):
        mesh = ParallelSettings(*entry.pop("mesh"))
        with processes(mesh) as comm:
            result = run(**entry, comm=comm)
        if comm.is_main:
            print(f"ended: {entry['folder']} {result.status} at {result.step}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
