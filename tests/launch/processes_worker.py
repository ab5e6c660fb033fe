"""Run a command as one of several processes: `FOLDER PLAN WORDS...`.

A note in FOLDER says whom this process met, on which device, and how it ended. PLAN is JSON of mishaps by rank:
`words` to add, `full` (opening a file with this in its name for writing finds the disk full), `term` (SIGTERM to itself
once this folder is there).
"""

import errno
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch.distributed as dist
from crosslace.launch.cli.main import main
from crosslace.train import parallel

folder, plan, *words = sys.argv[1:]
rank = os.environ.get("RANK", "0")
mishap = json.loads(plan).get(rank, {})
note = {}


def keep(**more):
    note.update(more)
    (Path(folder) / f"process-{rank}.json").write_text(json.dumps(note))


def join(device="cpu", timeout=600):
    new = kept(device, timeout)
    keep(met=dist.get_world_size() if dist.is_initialized() else 1, device=str(device))
    return new


def full(event, given):
    """Opening a file of such a name finds no room."""
    if event == "open" and given[2] & (os.O_WRONLY | os.O_RDWR) and mishap["full"] in str(given[0]):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(given[0]))


def stop(path):
    while not path.exists():
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)


kept, parallel.join = parallel.join, join
if "full" in mishap:
    sys.addaudithook(full)
if "term" in mishap:
    threading.Thread(target=stop, args=[Path(mishap["term"])], daemon=True).start()
code = main([*words, *mishap.get("words", [])])
keep(code=code)
sys.exit(code)
