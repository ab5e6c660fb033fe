"""One run of a sweep, as a Hydra launcher calls it: in a job of a cluster, or in a process of this machine.

`crosslace sweep` starts this with --multirun; Hydra's launcher calls `job` once a number, where its settings say. The
run itself is two ordinary commands in processes of their own. Where the launcher gives a job several tasks (several
GPUs, several nodes), each task takes part in one training.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path=None)
def job(config: DictConfig) -> None:
    """Train and measure the run with this number."""
    entry = json.loads(Path(config["plan"]).read_text(encoding="utf-8"))[config["number"]]
    environment = os.environ | task_environment()
    command = [sys.executable, "-m", "crosslace.launch"]
    trained = subprocess.run([*command, "train", *entry["words"]], env=environment)
    if trained.returncode:  # 75: interrupted, to be put back into the queue; nothing to measure yet
        sys.exit(trained.returncode)
    if environment.get("RANK", "0") == "0":
        alone = {key: value for key, value in environment.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        subprocess.run([*command, "eval", *entry["eval"]], check=True, env=alone)


def task_environment() -> dict[str, str]:
    """What torch.distributed reads, where submitit gave this job several tasks."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return {}
    import submitit
    from submitit.helpers import TorchDistributedEnvironment

    if submitit.JobEnvironment().num_tasks == 1:
        return {}
    TorchDistributedEnvironment().export()
    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return {name: os.environ[name] for name in names}


if __name__ == "__main__":
    job()
