"""A training run in a process of its own, for tests/train/test_resume.py to kill: arguments are a folder and JSON."""

import json
import os
import signal
import sys

import torch
from crosslace.data.errors import UserError
from crosslace.data.store.store import in_memory_store
from crosslace.train.settings import TrainerSettings, TranscoderSettings
from crosslace.train.trainer import train


def stores():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(700, 2, 12, generator=generator)
    y = (x.relu() @ torch.randn(12, 12, generator=generator)).cumsum(1)
    return in_memory_store(x[:600], y[:600], seed=3), in_memory_store(x[600:], y[600:])


def main(folder: str, options: dict) -> int:
    torch.set_num_threads(1)
    kill_at, signal_name = options.pop("kill_at", None), options.pop("signal", "SIGKILL")
    fill_disk = options.pop("fill_disk", False)

    def progress(label: str, done: float, total: float | None = None, note: str = "") -> None:
        if done == kill_at:
            if fill_disk:
                import resource

                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            else:
                os.kill(os.getpid(), getattr(signal, signal_name))

    trainer = {"steps": 40, "batch": 32, "checkpoint_every": 7, "eval_every": 15, "log_every": 5, "dead_after": 200}
    settings = TrainerSettings(**(trainer | options.pop("trainer", {})))
    train_store, held_out = stores()
    shape = {"features": 20, "k": 3} | options
    try:
        result = train(settings, TranscoderSettings(**shape), train_store, held_out, folder, progress=progress)
    except UserError as error:
        print(error)
        return 1
    print(result.status, result.message)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], json.loads(sys.argv[2])))
