"""Training runs in processes of their own, for tests/train/test_resume.py to kill.

A line of JSON on standard input, [folder, options], forks a process that trains there: what was imported once serves
all of them. A line comes back when it has ended: [exit code, what it said].
"""

import json
import os
import signal
import sys
import traceback

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


def forked(folder: str, options: dict) -> tuple[int, str]:
    """The run in a child of this process, which itself never computes."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 1)
        os.dup2(write, 2)
        code = 70
        try:
            code = main(folder, options)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    with open(read) as said:
        text = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(forked(*json.loads(line))), flush=True)
