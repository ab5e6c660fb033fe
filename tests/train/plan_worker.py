"""Trains a few steps in a process of its own, and prints how far its memory rose: what `train.plan` foretells."""

import json
import os
import sys
from pathlib import Path

import torch
from crosslace.data.store.store import ActivationStore
from crosslace.train.settings import TrainerSettings, TranscoderSettings
from crosslace.train.trainer import Trainer


def status(field: str) -> int:
    """A field of this process's memory, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def main(store: str, run: str, transcoder: dict, trainer: dict) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    rows, held_out = (ActivationStore.open(store, split=split) for split in ("train", "held_out"))
    Trainer(TrainerSettings(**trainer), TranscoderSettings(**transcoder), rows, held_out, run, device="cpu").run()
    print(json.dumps({"peak": status("VmHWM") - before}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
