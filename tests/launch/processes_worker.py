"""Run a command as one of several processes, and leave a note of who this one was: `FOLDER WORDS...`."""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from crosslace.launch.cli.main import main
from crosslace.train import parallel

folder, *words = sys.argv[1:]
met = 0


def leave() -> None:
    global met
    met = dist.get_world_size()
    kept()


kept, parallel.leave = parallel.leave, leave
code = main(words)
note = {"started": int(os.environ["WORLD_SIZE"]), "met": met, "code": code}
(Path(folder) / f"process-{os.environ['RANK']}.json").write_text(json.dumps(note))
sys.exit(code)
